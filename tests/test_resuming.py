"""Runs that are killed and started again end with the record of a run that was never interrupted."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.core import SupervisedPlugin
from click.testing import CliRunner
from PIL import Image

from avalanche_fmlora import experiment
from avalanche_fmlora.backbones import Backbone
from avalanche_fmlora.checkpoint import CheckpointFolder
from avalanche_fmlora.cli import main
from avalanche_fmlora.config import make_run
from avalanche_fmlora.results.record import Record, find_record, read_records
from avalanche_fmlora.strategies.registry import methods
from avalanche_fmlora.sweep import run_and_write

TIMES = {"train_s", "eval_s", "train_images_per_s", "peak_memory_bytes", "data_wait_s", "data_wait_share"}
OPTIONS: dict[str, dict[str, Any]] = {
    "fm_lora": {"rank": 4, "prompt_length": 2, "classifier": "class_mean", "row_transport": True},
    "dual_prompt": {"g_blocks": (0,), "e_blocks": (1,)},
    "coda_prompt": {"blocks": (0, 1), "pool_size": 6},
}


class _Stop(SupervisedPlugin):
    """Stands in for the progress bar; breaks off in an experience, when training ends."""

    checkpointed = False
    at: int | None = None

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.experience.current_experience == self.at:
            raise RuntimeError("the power is gone")


@pytest.fixture
def strategies(make_vit: Any, class_benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs are around a tiny ViT on tiny data; the list gets their strategies."""
    made: list[Any] = []
    real = experiment.make_strategy

    def make_strategy(*arguments: Any) -> Any:
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(
        experiment, "make_backbone", lambda *_: Backbone(make_vit(), "tiny", "0" * 64, 16, (0.5,) * 3, (0.5,) * 3)
    )
    monkeypatch.setattr(experiment, "make_benchmark", lambda *_: class_benchmark)
    monkeypatch.setattr(experiment, "make_strategy", make_strategy)
    monkeypatch.setattr(experiment, "ProgressPlugin", _Stop)
    monkeypatch.setattr(_Stop, "at", None)
    return made


def _config(method: str, **options: Any) -> Any:
    own = OPTIONS.get(method, {})
    return make_run(
        {"method": method, "method_options": {**own, **options}, "training": {"epochs": 2, "batch_size": 8}, "seed": 3}
    )


def _facts(record: Any) -> Any:
    """A record without its times and memory, as JSON has it."""
    plain = json.loads(json.dumps(record))
    for part in (plain["cost"], *plain["experiences"]):
        for name in TIMES & part.keys():
            part[name] = None
    return {k: v for k, v in plain.items() if k not in ("started_at", "finished_at")}


def _disturb() -> None:
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


