"""Data and surroundings as Avalanche's users bring them: labels of other types, experiences of their own, modes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.scenarios.dataset_scenario import DatasetExperience
from avalanche.benchmarks.utils import AvalancheDataset, as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from torch.utils.data import TensorDataset

from avalanche_fmlora import glyph_vit
from avalanche_fmlora.modules.images import check_images
from avalanche_fmlora.strategies.registry import methods

CONTINUAL = sorted(name for name, cls in methods().items() if not cls.joint)


class Labelled(TensorDataset):
    """Images whose `targets` are Python's, and whose items have a label of any type."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__(images, labels)
        self.targets = labels.tolist()


@pytest.fixture
def images16() -> torch.Tensor:
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("name", ["fm_lora", "ncm", "seq_lora", "l2p"])
def test_labels_of_other_integer_types_are_class_indices(
    name: str, dtype: torch.dtype, make_strategy: Any, images16: torch.Tensor
) -> None:
    states = []
    for kind in (torch.long, dtype):
        labels = torch.arange(2).repeat(8).to(kind)
        dataset = as_classification_dataset(Labelled(images16, labels))
        benchmark = benchmark_from_datasets(train=[dataset], test=[dataset])
        strategy = make_strategy(name, train_epochs=1)
        torch.manual_seed(0)
        strategy.train(benchmark.train_stream[0])
        strategy.eval(benchmark.test_stream)
        states.append(strategy.model.adapter_state())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_data_without_targets_are_refused_with_the_mend(make_strategy: Any, images16: torch.Tensor) -> None:
    data = AvalancheDataset([TensorDataset(images16, torch.zeros(16, dtype=torch.long))])
    benchmark = benchmark_from_datasets(train=[data])
    with pytest.raises(ValueError, match=r"knows its labels as `targets`: .*as_classification_dataset"):
        make_strategy("fm_lora").train(benchmark.train_stream[0])


@pytest.mark.parametrize("name", ["fm_lora", "ncm"])
def test_experiences_of_their_own_have_no_number(name: str, make_strategy: Any, images16: torch.Tensor) -> None:
    strategy = make_strategy(name, train_epochs=1)
    for start in (0, 2):
        labels = torch.arange(start, start + 2).repeat(8)
        dataset = as_classification_dataset(Labelled(images16, labels))
        strategy.train(DatasetExperience(dataset=dataset), eval_streams=[])
    assert strategy.model.head.seen.tolist() == [True] * 4


def test_an_experience_without_a_number_that_is_begun_again_starts_anew(
    make_strategy: Any, images16: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(SupervisedPlugin):
        stops = True

        def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            if self.stops:
                self.stops = False
                raise KeyboardInterrupt

    dataset = as_classification_dataset(Labelled(images16, torch.arange(2).repeat(8)))
    experience = DatasetExperience(dataset=dataset)
    strategy = make_strategy("seq_lora", train_epochs=2, plugins=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        strategy.train(experience, eval_streams=[])
    strategy.train(DatasetExperience(dataset=dataset), eval_streams=[])
    assert "broken off: what it has trained is dropped" in caplog.text, "another one, for all that is known"
    caplog.clear()
    strategy.train(experience, eval_streams=[])
    stop = next(p for p in strategy.plugins if isinstance(p, Stop))
    stop.stops = True
    with pytest.raises(KeyboardInterrupt):
        strategy.train(experience, eval_streams=[])
    strategy.train(experience, eval_streams=[])
    assert "broken off" not in caplog.text, "the same one"


@pytest.mark.parametrize("name", CONTINUAL)
def test_evaluation_in_inference_mode_leaves_training_possible(
    name: str, make_strategy: Any, class_benchmark: Any
) -> None:
    states = []
    for mode in (torch.no_grad, torch.inference_mode):
        strategy = make_strategy(name, train_epochs=1)
        torch.manual_seed(0)
        for experience in class_benchmark.train_stream[:2]:
            with mode():
                strategy.eval(class_benchmark.test_stream)
            strategy.train(experience)
        states.append(strategy.model.adapter_state())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", methods())
def test_the_default_dtype_is_the_users(name: str, make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    expected = train(make_strategy(name, train_epochs=1), class_benchmark, n=2).model.head.rows
    torch.set_default_dtype(torch.float64)
    try:
        strategy = train(make_strategy(name, train_epochs=1), class_benchmark, n=2)
        strategy.eval(class_benchmark.test_stream[:2])
    finally:
        torch.set_default_dtype(torch.float32)
    assert strategy.model.head.rows.dtype == expected.dtype == torch.float32
    assert strategy.model.head.rows.shape == expected.shape


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 32, 32), r"shape \[B, 3, H, W\] but got \[2, 1, 32, 32\]"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"in torch\.float32.*but got torch\.uint8"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.float64), r"in torch\.float32.*but got torch\.float64"),
        (torch.zeros(2, 3, 28, 28), r"of 32 × 32 px, the model's size, but got 28 × 28"),
        (torch.zeros(2, 3, 64, 64), r"of 32 × 32 px, the model's size, but got 64 × 64"),
    ],
    ids=["grey", "uint8", "float64", "28 px", "64 px"],
)
def test_the_packaged_backbone_refuses_images_with_the_mend(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_images(glyph_vit(), images)


class _Halved(SupervisedPlugin):
    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        for group in strategy.optimizer.param_groups:
            group["lr"] *= 0.5


@pytest.mark.parametrize(("schedule", "warnings"), [("cosine", 1), ("constant", 0)])
def test_rates_that_a_plugin_changes_in_vain_are_said_once(
    schedule: str, warnings: int, make_strategy: Any, class_benchmark: Any, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = make_strategy("fm_lora", lr_schedule=schedule, train_epochs=3, plugins=[_Halved()])
    with caplog.at_level(logging.WARNING, "avalanche_fmlora"):
        for experience in class_benchmark.train_stream[:2]:
            strategy.train(experience)
    said = [r for r in caplog.records if "lr_schedule='constant' to change them yourself" in r.getMessage()]
    assert len(said) == warnings


@pytest.mark.parametrize("eval_every", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["fm_lora", "ncm"])
def test_the_last_periodic_evaluation_is_of_the_final_model(
    name: str, eval_every: int, make_strategy: Any, class_benchmark: Any
) -> None:
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True))
    strategy = make_strategy(name, train_epochs=3, eval_every=eval_every, evaluator=evaluator)
    for experience in class_benchmark.train_stream[:2]:
        strategy.train(experience, eval_streams=[class_benchmark.test_stream])
        during = dict(strategy.evaluator.get_last_metrics())
        after = strategy.eval(class_benchmark.test_stream)
        assert {k: during[k] for k in after} == after


def test_gradients_in_fp16_are_true_for_plugins(make_strategy: Any, class_benchmark: Any) -> None:
    class Norms(SupervisedPlugin):
        def __init__(self) -> None:
            super().__init__()
            self.all: list[float] = []

        def before_update(self, strategy: Any, **kwargs: Any) -> None:
            params = [p for g in strategy.optimizer.param_groups for p in g["params"] if p.grad is not None]
            self.all.append(float(torch.nn.utils.clip_grad_norm_(params, 1.0)))

    firsts = []
    for precision in ("fp32", "fp16"):
        norms = Norms()
        options = {"precision": precision, "clip_grad_norm": None, "train_epochs": 1, "plugins": [norms]}
        strategy = make_strategy("linear_probe", **options)
        torch.manual_seed(0)
        strategy.train(class_benchmark.train_stream[0], shuffle=False)
        firsts.append(norms.all[0])
    assert firsts[1] == pytest.approx(firsts[0], rel=0.02)
