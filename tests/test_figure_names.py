"""Figures and tables whose rows have odd names: equal ones, signs of mathematics, endings in capitals."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner
from made_records import make

from avalanche_fmlora.cli import main
from avalanche_fmlora.results.figures import draw, forgetting
from avalanche_fmlora.results.grouping import runs_of
from avalanche_fmlora.results.record import write_record


def test_a_label_that_is_its_methods_name_is_told_from_no_label() -> None:
    records = [make(method="ncm", order=0), make(method="ncm", label="ncm", order=1)]
    assert {run.name for run in runs_of(records)} == {"ncm", "ncm ncm"}


def test_rows_of_one_name_have_bars_of_their_own() -> None:
    records = [make(0.25, method="ncm", label="x"), make(0.75, method="ncm", label="ncm x", options={"rank": 2})]
    assert [run.name for run in runs_of(records)] == ["ncm x"] * 2
    bars = forgetting(records).axes[-1].patches
    assert sorted(bar.get_width() for bar in bars) == sorted(r["metrics"]["forgetting"] for r in records)
    assert len({bar.get_width() for bar in bars}) == 2


def test_a_label_is_text(tmp_path: Path) -> None:
    """Two dollars are no formula, whose unknown commands would stop the drawing."""
    records = [make(method="ncm", label=r"costs $5 \nosuch$"), make(method="fm_lora")]
    assert not [error for error in draw(records, ["accuracy", "forgetting"]).values() if isinstance(error, str)]
    for record in records:
        write_record(record, tmp_path / "records")
    done = CliRunner().invoke(main, ["plot", str(tmp_path), "--to", str(tmp_path / "figure.PNG")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "figure.PNG").read_bytes().startswith(b"\x89PNG")
