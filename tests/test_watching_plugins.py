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


@pytest.mark.parametrize("name", ["fm_lora", "seq_lora", "inflora", "sd_lora"])
def test_a_state_dict_replaces_merged_weights(
    name: str, make_strategy: Any, train: Any, class_benchmark: Any, images: Any
) -> None:
    states: list[Any] = []

    def keep(strategy: Any) -> None:
        strategy.model.eval()
        states.append(({k: v.clone() for k, v in strategy.model.state_dict().items()}, strategy.model(images).detach()))

    strategy = train(make_strategy(name), class_benchmark, n=1, after=keep)
    ((state, logits),) = states
    with torch.no_grad():
        for layer in strategy.model.lora.layers:
            for parameter in layer.state_dict().values():
                parameter.mul_(1.5) if parameter.is_floating_point() else None
        strategy.merge()
        assert not torch.equal(strategy.model(images), logits)
        strategy.model.load_state_dict(state)
        assert torch.equal(strategy.model(images), logits)


@pytest.mark.parametrize("criterion", [torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_the_width_of_the_head_changes_no_bit_of_the_loss(criterion: Any, make_strategy: Any) -> None:
    """An evaluation on classes to come makes it wider."""
    generator = torch.Generator().manual_seed(0)
    strategy = make_strategy("seq_lora", criterion=criterion)
    strategy.is_training = True
    losses = []
    for width in (6, 24, 100):
        strategy.model.head.grow([width - 1])
        strategy.model.head.active = torch.arange(6)
        logits = torch.randn(16, 6, generator=generator.manual_seed(0)) * 4
        strategy.mb_output = torch.cat([logits, torch.full((16, width - 6), -1e4)], 1).requires_grad_()
        strategy.mbatch = [torch.zeros(16, 1), torch.arange(16) % 6, torch.zeros(16)]
        loss = strategy.criterion()
        (gradient,) = torch.autograd.grad(loss, strategy.mb_output)
        losses.append((float(loss.detach()), gradient[:, :6].clone()))
    assert len({value for value, _ in losses}) == 1
    assert all(torch.equal(gradient, losses[0][1]) for _, gradient in losses)
