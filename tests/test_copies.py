"""Strategies that are copied or pickled, between experiences and within one."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from torch.utils.data import TensorDataset

from avalanche_fmlora import CheckpointPlugin
from avalanche_fmlora.data.loading import TimedLoader
from avalanche_fmlora.strategies.registry import methods

CONTINUAL = sorted(name for name, cls in methods().items() if not cls.joint)


def _same(one: Any, other: Any) -> bool:
    states = [strategy.model.adapter_state() for strategy in (one, other)]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("name", CONTINUAL)
def test_a_trained_strategy_is_pickled_without_its_data_and_goes_on(
    name: str, make_strategy: Any, class_benchmark: Any
) -> None:
    strategy = make_strategy(name, train_epochs=1)
    strategy.train(class_benchmark.train_stream[0])
    copied = pickle.loads(pickle.dumps(strategy))
    for each in (strategy, copied):
        torch.manual_seed(3)
        each.train(class_benchmark.train_stream[1])
    assert _same(strategy, copied)


def test_joint_training_lets_go_of_its_data(make_strategy: Any, class_benchmark: Any) -> None:
    strategy = make_strategy("joint", train_epochs=1)
    strategy.train(class_benchmark.train_stream)
    assert _same(strategy, pickle.loads(pickle.dumps(strategy)))


def test_joint_training_evaluates_all_that_it_trained_on(make_strategy: Any, class_benchmark: Any) -> None:
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True))
    strategy = make_strategy("joint", train_epochs=1, eval_every=0, evaluator=evaluator)
    results = strategy.train(class_benchmark.train_stream)
    assert sum(name.startswith("Top1_Acc_Exp/eval_phase/train_stream") for name in results) == 3
    with pytest.raises(ValueError, match="the experiences to train on but got none: pass the whole stream"):
        make_strategy("joint").train([])


def test_copies_of_copies_train_their_own_tensors_only(make_strategy: Any, class_benchmark: Any) -> None:
    strategy = make_strategy("fm_lora", train_epochs=1)
    for experience in class_benchmark.train_stream:
        strategy = copy.deepcopy(strategy)
        strategy.plugins.append(_Groups())
        strategy.train(experience)
        assert strategy.plugins.pop().strangers == 0


class _Groups(SupervisedPlugin):
    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        trained = {id(p) for ps in strategy.model.parameter_groups().values() for p in ps}
        held = [p for group in strategy.optimizer.param_groups for p in group["params"]]
        self.strangers = sum(id(p) not in trained for p in held)


def test_a_checkpoint_of_a_copy_is_resumed(make_strategy: Any, class_benchmark: Any, tmp_path: Path) -> None:
    first, second = (make_strategy("fm_lora", train_epochs=1, plugins=[CheckpointPlugin(tmp_path)]) for _ in range(2))
    first.train(class_benchmark.train_stream[0])
    copied = copy.deepcopy(first)
    copied.train(class_benchmark.train_stream[1])
    plugin = next(p for p in second.plugins if isinstance(p, CheckpointPlugin))
    assert plugin.resume(second) == 2
    assert _same(copied, second)


@pytest.mark.parametrize("moment", ["before_forward", "after_forward", "before_backward", "after_backward"])
@pytest.mark.parametrize("name", ["fm_lora", "dual_prompt"])
def test_a_model_is_copied_at_any_moment_of_a_step(
    moment: str, name: str, make_strategy: Any, class_benchmark: Any
) -> None:
    """An average of models, say, while FM-LoRA's mask hangs on the graph of its search; its values are kept."""
    masks: list[tuple[Any, Any]] = []

    def copy_it(plugin: Any, strategy: Any, **kwargs: Any) -> None:
        pairs = [model.lora.layers[0].mask if name == "fm_lora" else None for model in _and_its_copy(strategy.model)]
        masks.append((pairs[0], pairs[1]))

    plugin = type("Copies", (SupervisedPlugin,), {moment: copy_it})()
    make_strategy(name, train_epochs=2, plugins=[plugin]).train(class_benchmark.train_stream[0])
    assert len(masks) == 4
    searched = [pair for pair in masks if pair[0] is not None]
    assert bool(searched) == (name == "fm_lora")
    assert all(torch.equal(mask, copied) and copied.is_leaf for mask, copied in searched)


def _and_its_copy(model: Any) -> tuple[Any, Any]:
    return model, copy.deepcopy(model)


def test_a_timed_loader_is_copied() -> None:
    copied = copy.copy(TimedLoader([1, 2], lambda seconds: None))
    assert list(copied) == [1, 2]
    assert not hasattr(copied, "dataset")


def test_joint_training_sees_each_image_once_an_epoch_whatever_its_task(make_strategy: Any) -> None:
    """Avalanche's loader repeats the images of small tasks, and refuses more tasks than a batch has images."""
    from avalanche.benchmarks import nc_benchmark

    images, labels = torch.randn(56, 3, 16, 16), torch.arange(12).repeat_interleave(4)
    data = TensorDataset(images, torch.cat([torch.zeros(8, dtype=torch.long), labels]))
    data.targets = data.tensors[1].tolist()
    stream = nc_benchmark(data, data, n_experiences=12, task_labels=True, shuffle=False).train_stream
    seen: list[int] = []

    class Count(SupervisedPlugin):
        def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            seen.append(len(strategy.mb_x))

    strategy = make_strategy("joint", train_epochs=2, plugins=[Count()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy.train(stream)
    assert sum(seen) == 2 * len(images)
