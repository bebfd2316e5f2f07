"""The rule that a method predicts with scores in `benchmarks/prediction_rules.py` what a run of the method scores."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from avalanche_fmlora.config import make_run
from avalanche_fmlora.experiment import run
from avalanche_fmlora.modules.class_rows import class_means, within_class_covariance


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("prediction_rules")


@pytest.mark.parametrize(
    ("whitening", "covariance", "rule"),
    [
        (None, "current", "cosine"),
        (0.3, "current", "whitened, current, λ=0.3"),
        (1.0, "running", "whitened, running, λ=1"),
        (0.3, "secant", "whitened, secant"),
    ],
)
def test_a_rule_is_what_a_run_with_it_scores(
    script: Any, photos: Path, whitening: Any, covariance: str, rule: str
) -> None:
    options: dict[str, Any] = {
        "method": "fm_lora",
        "benchmark": {"name": "image_folder", "path": photos, "n_experiences": 2},
        "backbone": {"name": "test_vit", "pretrained": False, "image_size": 32},
        "training": {"epochs": 1, "batch_size": 8},
    }
    method_options = {"rank": 4, "whitening": whitening, "whitening_covariance": covariance}
    config = make_run({**options, "method_options": method_options})
    rows = {row["rule"]: row for row in script.run(config, None)}
    assert len(rows) == 3 + 2 * len(script.SHRINKAGES) + (covariance == "secant")
    metrics = run(config)["metrics"]
    for name in script.METRICS:
        assert float(rows[rule][name]) == pytest.approx(metrics[name], abs=6e-5)  # type: ignore[literal-required]


def test_rules_that_see_all_images_are_those_of_one_experience_with_all_of_them(script: Any) -> None:
    features, labels = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    true, _ = class_means(features, labels, torch.arange(4))
    all_at_once = script.prediction_rows(true[None], *[within_class_covariance(features, labels)] * 2)
    moved = torch.eye(4, 6)
    rows = script.all_seeing_rows(moved, features, labels)
    torch.testing.assert_close(rows["covariance and means of all images"], all_at_once["whitened, current, λ=0.1"])
    twin = script.prediction_rows(moved[None], *[within_class_covariance(features, labels)] * 2)
    torch.testing.assert_close(rows["covariance of all images"], twin["whitened, current, λ=0.1"])


def test_rows_of_the_same_run_are_replaced(script: Any, tmp_path: Path) -> None:
    row = dict.fromkeys(script.FIELDS, "0")
    path = tmp_path / "rules.csv"
    script.write(path, script.FIELDS, [{**row, "method": "ncm", "rule": "a"}, {**row, "method": "ncm", "rule": "b"}])
    script.write(path, script.FIELDS, [{**row, "method": "fm_lora", "rule": "a"}])
    script.write(path, script.FIELDS, [{**row, "method": "ncm", "rule": "c"}])
    with path.open() as file:
        assert [(r["method"], r["rule"]) for r in csv.DictReader(file)] == [("fm_lora", "a"), ("ncm", "c")]
    script.write(path, script.FIELDS, [{**row, "method": "ncm", "run": "other settings", "rule": "c"}])
    kept = path.read_bytes()
    assert kept.count(b"ncm") == 2
    with pytest.raises(ValueError, match="not in fieldnames"):
        script.write(path, script.FIELDS[:-1], [row])
    assert path.read_bytes() == kept


def test_a_run_is_named_by_its_whole_configuration(script: Any) -> None:
    few, many = ({"benchmark": {"name": "split_glyphs", "n_experiences": n}, "method": "ncm"} for n in (2, 4))
    names = [importlib.import_module("one_run").run_fields(make_run(o), "split_glyphs") for o in (few, many, few)]
    assert names[0] == names[2] != names[1]
    assert tuple(names[0]) == importlib.import_module("one_run").KEY


def test_without_methods_and_without_rows_it_says_what_to_name(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["prediction_rules.py", "--out", str(tmp_path / "none.csv")])
    with pytest.raises(SystemExit, match=r"no .*none.csv to print: name methods"):
        script.main()
