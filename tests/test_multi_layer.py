"""Features of the last blocks with every method: trained, saved, loaded, and no other width taken for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from avalanche_fmlora import FM_LORA_CLASSIFIER
from avalanche_fmlora.modules.vit import feature_dim
from avalanche_fmlora.strategies.registry import methods

MULTI_LAYER = {**FM_LORA_CLASSIFIER, "pooling": "multi_layer"}


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_trains_with_it_and_its_file_says_so(
    name: str, make_strategy: Callable[..., Any], train: Any, class_benchmark: Any, images: Tensor, tmp_path: Path
) -> None:
    strategy = train(make_strategy(name, train_epochs=1, **MULTI_LAYER), class_benchmark, n=2)
    head = strategy.model.head
    assert head.dim == feature_dim(strategy.model.vit, "multi_layer") == 4 * strategy.model.vit.embed_dim, "two blocks"
    strategy.model.eval()
    logits = strategy.model(images)
    torch.testing.assert_close(strategy.model(images[:1]), logits[:1])
    path = strategy.save(tmp_path / "adapter.safetensors")
    again = make_strategy(name, **MULTI_LAYER)
    again.load(path)
    assert torch.equal(again.model.eval()(images), logits)
    with pytest.raises(ValueError, match="pooling"):
        make_strategy(name, **FM_LORA_CLASSIFIER).load(path)
