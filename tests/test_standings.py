"""The table of where FM-LoRA stands: the best of the others, whom it beats beyond chance, and the distance closed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from made_records import make

from avalanche_fmlora.results.record import write_record


def test_where_a_method_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    standings = importlib.import_module("standings")
    final = {
        "fm_lora": (0.75, 0.875, 1.0),
        "ncm": (0.25, 0.375, 0.5),
        "l2p": (0.5, 1.0, 0.75),
        "joint": (1.0, 1.0),
    }
    for method, accuracies in final.items():
        for order, accuracy in enumerate(accuracies):
            write_record(make(accuracy, method=method, order=order, joint=method == "joint"), tmp_path)
            if method == "l2p":
                write_record(make(0.0, method=method, order=order, options={"rank": 9}), tmp_path)
    write_record(make(1.0, method="ncm", label="a variant"), tmp_path)
    ours, best, lead, higher, forgets_less, joint, closed = standings._cells(tmp_path)
    assert ours.main.startswith("56.2"), "the mean over two experiences, the second one 25 % for all"
    assert best.main.startswith("`l2p` 50.0")
    assert lead.main.startswith("+6.2 [")
    assert not lead.bold
    assert higher.main == forgets_less.main == "1 of 2, not `l2p`"
    assert joint.main.startswith("62.5")
    assert closed.main == "25 %", "on the two orders of joint training: 53.1 between 50 and 62.5"


@pytest.mark.parametrize(
    ("beaten", "said"),
    [("abc", "all 3"), ("ab", "2 of 3, not `c`"), ("b", "1 of 3: `b`"), ("", "none of 3")],
)
def test_the_shorter_list_is_named(monkeypatch: pytest.MonkeyPatch, beaten: str, said: str) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    standings = importlib.import_module("standings")
    pairs = {m: {"excludes_zero": m in beaten, "difference_mean": 0.1} for m in "abc"}
    assert standings._beaten("abc", pairs.__getitem__, 1).main == said
