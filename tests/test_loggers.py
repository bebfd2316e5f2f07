"""Weights & Biases without a network: what the run's file holds is what Avalanche measured."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.evaluation.metric_results import AlternativeValues, MetricValue, TensorImage
from avalanche.evaluation.metrics import accuracy_metrics, confusion_matrix_metrics, forgetting_metrics
from avalanche.training.plugins import EvaluationPlugin
from PIL import Image

from avalanche_fmlora.loggers import X_AXIS, WeightsAndBiasesLogger

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed: pip install 'avalanche-fmlora[wandb]'"
)


class Run:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.finished = False
        self.config: dict[str, Any] = {}

    def define_metric(self, name: str, **options: Any) -> None:
        pass

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished = True


def values(*pairs: tuple[str, Any, int]) -> list[MetricValue]:
    return [MetricValue(None, name, value, x) for name, value, x in pairs]  # type: ignore[arg-type]


@needs_wandb
def test_values_of_a_moment_are_one_row() -> None:
    import wandb

    run = Run()
    log = WeightsAndBiasesLogger(run)  # type: ignore[arg-type]
    log.log_metrics(values(("a", 0.5, 3), ("b", torch.tensor(2.0), 3), ("c", {"x": 1, "y": 2}, 3), ("d", 7, 4)))
    assert run.rows == [{X_AXIS: 3, "a": 0.5, "b": 2.0, "c/x": 1, "c/y": 2}, {X_AXIS: 4, "d": 7}]
    picture, matrix = Image.new("RGB", (2, 2)), torch.tensor([[1, 2], [3, 4]])
    log.log_metrics(
        values(
            ("picture", picture, 5),
            ("tensor", TensorImage(torch.zeros(3, 8, 6)), 5),
            ("matrix", matrix, 5),
            ("either", AlternativeValues(matrix, 1.0), 5),
            ("text", "no place for it", 5),
        )
    )
    row = run.rows[-1]
    assert isinstance(row["picture"], wandb.Image)
    assert isinstance(row["tensor"], wandb.Image)
    assert row["tensor"].image.size == (6, 8)
    assert row["matrix"].data == row["either"].data == [[1, 2], [3, 4]]
    assert "text" not in row
    log.close()
    assert not run.finished, "a run of the user's stays open"
    with pytest.raises(ValueError, match=r"both: \['project'\]"):
        WeightsAndBiasesLogger(run, project="x")  # type: ignore[arg-type]


@needs_wandb
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_an_offline_run_holds_what_avalanche_measured(
    make_strategy: Any, class_benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = WeightsAndBiasesLogger(project="tests", dir=str(tmp_path), mode="offline")
    evaluator = EvaluationPlugin(
        accuracy_metrics(epoch=True, experience=True, stream=True),
        forgetting_metrics(experience=True),
        confusion_matrix_metrics(stream=True, save_image=False),
        loggers=[log],
    )
    strategy = make_strategy("seq_lora", evaluator=evaluator)
    for experience in class_benchmark.train_stream[:2]:
        strategy.train(experience)
        strategy.eval(class_benchmark.test_stream)
    last = strategy.evaluator.get_last_metrics()
    (name,) = [key for key in last if key.startswith("Top1_Acc_Stream")]
    summary = {key: log.run.summary.get(key) for key in (name, X_AXIS)}
    config = dict(log.run.config)
    log.close()
    assert summary == {name: pytest.approx(last[name]), X_AXIS: strategy.clock.train_iterations}
    assert (config["method"], config["rank"]) == ("SeqLoRAStrategy", strategy.config.rank)
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # wandb's own process writes, on a busy machine later than `finish` returns
    while name.encode() not in written.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert name.encode() in written.read_bytes()
    table = next(tmp_path.glob("wandb/offline-run-*/files/media/table/**/*.table.json"))
    assert len(json.loads(table.read_text())["data"]) >= 4


def test_avalanches_tensorboard_logger_writes_what_was_measured(
    make_strategy: Any, class_benchmark: Any, tmp_path: Path
) -> None:
    from avalanche.logging import TensorboardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorboardLogger(str(tmp_path))
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True, stream=True), loggers=[board])
    strategy = make_strategy("seq_lora", evaluator=evaluator)
    strategy.train(class_benchmark.train_stream[0])
    strategy.eval(class_benchmark.test_stream)
    last = strategy.evaluator.get_last_metrics()
    board.writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    written = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    wanted = {name: value for name, value in last.items() if "test_stream" in name}
    assert len(wanted) == 4
    assert {name: written[name] for name in wanted} == pytest.approx(wanted)


def test_without_wandb_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"avalanche-fmlora\[wandb\]"):
        WeightsAndBiasesLogger(project="x")
