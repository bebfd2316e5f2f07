"""What a plugin does with the model between forward pass and loss changes no training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin

from avalanche_fmlora.strategies.registry import methods


class Probe(SupervisedPlugin):
    """Looks at the model's predictions for a batch of another size in the middle of a step."""

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        strategy.model.eval()
        with torch.no_grad():
            strategy.model(strategy.mb_x[:3].flip(-1))
        strategy.model.train()


@pytest.mark.parametrize("name", sorted(set(methods()) - {"joint", "ncm"}))
def test_a_look_at_the_model_changes_nothing(name: str, make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    states = []
    for plugins in ([], [Probe()]):
        strategy = train(make_strategy(name, plugins=plugins), class_benchmark)
        states.append(strategy.model.adapter_state())
    alone, watched = states
    assert not [k for k in alone if not torch.equal(alone[k], watched[k])]
