"""What a run's record says of its cost."""

from __future__ import annotations

from typing import Any

import pytest

from avalanche_fmlora.experiment import _gmacs


@pytest.mark.parametrize(("name", "prompt"), [("linear_probe", 0), ("seq_lora", 0), ("fm_lora", 3)])
def test_multiply_accumulates_are_those_of_all_matrix_products(
    name: str, prompt: int, make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    """Twin: counted by hand. Attention is among them, on CPUs too whose kernel the counter does not know."""
    options = {"prompt_length": prompt, "pooling": "model"} if prompt else {}
    strategy = train(make_strategy(name, train_epochs=1, **options), class_benchmark, n=1)
    patches, d, hidden, depth, classes = 4, 16, 32, 2, 2
    t = 1 + patches + prompt
    block = t * d * 3 * d + 2 * t * t * d + t * d * d + 2 * t * d * hidden
    by_hand = patches * (3 * 8 * 8) * d + depth * block + classes * d
    assert round(_gmacs(strategy, 16) * 1e9) == by_hand