@pytest.mark.parametrize("method", sorted(methods()))
def test_a_resumed_run_has_the_same_record(
    method: str, strategies: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    config = _config(method)
    whole = experiment.run(config)
    monkeypatch.setattr(_Stop, "at", 0 if methods()[method].joint else 2)
    failed = run_and_write(config, tmp_path, "cpu", 1, None, progress=True)
    assert failed["error"] == "RuntimeError: the power is gone"
    _disturb()
    monkeypatch.setattr(_Stop, "at", None)
    record = run_and_write(config, tmp_path, "cpu", 1, None)
    assert _facts(record) == _facts(whole)
    assert ("Going on after 2 finished experiences" in caplog.text) is (not methods()[method].joint)
    assert find_record(tmp_path, config.identity()) == json.loads(json.dumps(record))
    assert not list(tmp_path.rglob("*.safetensors")), "checkpoints go when there is a record"
    first, last = (s.model.state_dict() for s in (strategies[0], strategies[-1]))
    assert first.keys() == last.keys()
    assert not [k for k in first if not torch.equal(first[k], last[k])]


def test_times_are_sums_over_the_parts(strategies: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config("linear_probe")
    monkeypatch.setattr(_Stop, "at", 2)
    monkeypatch.setattr(experiment, "_now", lambda: "2026-01-01T00:00:00+00:00")
    with pytest.raises(RuntimeError):
        experiment.run(config, checkpoint_dir=tmp_path, progress=True)
    _, state = CheckpointFolder(tmp_path).latest(_identity(tmp_path)) or (0, {})
    kept = state["loop"]["experiences"]
    monkeypatch.setattr(_Stop, "at", None)
    monkeypatch.setattr(experiment, "_now", lambda: "2026-01-02T00:00:00+00:00")
    record = experiment.run(config, checkpoint_dir=tmp_path)
    assert [e["train_s"] for e in record["experiences"]][:2] == [e["train_s"] for e in kept]
    assert record["cost"]["train_s"] == sum(e["train_s"] for e in record["experiences"])
    assert (record["started_at"], record["finished_at"]) == ("2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00")
    assert record["cost"]["peak_memory_bytes"] >= state["peak_memory_bytes"] > 0


def _identity(folder: Path) -> Any:
    import safetensors

    with safetensors.safe_open(max(folder.glob("*.safetensors")), "pt") as file:
        return json.loads(file.metadata()["identity"])


def test_a_damaged_checkpoint_is_left_for_the_one_before(
    strategies: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    config = _config("seq_lora")
    whole: Record = experiment.run(config)
    monkeypatch.setattr(_Stop, "at", 2)
    with pytest.raises(RuntimeError):
        experiment.run(config, checkpoint_dir=tmp_path, progress=True)
    first, second = CheckpointFolder(tmp_path).files().values()
    second.write_bytes(second.read_bytes()[:-100])
    monkeypatch.setattr(_Stop, "at", 1)
    with pytest.raises(RuntimeError):
        experiment.run(config, checkpoint_dir=tmp_path, progress=True)
    assert "experience-0002.safetensors is no whole safetensors file" in caplog.text
    assert "Going on after 1 finished experiences" in caplog.text
    caplog.clear()
    first.write_bytes(b"")
    monkeypatch.setattr(_Stop, "at", None)
    assert _facts(experiment.run(config, checkpoint_dir=tmp_path)) == _facts(whole)
    assert "the run starts from the beginning" in caplog.text


def test_checkpoints_of_other_data_are_refused(
    strategies: list[Any], make_class_benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    config = _config("seq_lora")
    monkeypatch.setattr(_Stop, "at", 1)
    with pytest.raises(RuntimeError):
        experiment.run(config, checkpoint_dir=tmp_path, progress=True)
    monkeypatch.setattr(_Stop, "at", None)
    other = make_class_benchmark(per_class=7)
    monkeypatch.setattr(experiment, "make_benchmark", lambda *_: other)
    record = experiment.run(config, checkpoint_dir=tmp_path)
    assert "is a checkpoint of something else: it has data = " in caplog.text
    assert _facts(record) == _facts(experiment.run(config))


_KILLS_ITSELF = """
import os, signal
from avalanche_fmlora.plugins import progress

class Stop(progress.ProgressPlugin):
    def after_training_epoch(self, strategy, **kwargs):
        if strategy.experience.current_experience == 2:
            os.kill(os.getpid(), signal.SIGKILL)

progress.ProgressPlugin = Stop
"""


def test_a_killed_process_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command, after SIGKILL in the third experience: it says so, and the record is the whole run's."""
    _write_images(tmp_path / "images")
    command = (
        f"run fm_lora --benchmark image_folder --path {tmp_path / 'images'} --n-experiences 3 --backbone test_vit "
        "--backbone.pretrained false --image-size 32 --epochs 2 --batch-size 8 --rank 4 --threads 1 --out"
    ).split()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def fmlora(code: str) -> subprocess.CompletedProcess[str]:
        code = f"{code}\nfrom avalanche_fmlora.cli import main\nmain({[*command, 'runs']!r})"
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)

    killed = fmlora(_KILLS_ITSELF)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not list((tmp_path / "runs" / "records").glob("*.json"))
    resumed = fmlora("")
    assert resumed.returncode == 0, resumed.stderr
    assert "Going on after 2 finished experiences" in resumed.stderr
    whole = CliRunner().invoke(main, [*command, str(tmp_path / "whole")])
    assert whole.exit_code == 0, whole.stderr
    one, other = (read_records(tmp_path / out / "records")[0] for out in ("runs", "whole"))
    assert _facts(one) == _facts(other)


def _write_images(root: Path) -> None:
    """6 classes of 4 training and 2 test images, 32 px."""
    rng = np.random.default_rng(0)
    for k in range(6):
        for split, count in (("train", 4), ("test", 2)):
            folder = root / split / f"class {k}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(40 * k + rng.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
