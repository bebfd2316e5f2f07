"""Stopped and resumed from a checkpoint, every method ends as one that never stopped, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
from avalanche.training.plugins import EvaluationPlugin

from avalanche_fmlora import CheckpointPlugin
from avalanche_fmlora.strategies.registry import methods

METHODS = sorted(methods())
SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "everything": (
        "fm_lora",
        {"classifier": "class_mean", "row_transport": True, "prompt_length": 2, "stability": 0.1},
    ),
    "per layer": ("fm_lora", {"rank_selection": {"per_layer": True}}),
    "slow bases": ("fm_lora", {"bases": "slow", "optimizer": "sgd"}),
    "whitened": ("ncm", {"whitening": 0.5, "whitening_covariance": "running"}),
    "fp16": ("seq_lora", {"precision": "fp16"}),
    "class means": ("seq_lora", {"classifier": "class_mean", "row_transport": True}),
}
CASES = {**{name: (name, {}) for name in METHODS if name != "joint"}, **SPECIAL}


class _Stop(SupervisedPlugin):
    """Breaks off in the middle of an experience."""

    checkpointed = False

    def __init__(self, experience: int | None) -> None:
        super().__init__()
        self.experience = experience

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.experience.current_experience == self.experience:
            raise KeyboardInterrupt

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.train_epochs == 0:
            self.after_training_epoch(strategy)


def _evaluator() -> EvaluationPlugin:
    return EvaluationPlugin(
        accuracy_metrics(epoch=True, experience=True, stream=True),
        forgetting_metrics(experience=True, stream=True),
        loggers=[],
    )


def _run(case: str, folder: Path | None, make_strategy: Any, benchmark: Any, stop: int | None = None) -> Any:
    name, options = CASES[case]
    plugins = [] if folder is None else [CheckpointPlugin(folder)]
    strategy = make_strategy(name, train_epochs=2, evaluator=_evaluator(), plugins=[*plugins, _Stop(stop)], **options)
    torch.manual_seed(0)
    start = 0 if folder is None else plugins[0].resume(strategy)
    for experience in benchmark.train_stream[start:]:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
    return strategy


def _assert_same(one: Any, other: Any, place: str = "") -> None:
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, place
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            _assert_same(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            _assert_same(a, b, f"{place}/{i}")
    else:
        assert one == other, place


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_as_one_that_never_stopped(
    case: str, make_strategy: Any, class_benchmark: Any, tmp_path: Path
) -> None:
    whole = _run(case, None, make_strategy, class_benchmark)
    for stop in (1, 2):  # the second time a run that has been resumed is stopped
        with pytest.raises(KeyboardInterrupt):
            _run(case, tmp_path, make_strategy, class_benchmark, stop)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
    resumed = _run(case, tmp_path, make_strategy, class_benchmark)
    _assert_same(resumed.training_state(), whole.training_state())
    assert resumed.clock.train_exp_counter == 3
