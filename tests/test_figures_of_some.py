"""Figures of some methods: named and drawn as among all, so that figures of the same records agree."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from made_records import make

from avalanche_fmlora.cli import main
from avalanche_fmlora.results.figures import KINDS, accuracy_over_experiences, draw
from avalanche_fmlora.results.figures.style import series_of
from avalanche_fmlora.results.record import Record, write_record


def ranks() -> list[Record]:
    return [make(method="fm_lora", options={"rank": rank}) for rank in (4, 8, 16)] + [make(method="ncm")]


def test_names_and_looks_are_those_among_all() -> None:
    records = ranks()
    among_all = {one.name: one.look for one in series_of(records)}
    only = {records[1]["id"], records[3]["id"]}
    some = series_of(records, only)
    assert {one.name: one.look for one in some} == {name: among_all[name] for name in ("fm_lora rank=8", "ncm")}
    colours = {line.get_color() for line in accuracy_over_experiences(records, only).axes[0].lines}
    assert colours == {among_all["fm_lora rank=8"].colour, among_all["ncm"].colour}
    with pytest.raises(ValueError, match="among those that are to be drawn"):
        series_of(records, set())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws_some(kind: str) -> None:
    records = ranks()
    assert not isinstance(draw(records, [kind], {records[2]["id"]})[kind], str)


def test_the_command_keeps_names_and_other_protocols_out(tmp_path: Path) -> None:
    for one in (*ranks(), make(method="l2p", training={"epochs": 9})):
        write_record(one, tmp_path / "records")
    arguments = ["plot", str(tmp_path), "--format", "svg", "--methods", "fm_lora rank=8,ncm"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (written,) = tmp_path.glob("*.svg")
    assert "fm_lora rank=8" in written.read_text()


def test_layers_have_whole_ticks() -> None:
    made = make(method="fm_lora")
    rows = [{**row, "ranks_per_layer": [2 + t, 4]} for t, row in enumerate(made["experiences"])]
    made["experiences"] = rows  # type: ignore[typeddict-item]
    axes = KINDS["rank"]([made], None).axes[1]
    assert "layer of" in axes.get_ylabel()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "1"]
