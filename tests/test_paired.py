"""Paired differences against scipy's own paired t-test, who is best, and what is said of records that do not match."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made_records import make

from avalanche_fmlora.cli import main
from avalanche_fmlora.cli.common import show
from avalanche_fmlora.comparison import one_line
from avalanche_fmlora.results.grouping import JOINT, STATISTICS
from avalanche_fmlora.results.paired import METRICS
from avalanche_fmlora.results.record import file_name, write_record
from avalanche_fmlora.results.remarks import remarks
from avalanche_fmlora.results.table import (
    paired_frame,
    paired_rows,
    render,
    render_paired,
    runs_frame,
    summary_rows,
    write_csvs,
)


def row(records: list[Any], method: str, metric: str = METRICS[0], reference: str | None = None) -> dict[str, Any]:
    (found,) = [r for r in paired_rows(records, reference) if (r["method"], r["metric"]) == (method, metric)]
    return found


def test_intervals_are_those_of_the_paired_t_test() -> None:
    from scipy.stats import ttest_rel

    rng = random.Random(0)
    ours, theirs = ([rng.random() for _ in range(5)] for _ in range(2))
    records = [make(a, method="fm_lora", order=o) for o, a in enumerate(ours)]
    records += [make(b, method="ncm", order=o) for o, b in enumerate(theirs)]
    for metric in METRICS:
        expected = ttest_rel(
            *([r["metrics"][metric] for r in records if r["config"]["method"] == m] for m in ("fm_lora", "ncm"))
        )
        if metric == "learning_accuracy":  # equal in all runs
            assert (row(records, "ncm", metric)["low"], row(records, "ncm", metric)["excludes_zero"]) == (0.0, False)
            continue
        interval = expected.confidence_interval(0.95)
        found = row(records, "ncm", metric)
        assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), rel=1e-8)
        assert (found["n"], found["excludes_zero"]) == (5, bool(expected.pvalue < 0.05))


def test_seeds_of_a_class_order_count_once() -> None:
    records = [make(0.5 + 0.1 * s + 0.2 * o, method="fm_lora", order=o, seed=s) for o in (0, 1, 2) for s in (0, 1)]
    records += [make(0.25, method="ncm", order=o, seed=s) for o in (0, 1, 2) for s in (0, 1)]
    averaged = [make(0.55 + 0.2 * o, method="fm_lora", order=o) for o in (0, 1, 2)]
    averaged += [make(0.25, method="ncm", order=o) for o in (0, 1, 2)]
    keys = ("difference_mean", "difference_std", "low", "high", "n")
    assert [row(records, "ncm")[k] for k in keys] == pytest.approx([row(averaged, "ncm")[k] for k in keys])
    one_order = [r for r in records if r["config"]["class_order_seed"] == 0]
    assert row(one_order, "ncm")["n"] == 2, "one order: pairs are seeds"


def test_only_common_class_orders_are_compared_and_the_others_named() -> None:
    records = [make(0.6 + o / 100, method="fm_lora", order=o) for o in range(5)]
    records += [make(0.2, method="ncm", order=o) for o in (1, 2)] + [make(method="ncm", order=3, error="boom")]
    found = row(records, "ncm")
    assert (found["n"], found["difference_mean"]) == (2, pytest.approx(0.2075))
    assert found["note"] == "on common class orders and seeds only: 1, 2; left out: 0, 3, 4"
    (other,) = [r for r in remarks(records) if "lacks" in r]
    assert "ncm lacks class order 0,3,4 (seed 0)" in other
    assert "--methods ncm --class-orders 0,3,4 --seeds 0 --retry-failed" in other
    drawn = [make(method="fm_lora", order=0), make(method="fm_lora", order=None), make(method="ncm", order=0)]
    assert "--methods ncm --class-orders null --seeds 0`" in remarks(drawn)[0], "as the command line takes it"
    some = [make(method="fm_lora", order=o, seed=s) for o in (0, 1, 2) for s in (0, 1)]
    some += [make(method="ncm", order=o, seed=s) for o, s in ((0, 1), (1, 0), (2, 1))]
    (other,) = [r for r in remarks(some) if "lacks" in r]
    assert "ncm lacks class order 0,2 (seed 0); class order 1 (seed 1), which" in other, "and not their cross product"
    assert "--class-orders 0,2 --seeds 0` and `fmlora compare --methods ncm --class-orders 1 --seeds 1`" in other
    broken = [make(method="ncm", order=0, error="boom")]
    assert not [r for r in remarks([*broken, make(method="fm_lora", order=0)]) if "lacks" in r], "it has no mean"
    assert "with --retry-failed runs them again" in remarks(broken)[-1]
    apart = [make(method="fm_lora", order=0), make(method="ncm", order=1)]
    assert (row(apart, "ncm")["n"], row(apart, "ncm")["difference_mean"]) == (0, None)


def test_an_order_drawn_twice_counts_once() -> None:
    """Two domains have two orders, so of three numbers two are one order, whichever of its runs are there."""
    orders = {0: "ab", 1: "ba", 2: "ab"}
    records = [make(0.6 + o / 100, method="fm_lora", order=o, domains=orders[o]) for o in orders]
    records += [make(0.2, method="ncm", order=1, domains="ba"), make(0.2, method="ncm", order=2, domains="ab")]
    summary = {r["method"]: r for r in summary_rows(records)}
    assert (summary["fm_lora"]["n"], summary["ncm"]["n"]) == (2, 2)
    assert summary["fm_lora"]["final_average_accuracy_mean"] == pytest.approx((0.425 + 0.43) / 2)
    assert [summary[m]["note"] for m in summary] == [None, None]
    found = row(records, "ncm")
    assert (found["n"], found["difference_mean"], found["note"]) == (2, pytest.approx(0.2025), None)
    (remark,) = remarks(records)
    assert remark.startswith("glyphs: class order 2 is class order 0 again")
    assert len(runs_frame(records)) == 5, "what was run stays in the list of runs"
    failed = make(method="fm_lora", order=0, error="boom")
    assert {r["n"] for r in summary_rows([*records[1:], failed])} == {2}


def test_differences_in_the_last_bit_are_none() -> None:
    records = [make(method="fm_lora", order=o) for o in range(3)] + [make(method="ncm", order=o) for o in range(3)]
    for record in records[:3]:
        record["metrics"]["final_average_accuracy"] = 0.1 + 0.2
    for record in records[3:]:
        record["metrics"]["final_average_accuracy"] = 0.3
    assert row(records, "ncm")["excludes_zero"] is False
    assert all(r["best"] is None for r in summary_rows(records))


def several(spread: float = 0.01, **more: Any) -> list[Any]:
    """Three methods on three class orders; fm_lora is 0.2 above ncm, and above seq_lora by 0.1 ± spread."""
    records = [make(0.7, method="fm_lora", order=o) for o in range(3)]
    records += [make(0.6 + spread * (o - 1), method="seq_lora", order=o) for o in range(3)]
    return records + [make(0.5, method="ncm", order=o, **more) for o in range(3)]


def test_best_needs_every_interval_to_exclude_zero() -> None:
    best = {r["method"]: (r["best"] or "").split() for r in summary_rows(several())}
    assert best["fm_lora"] == [m for m in METRICS if m != "learning_accuracy"], "lower forgetting is better"
    assert best["ncm"] == best["seq_lora"] == []
    assert all(r["best"] is None for r in summary_rows(several(spread=0.3)))
    assert all(r["best"] is None for r in summary_rows([make(0.7, method="fm_lora"), make(0.1, method="ncm")])), "n = 1"
    assert all(r["best"] is None for r in summary_rows(several()[:3])), "nobody to be better than"
    text = render(summary_rows(several()))
    assert "| **47.5 ± 0.0** (3) |" in text
    assert r"$\mathbf{47.5 \pm 0.0}$ (3)" in render(summary_rows(several()), "latex")
    assert "47.5 ± 0.0 (3)" in render(summary_rows(several()), "csv")


def test_joint_training_and_stored_statistics_do_not_compete() -> None:
    records = several(statistics=7)
    records += [make(1.0, method="joint", order=o, joint=True) for o in range(3)]
    rows = {r["method"]: r for r in summary_rows(records)}
    assert [rows[m]["apart"] for m in ("fm_lora", "ncm", "joint")] == [None, STATISTICS, JOINT]
    assert "final_average_accuracy" in rows["fm_lora"]["best"]
    assert rows["joint"]["best"] is None
    assert rows["ncm"]["stored_statistics_mean"] == 7
    assert list(rows) == ["fm_lora", "seq_lora", "ncm", "joint"]
    lines = [line.split("|") for line in render(summary_rows(records)).splitlines()]
    assert [line[1].strip() for line in lines[4:]] == [f"*{STATISTICS}*", "glyphs", f"*{JOINT}*", "glyphs"]
    assert "stored stats" in "".join(lines[0])
    assert "stored stats" not in render(summary_rows(several(statistics=None)))
    assert list(dict.fromkeys(r["method"] for r in paired_rows(records))) == ["seq_lora", "ncm", "joint"]
    no_ours = [r for r in records if r["config"]["method"] != "fm_lora"]
    assert {r["reference"] for r in paired_rows(no_ours)} == {"seq_lora"}, "the best that competes"


def test_the_reference_is_found_by_method_label_or_both() -> None:
    records = several() + [make(0.8, method="fm_lora", order=o, label="tuned", options={"a": 2}) for o in range(3)]
    assert {r["reference"] for r in paired_rows(records)} == {"fm_lora"}, "as it is, though a variant is better"
    labelled = [r for r in records if r["config"]["method"] != "fm_lora" or r["config"]["label"]]
    labelled += [make(0.7, method="fm_lora", order=o, label="other", options={"a": 3}) for o in range(3)]
    assert {r["reference"] for r in paired_rows(labelled)} == {"fm_lora tuned"}, "the better of two"
    assert {r["reference"] for r in paired_rows(records, "fm_lora")} == {"fm_lora"}
    assert {r["reference"] for r in paired_rows(records, "tuned")} == {"fm_lora tuned"}
    assert row(records, "ncm", reference="seq_lora")["difference_mean"] == pytest.approx(0.05)
    with pytest.raises(ValueError, match=r"one of \['fm_lora', 'fm_lora tuned', 'ncm', 'seq_lora'\] but got 'l2p'"):
        paired_rows(records, "l2p")
    ranks = several() + [make(0.8, method="l2p", options={"size": s}) for s in (1, 2)]
    with pytest.raises(ValueError, match=r"'l2p size=1', 'l2p size=2'.*name one"):
        paired_rows(ranks, "l2p")
    assert {r["reference"] for r in paired_rows(ranks, "l2p size=2")} == {"l2p size=2"}


def test_render_paired() -> None:
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in render_paired(paired_rows(several())).splitlines()]
    assert cells[0][:5] == ["benchmark", "reference", "method", "Δ FAA [points]", "Δ pooled [points]"]
    assert cells[2][:4] == ["glyphs", "fm_lora", "ncm", "**+10.0 [10.0, 10.0]** (3)"]
    assert cells[3][3] == "**+5.0 [3.8, 6.2]** (3)"
    assert cells[3][-1] == "+0.0 [0.0, 0.0] (3)"
    assert r"$\mathbf{+5.0\;[3.8, 6.2]}$ (3)" in render_paired(paired_frame(several()), "latex")
    assert "+20.0 (1)" in render_paired(paired_rows([make(0.7, method="fm_lora"), make(0.3, method="ncm")]))


def test_a_label_says_that_another_training_is_meant() -> None:
    records = [make(0.7, method="fm_lora", order=o) for o in range(3)]
    long = [make(0.8, method="ncm", order=o, training={"epochs": 20}, label="long") for o in range(3)]
    rows = summary_rows(records + long)
    assert [(r["method"], r["label"], r["protocol"]) for r in rows] == [
        ("fm_lora", None, None),
        ("ncm", "long training.epochs=20", None),
    ]
    assert len({r["protocol_id"] for r in rows}) == 1
    assert row(records + long, "ncm")["n"] == 3
    assert remarks(records + long) == []
    unlabelled = [make(0.8, method="ncm", order=o, training={"epochs": 20}) for o in range(3)]
    assert paired_rows(records + unlabelled) == []
    (remark,) = remarks(records + unlabelled)
    assert "2 protocols" in remark
    assert "training.epochs=20 (ncm-glyphs-s0-o0-" in remark
    both = [*records, make(0.1, method="l2p", training={"epochs": 9}), *long]
    assert len({r["protocol_id"] for r in summary_rows(both)}) == 3, "not clear to whom the labelled runs belong"
    other_data = [make(0.8, method="ncm", order=o, label="other", split_hash="b" * 64) for o in range(3)]
    assert len({r["protocol_id"] for r in summary_rows(records + other_data)}) == 2, "a label excuses training only"


def test_other_versions_and_hardware_are_told_but_no_other_protocol() -> None:
    records = several()
    records[0]["environment"] |= {"torch": "2.4.0", "processor": "fast"}
    records[1]["environment"]["torch"] = "2.4.0"
    version, hardware = remarks(records)
    assert "several values of torch, so results may differ slightly: 2.4.0 (fm_lora-glyphs-s0-o0-" in version
    assert "and 4 more" in version
    assert "times do not compare" in hardware
    assert len({r["protocol_id"] for r in summary_rows(records)}) == 1


def test_a_sweep_says_that_an_order_was_drawn_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [make(order=0, domains="ab"), make(order=2, domains="ab")]
    for record in records:
        write_record(record, tmp_path / "records")
    show(records, tmp_path, mend="")
    assert "Note: glyphs: class order 2 is class order 0 again" in capsys.readouterr().err


def test_the_command_prints_differences_and_remarks(tmp_path: Path) -> None:
    for record in [*several(), make(method="l2p", order=0, error="no memory")]:
        write_record(record, tmp_path / "records")
    plain = CliRunner().invoke(main, ["table", str(tmp_path), "--csv-to", str(tmp_path)])
    assert "**47.5 ± 0.0** (3)" in plain.stdout
    assert "Note: Failed, and in no mean: l2p-glyphs-s0-o0-" in plain.stderr
    paired = CliRunner().invoke(main, ["table", str(tmp_path), "--paired", "--format", "latex"])
    assert r"+5.0\;[3.8, 6.2]" in paired.stdout
    assert "fm" not in CliRunner().invoke(main, ["table", str(tmp_path), "--paired", "ncm"]).stdout.split("| ncm")[0]
    wrong = CliRunner().invoke(main, ["table", str(tmp_path), "--paired", "nobody"])
    assert (wrong.exit_code, "Expected the reference to be one of" in wrong.stderr) == (1, True)
    assert (tmp_path / "paired.csv").read_text() == write_csvs(
        [*several(), make(method="l2p", order=0, error="x")], tmp_path / "b"
    )["paired"].read_text()


def test_the_csv_has_the_reference_that_was_asked_for(tmp_path: Path) -> None:
    for record in several():
        write_record(record, tmp_path / "records")
    arguments = ["table", str(tmp_path), "--csv-to", str(tmp_path / "csv"), "--paired"]
    assert CliRunner().invoke(main, [*arguments, "ncm"]).exit_code == 0
    with (tmp_path / "csv" / "paired.csv").open() as file:
        assert {row["reference"] for row in csv.DictReader(file)} == {"ncm"}
    wrong = CliRunner().invoke(main, ["table", str(tmp_path), "--csv-to", str(tmp_path / "none"), "--paired", "nobody"])
    assert wrong.exit_code == 1
    assert not (tmp_path / "none").exists(), "nothing half-written"


def test_a_reference_without_a_finished_run_is_named() -> None:
    records = [make(method="fm_lora", error="boom"), make(0.5, method="ncm"), make(0.4, method="l2p")]
    with pytest.raises(ValueError, match=r"No run of 'fm_lora' is finished: .* compare with one of \['l2p', 'ncm'\]"):
        paired_rows(records, "fm_lora")


def test_a_run_of_two_versions_counts_once_and_both_are_named() -> None:
    old, new = make(0.5, method="ncm"), make(0.9, method="ncm", options={"transport_samples": 0})
    (note,) = [r for r in remarks([old, new]) if "another version" in r]
    assert all(file_name(record) in note for record in (old, new))
    assert not [r for r in remarks([old, make(0.9, method="ncm", order=1)]) if "another version" in r]


def test_an_order_that_is_drawn_as_it_was_given_is_named() -> None:
    records = [make(order=order, domains="ab") for order in (None, 1)]
    (note,) = [r for r in remarks(records) if "again" in r]
    assert "class order 1 is that given again, so runs of both count once" in note
    assert ": final" in one_line(records[0])
    assert "class order as given" in one_line(records[0])
