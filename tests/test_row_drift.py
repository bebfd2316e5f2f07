"""`benchmarks/row_drift.py` measures what it says."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from avalanche_fmlora.config import make_run
from avalanche_fmlora.experiment import make_backbone, make_benchmark, make_strategy
from avalanche_fmlora.modules.class_rows import ridge_transport


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("row_drift")


def test_the_error_is_that_of_moved_means_on_images_of_the_past(script: Any, photos: Path) -> None:
    """Twin of the first row, the experience's own images alone, from a second run."""
    options: dict[str, Any] = {
        "method": "fm_lora",
        "benchmark": {"name": "image_folder", "path": photos, "n_experiences": 2},
        "backbone": {"name": "test_vit", "pretrained": False, "image_size": 32},
        "training": {"epochs": 2, "batch_size": 8},
        "method_options": {"rank": 4, "lr_core": 0.05},
    }
    config = make_run(options)
    first, *others, last = script.run(config, 1, None)

    backbone = make_backbone(config, None)
    benchmark = make_benchmark(config, backbone, None)
    torch.manual_seed(config.seed)
    strategy = make_strategy(config, backbone, "cpu", 2)
    old, new = benchmark.train_stream
    strategy.train(old)
    taken = []
    for _ in range(2):
        strategy.model.eval()
        z, y = script.encoded(strategy, old.dataset)
        means = torch.stack([F.normalize(z[y == c].mean(0), dim=0) for c in y.unique()])
        taken.append((means, script.encoded(strategy, new.dataset)[0], z))
        if len(taken) == 1:
            strategy.train(new)
    (start, *befores), (end, *afters) = taken
    for row, before, after in zip((first, last), befores, afters, strict=True):
        for ridge in script.RIDGES:
            moved = F.normalize(start + start @ ridge_transport(before, after, ridge), dim=-1)
            expected = ((moved - end) ** 2).sum() / ((start - end) ** 2).sum()
            assert float(row[f"error_{ridge:g}"]) == pytest.approx(expected.item(), abs=2e-3)
    assert (first["moved"], first["cosine"]) == (0, "")
    assert [row["moved"] for row in others] == [int(v.share * len(befores[0])) // 2 * 2 for v in script.VARIANTS[1:]]
    assert all(float(row["cosine"]) > float(row["cosine_before"]) for row in others)


def test_rows_are_written_and_printed(
    script: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"benchmark: {{name: image_folder, path: {photos}, n_experiences: 2}}\n"
        "backbone: {name: test_vit, pretrained: false, image_size: 64}\ntraining: {epochs: 1, batch_size: 8}\n"
    )
    monkeypatch.setattr(script, "VARIANTS", script.VARIANTS[:2])
    arguments = ["--config", str(config), "--image-size", "32", "--experience", "1", "--out", str(tmp_path / "a.csv")]
    monkeypatch.setattr("sys.argv", ["row_drift.py", *arguments, "fm_lora rank=4"])
    script.main()
    assert len(capsys.readouterr().out.splitlines()) == 3
    monkeypatch.setattr("sys.argv", ["row_drift.py", "--out", str(tmp_path / "a.csv")])
    script.main()
    assert capsys.readouterr().out.strip() == script.table(tmp_path / "a.csv")
    assert len(script.table(tmp_path / "a.csv").splitlines()) == 2 + 3


def test_the_table_shows_each_row(script: Any, tmp_path: Path) -> None:
    known = dict.fromkeys(script.FIELDS, "x") | dict.fromkeys(script.ERRORS, "0.25")
    seen = {"images": "current", "moved": 30, "cosine_before": "0.500", "cosine": "0.800"}
    rows = [known | {"images": "past", "moved": 0}, known | seen]
    script.write(tmp_path / "drift.csv", script.FIELDS, rows)
    lines = script.table(tmp_path / "drift.csv").splitlines()[2:]
    assert lines[0] == "| x | *all of the past* | 0 | – | – | – | 25 | 25 | 25 | 25 |"
    assert lines[1] == "| x | the experience's | 30 | x | x | 0.500 → 0.800 | 25 | 25 | 25 | 25 |"
