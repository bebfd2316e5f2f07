"""What a criterion is given: the classes that take part, whatever an evaluation has made room for."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import loss_metrics
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn

from avalanche_fmlora.strategies.loss import Loss


class Losses(SupervisedPlugin):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[float] = []

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        self.all.append(float(strategy.loss.detach()))


@pytest.mark.parametrize("loss_classes", ["current", "seen"])
def test_labels_are_smoothed_over_the_classes_that_take_part(
    loss_classes: str, make_strategy: Any, class_benchmark: Any
) -> None:
    """An evaluation, which widens the logits, changes nothing of what is learned."""
    rows = []
    for evaluates in (False, True):
        losses, criterion = Losses(), nn.CrossEntropyLoss(label_smoothing=0.3)
        options = {"loss_classes": loss_classes, "lr_head": 0.1, "plugins": [losses], "criterion": criterion}
        strategy = make_strategy("linear_probe", **options)
        for experience in class_benchmark.train_stream[:2]:
            strategy.train(experience, shuffle=False)
            if evaluates:
                strategy.eval(class_benchmark.test_stream)
        assert torch.tensor(losses.all).isfinite().all()
        assert losses.all[0] == pytest.approx(math.log(2), rel=1e-5), "a linear head starts at zero"
        rows.append(strategy.model.head.rows)
    assert rows[0].abs().max() > 0.01
    torch.testing.assert_close(rows[0], rows[1][: len(rows[0])], rtol=0, atol=1e-6)


def test_smoothing_and_weights_are_those_of_the_classes_that_take_part() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, weight = torch.randn(5, 6, generator=generator), torch.arange(1.0, 7.0)
    labels = torch.tensor([4, 1, 1, 3, 4])
    criterion = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.2, reduction="sum")
    strategy: Any = SimpleNamespace(_criterion=criterion, mb_output=logits, mb_y=labels)
    loss = Loss._over(strategy, torch.tensor([False, True, False, True, True, False]))
    log_p = logits[:, [1, 3, 4]].log_softmax(1)
    w = weight[[1, 3, 4]]
    own = -(weight[labels] * log_p.gather(1, torch.tensor([[2], [0], [0], [1], [2]]))[:, 0])
    torch.testing.assert_close(loss, (0.8 * own + 0.2 / 3 * -(w * log_p).sum(1)).sum())


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).float())


@pytest.mark.parametrize("criterion", [smoothed, one_hot])
def test_a_criterion_that_reads_what_is_left_out_is_named_in_its_first_step(
    criterion: Callable[[Tensor, Tensor], Tensor], make_strategy: Any, class_benchmark: Any
) -> None:
    strategy = make_strategy("fm_lora", criterion=criterion, train_epochs=1)
    strategy.eval(class_benchmark.test_stream)  # makes room for classes that are not seen
    with pytest.raises(ValueError, match=rf"a finite loss but got (inf|nan) from {criterion.__qualname__}: .*CrossEnt"):
        strategy.train(class_benchmark.train_stream[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_of_evaluation_does_not_depend_on_what_was_evaluated_before(
    smoothing: float, make_strategy: Any, class_benchmark: Any
) -> None:
    """Weights may be those of all classes that will come; evaluations make room for classes that are not seen."""
    weight = torch.arange(1.0, 7.0) if smoothing else None
    evaluator = EvaluationPlugin(loss_metrics(experience=True))
    criterion = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    strategy = make_strategy("linear_probe", criterion=criterion, evaluator=evaluator, train_epochs=1)
    strategy.train(class_benchmark.train_stream[0])
    found = []
    for stream in (class_benchmark.test_stream[:1], class_benchmark.test_stream, class_benchmark.test_stream[:1]):
        metrics = strategy.eval(stream)
        found.append(next(v for k, v in metrics.items() if k.endswith("Exp000")))
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)
    assert found[0] < 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_all_classes_that_will_come(
    smoothing: float, make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    def rows(weight: Tensor | None) -> Tensor:
        criterion = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
        return train(make_strategy("linear_probe", criterion=criterion), class_benchmark).model.head.rows  # type: ignore[no-any-return]

    torch.testing.assert_close(rows(torch.ones(6)), rows(None), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(rows(torch.arange(1.0, 7.0)), rows(None), atol=1e-3)
    with pytest.raises(ValueError, match="a weight for each of the 4 classes so far but CrossEntropyLoss has 2"):
        rows(torch.ones(2))


@pytest.mark.parametrize("weight", [None, torch.ones(2)])
def test_a_subclass_of_cross_entropy_computes_its_own_loss(
    weight: Any, make_strategy: Any, class_benchmark: Any
) -> None:
    class Halved(nn.CrossEntropyLoss):
        calls = 0

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            self.calls += 1
            return 0.5 * super().forward(logits, labels)

    losses, criterion = Losses(), Halved(weight=weight)
    strategy = make_strategy("linear_probe", criterion=criterion, plugins=[losses], train_epochs=1)
    strategy.train(class_benchmark.train_stream[0])
    assert criterion.calls == len(losses.all)
    assert losses.all[0] == pytest.approx(0.5 * math.log(2), rel=1e-4)


def test_ignored_labels_stay_ignored_among_the_classes_that_take_part() -> None:
    logits, labels = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 2, 3, 0])
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=2)
    part = SimpleNamespace(_criterion=criterion, mb_output=logits, mb_y=labels)
    loss = Loss._over(part, torch.tensor([True, False, True, True]))  # type: ignore[arg-type]
    kept = [0, 3, 4]
    expected = F.cross_entropy(logits[kept][:, [0, 2, 3]], torch.tensor([0, 2, 0]), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_a_loss_of_several_numbers_is_named(make_strategy: Any, class_benchmark: Any) -> None:
    strategy = make_strategy("linear_probe", criterion=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match=r"one number but CrossEntropyLoss gives \(\d+,\): .*reduction='mean'"):
        strategy.train(class_benchmark.train_stream[0])


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
