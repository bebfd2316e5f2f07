"""throughput.py: rows that are measured alone leave the others, and what was measured of the input is within bounds."""

from __future__ import annotations

import argparse
import csv
import importlib
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("throughput")


def test_only_some_rows_are_replaced(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.csv"
    out.write_text("what,ratio,bound\nold,1.000,1.1\nslow,3.000,\n")

    def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
        return [{"what": "slow", "ratio": 2.0, "bound": ""}, {"what": "new", "ratio": 0.00456, "bound": 0.2}]

    monkeypatch.setattr(script, "GROUPS", {"input": measured, "training": None})
    monkeypatch.setattr("sys.argv", ["throughput.py", "--only", "input", "--out", str(out)])
    script.main()
    assert out.read_text() == "what,ratio,bound\nold,1.000,1.1\nslow,2.000,\nnew,0.0046,0.2\n"
    monkeypatch.setattr(script, "GROUPS", {"input": measured})
    monkeypatch.setattr("sys.argv", ["throughput.py", "--out", str(out)])
    script.main()
    assert out.read_text() == "what,ratio,bound\nslow,2.000,\nnew,0.0046,0.2\n"


def test_photos_are_of_an_ordinary_size(script: Any) -> None:
    encoded = script.photos(2)
    assert [Image.open(io.BytesIO(data)).size for data in encoded] == [(500, 375)] * 2
    assert 20_000 < len(encoded[0]) < 200_000


def test_the_input_keeps_up_with_a_vit_b16_as_measured() -> None:
    with (BENCHMARKS / "results" / "throughput.csv").open(newline="") as file:
        rows = {row["what"].partition(" ")[0]: row for row in csv.DictReader(file) if "224 px" in row["what"]}
    assert set(rows) == {"reading", "share", "host"}
    assert float(rows["reading"]["ratio"]) <= float(rows["reading"]["bound"]) == 0.2
    assert float(rows["share"]["ratio"]) <= float(rows["share"]["bound"]) == 0.05
    assert float(rows["host"]["ratio"]) <= float(rows["host"]["bound"]) == 0.5
