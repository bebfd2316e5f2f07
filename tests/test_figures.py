from __future__ import annotations

import copy
from pathlib import Path

import pytest

from avalanche_fmlora.results.figures import accuracy_over_experiences, save
from avalanche_fmlora.results.record import blank_record


def record(method: str, matrix: list[list[float | None]], order: int = 0) -> dict:
    config = {"method": method, "method_options": {}, "benchmark": {"name": "x"}, "backbone": {}, "training": {}}
    made = blank_record({**config, "seed": 0, "class_order_seed": order, "label": None})
    return {**copy.deepcopy(made), "status": "finished", "accuracy_matrix": matrix}


def test_lines_are_mean_accuracies_over_what_was_seen(tmp_path: Path) -> None:
    records = [
        record("a", [[1.0, None], [0.5, 0.9]]),
        record("a", [[0.8, None], [0.3, 0.7]], order=1),
        record("joint", [[None, None], [0.9, 0.95]]),
    ]
    figure = accuracy_over_experiences(records)  # type: ignore[arg-type]
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(lines["a"]) == pytest.approx([0.9, 0.6])
    assert list(lines["joint (all data at once)"]) == pytest.approx([0.925, 0.925])
    assert save(figure, tmp_path / "f" / "a.png").stat().st_size > 1000


def test_records_of_several_benchmarks_are_refused() -> None:
    other = record("a", [[1.0]])
    other["benchmark"]["name"] = "y"
    with pytest.raises(ValueError, match="folder of its own"):
        accuracy_over_experiences([record("a", [[1.0]]), other])  # type: ignore[arg-type,list-item]
    with pytest.raises(ValueError, match="none"):
        accuracy_over_experiences([])
