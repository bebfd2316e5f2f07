"""What every registered method promises. A new method joins by being registered; tables below name what is special."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor

from avalanche_fmlora.modules.network import backbone_parameter_names
from avalanche_fmlora.strategies.registry import methods

METHODS = sorted(methods())
BENCHMARKS = ("class_benchmark", "domain_benchmark", "task_benchmark")


class Guard(SupervisedPlugin):
    """Watches every step: gradients of the backbone, losses, rates; rows before and after each experience."""

    def __init__(self, backbone: dict[str, Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        self.touched: set[str] = set()
        self.losses: list[float] = []
        self.past_moved: list[Any] = []
        self._rows: tuple[Tensor, Tensor] | None = None

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        head = strategy.model.head
        self._past = head.past.clone()
        self._rows = (head.rows[self._past].clone(), head.bias[self._past].clone())

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        parameters = dict(strategy.model.vit.named_parameters())
        self.touched |= {n for n in self.backbone if parameters[n].requires_grad or parameters[n].grad is not None}

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.losses.append(strategy.loss.item())

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        head, (rows, bias) = strategy.model.head, self._rows
        same = torch.equal(head.rows[self._past], rows) and torch.equal(head.bias[self._past], bias)
        if not same:
            self.past_moved.append(strategy.experience.current_experience)


class Run:
    """One method trained on one benchmark, with what was seen on the way."""

    def __init__(self, name: str, benchmark: Any, make_strategy: Any, make_vit: Any, train: Any) -> None:
        self.vit = make_vit()
        self.before = {k: v.clone() for k, v in self.vit.state_dict().items()}
        self.parameters = dict(self.vit.named_parameters())
        self.benchmark = benchmark
        self.seen: list[tuple[set[int], set[int]]] = []
        self.stored: list[int] = []
        options = {"row_transport": False, "train_epochs": 2}
        self.strategy = make_strategy(name, self.vit, **options)
        names = [n for n in backbone_parameter_names(self.vit) if n in dict(self.vit.named_parameters())]
        self.guard = Guard(dict.fromkeys(names, torch.empty(0)))
        self.strategy.plugins.insert(-1, self.guard)
        train(self.strategy, benchmark, after=self._look)

    @torch.no_grad()
    def _look(self, strategy: Any) -> None:
        model = strategy.model.eval()
        trained = strategy.model.head.seen.nonzero().flatten().tolist()
        strategy.eval(self.benchmark.test_stream)
        images = torch.cat([x for e in self.benchmark.test_stream for x in _images(e)])
        self.seen.append((set(trained), set(model(images).argmax(-1).tolist())))
        self.stored.append(model.stored_parameters())


def _images(experience: Any) -> Iterator[Tensor]:
    for sample in experience.dataset.eval():
        yield sample[0][None]


_RUNS: dict[tuple[str, str], Run] = {}


@pytest.fixture(params=[(m, b) for m in METHODS for b in BENCHMARKS], ids=lambda p: f"{p[0]}-{p[1][:5]}")
def run(request: pytest.FixtureRequest, make_strategy: Any, make_vit: Any, train: Any) -> Run:
    """Trained once for all tests that only look."""
    name, benchmark = request.param
    if request.param not in _RUNS:
        _RUNS[request.param] = Run(name, request.getfixturevalue(benchmark), make_strategy, make_vit, train)
    return _RUNS[request.param]


def test_the_backbone_is_what_it_was_and_took_no_gradient(run: Run) -> None:
    state = run.vit.state_dict()
    names = backbone_parameter_names(run.vit)
    assert len(names) == len(run.before)
    plain = {n.replace(".base.", "."): state[n] for n in names}
    assert plain.keys() == run.before.keys()
    assert not [n for n, v in plain.items() if not torch.equal(v, run.before[n])]
    assert not run.guard.touched
    assert not [n for n, p in run.parameters.items() if p.requires_grad or p.grad is not None]


def test_it_learned_with_finite_losses(run: Run) -> None:
    assert all(torch.isfinite(torch.tensor(run.guard.losses)))
    assert run.strategy.method == "ncm" or len(run.guard.losses) > 3
    assert all(torch.isfinite(v).all() for v in run.strategy.model.adapter_state().values() if v.is_floating_point())


def test_past_rows_stay_to_the_bit(run: Run) -> None:
    assert run.guard.past_moved == []


def test_predictions_are_classes_seen(run: Run) -> None:
    for known, predicted in run.seen:
        assert predicted <= known
    streams = run.benchmark.train_stream
    assert run.seen[-1][0] == {int(c) for e in streams for c in e.classes_in_this_experience}


def test_logits_do_not_depend_on_batch_mates(run: Run, images: Tensor) -> None:
    model = run.strategy.model.eval()
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        flipped = model(images.flip(0)).flip(0)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flipped, together, rtol=1e-4, atol=1e-4)


def test_saving_and_loading_give_the_same_logits(run: Run, make_strategy: Any, images: Tensor, tmp_path: Any) -> None:
    path = run.strategy.save(tmp_path / "adapter.safetensors")
    other = make_strategy(run.strategy.method, seed=3)
    other.load(path)
    with torch.no_grad():
        assert torch.equal(other.model.eval()(images), run.strategy.model.eval()(images))


def test_the_same_seed_gives_the_same_bits(run: Run, make_strategy: Any, make_vit: Any, train: Any) -> None:
    again = Run(run.strategy.method, run.benchmark, make_strategy, make_vit, train)
    assert again.guard.losses == run.guard.losses
    first, second = run.strategy.model.adapter_state(), again.strategy.model.adapter_state()
    assert first.keys() == second.keys()
    assert not [k for k in first if not torch.equal(first[k], second[k])]


@pytest.mark.parametrize("name", METHODS)
def test_future_classes_have_a_finite_loss(name: str, make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    losses: list[float] = []

    class Losses(SupervisedPlugin):
        def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
            losses.append(strategy.loss.item())

    strategy = make_strategy(name, plugins=[Losses()], train_epochs=1)
    strategy.eval(class_benchmark.test_stream)
    train(strategy, class_benchmark, n=1)
    strategy.eval(class_benchmark.test_stream)
    assert len(losses) == 6
    assert torch.isfinite(torch.tensor(losses)).all()
    strategy.train(class_benchmark.train_stream[1]) if not strategy.joint else None
    assert strategy.model.head.seen.sum() == (2 if strategy.joint else 4)


@pytest.mark.parametrize("name", METHODS)
def test_classes_may_be_a_list_a_set_or_unknown(name: str, make_strategy: Any, train: Any) -> None:
    """The same data through three kinds of experiences gives the same bits."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.scenarios import with_classes_timeline
    from avalanche.benchmarks.utils import as_classification_dataset

    data = [as_classification_dataset(_Tensors(t)) for t in range(2)]
    states = []
    for kind in (list, set, None):
        benchmark = benchmark_from_datasets(train=data, test=data)
        if kind is not None:
            benchmark = with_classes_timeline(benchmark)
        experiences = list(benchmark.train_stream)
        for e in experiences if kind is not None else ():
            e.classes_in_this_experience = kind(e.classes_in_this_experience)
        strategy = make_strategy(name, train_epochs=1)
        train(strategy, types.SimpleNamespace(train_stream=experiences))
        states.append(strategy.model.adapter_state())
        assert strategy.model.head.seen.tolist() == [True] * 4
    for state in states[1:]:
        assert not [k for k, v in state.items() if not torch.equal(v, states[0][k])]


class _Tensors(torch.utils.data.Dataset[Any]):
    """12 random images of 2 classes."""

    def __init__(self, t: int) -> None:
        self.images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(t))
        self.targets = [i % 2 + 2 * t for i in range(12)]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]
