"""Tables of records: what is averaged with what, what is flagged, and how it is drawn."""

from __future__ import annotations

import csv
import io
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_records import make

from avalanche_fmlora.metrics import summarize
from avalanche_fmlora.results import table
from avalanche_fmlora.results.figures import draw
from avalanche_fmlora.results.record import write_record
from avalanche_fmlora.results.table import (
    matrix_frame,
    paired_rows,
    ranks_frame,
    render,
    render_paired,
    runs_frame,
    summary_frame,
    summary_rows,
    write_csvs,
)


def test_runs() -> None:
    frame = runs_frame([make(0.5, order=1), make(order=0, error="RuntimeError: no")])
    assert list(frame.columns) == list(table.RUN_COLUMNS)
    failed, good = frame.iloc[0], frame.iloc[1]
    assert (failed["status"], failed["error"], failed["class_order_seed"]) == ("failed", "RuntimeError: no", 0)
    assert np.isnan(failed["final_average_accuracy"])
    assert (good["final_average_accuracy"], good["pooled_final_accuracy"]) == (0.375, 0.3125)
    assert (good["forgetting"], good["rank"], good["n_experiences"]) == (0.25, 16, 2)
    assert (good["trainable_parameters"], good["stored_parameters"], good["head_parameters"]) == (11, 1001, 40)
    assert (good["train_s"], good["peak_memory_bytes"]) == (2.0, 1000)
    assert failed["protocol_id"] == good["protocol_id"], "a run that failed early belongs where its settings belong"


@pytest.mark.parametrize(
    ("benchmark", "name"),
    [
        ({"name": "image_folder", "path": "pets.zip"}, "pets"),
        ({"name": "image_folder", "path": "photos/flowers.2023.ZIP"}, "flowers.2023"),
        ({"name": "image_folder", "path": "flowers.2023"}, "flowers.2023"),
        ({"name": "domainnet", "path": None, "subset": False}, "domainnet"),
        ({"name": "domainnet", "path": "mini", "subset": True}, "domainnet (subset)"),
    ],
)
def test_the_name_of_the_data(benchmark: dict[str, Any], name: str) -> None:
    assert runs_frame([make(benchmark=benchmark)])["benchmark"].tolist() == [name]


def test_matrix_is_long_and_known() -> None:
    frame = matrix_frame([make(0.5), make(0.5, method="joint", joint=True), make(order=1, error="x")])
    got = frame[["method", "trained_on", "evaluated_on", "accuracy"]].to_numpy().tolist()
    assert got == [
        ["fmlora", 0, 0, 0.75],
        ["fmlora", 1, 0, 0.5],
        ["fmlora", 1, 1, 0.25],
        ["joint", 1, 0, 0.5],
        ["joint", 1, 1, 0.25],
    ]


def test_ranks() -> None:
    frame = ranks_frame([make(), make(order=1, error="x")])
    assert frame["rank"].tolist() == [8, 16]
    assert frame["ranks_per_layer"].tolist() == ["[4, 8]"] * 2
    assert frame["stored_parameters"].tolist() == [1000, 1001]
    assert frame["similarity"].isna().tolist() == [True, False]


def test_mean_and_standard_deviation_against_pandas() -> None:
    rng = random.Random(0)
    records = [make(rng.random(), method=m, order=o) for m in ("fmlora", "ncm") for o in range(5)]
    summary = summary_frame(records).set_index("method")
    grouped = runs_frame(records).groupby("method")
    for metric in table.METRICS:
        np.testing.assert_allclose(summary[f"{metric}_mean"], grouped[metric].mean(), rtol=1e-13)
        np.testing.assert_allclose(summary[f"{metric}_std"], grouped[metric].std(ddof=1), rtol=1e-12)
        assert summary[f"{metric}_n"].tolist() == [5, 5]
    assert summary["stored_parameters_mean"].tolist() == [1001, 1001]
    assert summary["note"].isna().all()
    assert summary["protocol"].isna().all()


def test_summary_by_hand() -> None:
    (row,) = summary_rows([make(0.25, seed=0), make(0.75, seed=1)])
    assert row["n"] == 2
    assert row["final_average_accuracy_mean"] == 0.375
    assert row["final_average_accuracy_std"] == pytest.approx(0.125 * 2**0.5)
    assert row["train_s_mean"] == 2.5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"training": {"epochs": 5}}, ["training.epochs=1", "training.epochs=5"]),
        ({"training": {"lr": 0.1}}, ["", "training.lr=0.1"]),
        ({"benchmark": {"style": "bold"}}, ["", "benchmark.style=bold"]),
        ({"split_hash": "b" * 64}, ["data.split_hash=" + "a" * 12, "data.split_hash=" + "b" * 12]),
    ],
)
def test_protocols_are_never_averaged_together(change: dict[str, Any], text: list[str]) -> None:
    rows = summary_rows([make(0.25, order=0), make(0.75, order=1, **change)])
    assert [row["n"] for row in rows] == [1, 1]
    assert [row["protocol"] or "" for row in rows] == text
    assert len({row["protocol_id"] for row in rows}) == 2
    assert [row["note"] for row in rows] == [None, None], "class orders are compared within a protocol only"


def test_a_run_from_before_an_option_existed_had_its_earlier_value() -> None:
    """Such records are averaged with those that say so, and with no others."""
    records = [make(0.5, order=0), make(0.7, order=1, options={"pooling": "model"})]
    (row,) = summary_rows(records)
    assert (row["n"], row["label"]) == (2, None)
    rows = summary_rows([*records, make(0.9, order=0, options={"pooling": "token_and_mean"})])
    assert [(r["n"], r["label"]) for r in rows] == [(2, "pooling=model"), (1, "pooling=token_and_mean")]


def test_other_benchmarks_are_no_other_protocol() -> None:
    rows = summary_rows([make(), make(benchmark={"name": "birds"})])
    assert [(row["benchmark"], row["protocol"]) for row in rows] == [("birds", None), ("glyphs", None)]


def test_method_options_make_rows_of_their_own() -> None:
    records = [make(r / 100, options={"rank": r, "scale": {"a": 1}}, order=o) for r in (16, 4) for o in (0, 1)]
    records += [make(options={"rank": 4, "scale": {"a": 1}}, order=o, label="mine", seed=1) for o in (0, 1)]
    rows = summary_rows(records)
    assert [(row["label"], row["n"]) for row in rows] == [("mine", 2), ("rank=4", 2), ("rank=16", 2)]
    assert [row["protocol"] for row in rows] == [None] * 3
    assert set(runs_frame(records)["label"]) == {"mine", "rank=4", "rank=16"}
    one_label = [make(options={"scale": {"a": a}}, label="mine") for a in (1, 2)]
    assert [row["label"] for row in summary_rows(one_label)] == ["mine scale.a=1", "mine scale.a=2"]
    one_only = [make(options={"rank": 4}), make(method="ncm")]
    assert [row["label"] for row in summary_rows(one_only)] == [None, None]


def test_failed_runs_and_missing_class_orders_are_flagged() -> None:
    records = [make(0.5, method="ncm", order=o) for o in range(5)]
    records += [make(0.5, order=o) for o in (0, 1, 2)] + [make(order=3, error="boom")]
    records += [make(method="seq_lora", order=o, error="boom") for o in (0, 1)]
    notes = {row["method"]: (row["n"], row["note"]) for row in summary_rows(records)}
    assert notes == {
        "ncm": (5, None),
        "fmlora": (3, "missing class orders: 3 (failed), 4"),
        "seq_lora": (0, "missing class orders: 0 (failed), 1 (failed), 2, 3, 4"),
    }


def test_a_failed_run_with_other_options_does_not_rename_those_that_finished() -> None:
    good = [make(method="l2p", options={"rank": 16}, order=o) for o in (0, 1)]
    failed = [
        make(method="l2p", options={"rank": 8}, error="boom"),
        make(method="l2p", options={"rank": 16}, order=2, error="boom"),
        make(method="l2p", options={"rank": 16}, benchmark={"n_experiences": 7}, error="boom"),
        make(method="l2p", options={"rank": 16}, training={"epochs": 9}, error="boom"),
    ]
    names = {(row["label"], row["protocol"], row["n"]) for row in summary_rows([*failed, *good])}
    assert (None, None, 2) in names, "as if the others weren't there"
    assert ("rank=8", None, 0) in names, "which the table says of the failed one alone"
    assert {n for _, protocol, n in names if protocol} == {0}
    assert list(draw([*failed, *good], ["accuracy"])) == ["accuracy"]


def test_a_run_that_failed_elsewhere_is_missed_by_nobody() -> None:
    failed = make(method="l2p", order=3, error="boom")
    rows = summary_rows([make(method="ncm"), make(method="l2p"), failed])
    assert {row["method"]: row["note"] for row in rows} == {"ncm": None, "l2p": "missing class orders: 3 (failed)"}


def test_a_part_that_is_left_out_is_the_only_one_named() -> None:
    """Not each of the options of those that have it."""
    parts = [None, {"tau": 5.0, "sigma": 0.25}, {"tau": 5.0, "sigma": 0.5}]
    rows = summary_rows([make(options={"selection": part}, order=k) for k, part in enumerate(parts)])
    assert {row["label"] for row in rows} == {"selection=null", "selection.sigma=0.25", "selection.sigma=0.5"}
    rows = summary_rows([make(options={"selection": part}, order=k) for k, part in enumerate(parts[:2])])
    assert {row["label"] for row in rows} == {"selection=null", None}


def test_labels_are_sorted_whatever_their_signs() -> None:
    assert [row["label"] for row in summary_rows([make(label="1²"), make(label="1³", order=1)])] == ["1²", "1³"]


def test_missing_seeds_are_flagged() -> None:
    records = [make(method="ncm", order=o, seed=s) for o in (None, 1) for s in (0, 1)]
    records += [make(order=None, seed=0), make(order=1, seed=0), make(order=1, seed=1)]
    notes = {row["method"]: row["note"] for row in summary_rows(records)}
    assert notes == {"ncm": None, "fmlora": "missing seeds: 1 of class order None"}


def test_a_run_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="more than once"):
        summary_rows([make(), make()])


def test_csvs_depend_on_the_records_only(tmp_path: Path) -> None:
    records = [make(o / 10, method=m, order=o) for m in ("fmlora", "ncm") for o in range(4)]
    records.append(make(method="joint", joint=True))
    records.append(make(order=4, error='two\nlines, "quoted"'))
    first = write_csvs(records, tmp_path / "a")
    random.Random(1).shuffle(records)
    second = write_csvs(records, tmp_path / "b")
    assert {name: path.name for name, path in first.items()} == {
        name: f"{name}.csv" for name in ("runs", "matrix", "ranks", "summary", "paired")
    }
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes()
        assert len(list(path.parent.iterdir())) == 5


def test_csvs_read_back_exactly_with_empty_cells(tmp_path: Path) -> None:
    records = [make(0.1 + 0.2), make(order=None, error='two\nlines, "quoted"')]
    paths = write_csvs(records, tmp_path)
    with open(paths["runs"], encoding="utf-8", newline="") as file:
        failed, good = csv.DictReader(file)
    assert failed["error"] == 'two\nlines, "quoted"'
    assert failed["class_order_seed"] == failed["forgetting"] == failed["rank"] == ""
    assert float(good["final_average_accuracy"]) == records[0]["metrics"]["final_average_accuracy"]
    for name in ("runs", "matrix", "ranks", "summary", "paired"):
        frame = getattr(table, f"{name}_frame")(records)
        read = pd.read_csv(paths[name])
        assert list(read.columns) == list(frame.columns)
        for column in frame.select_dtypes("number"):
            got, expected = read[column].to_numpy(float), frame[column].to_numpy(float, na_value=np.nan)
            np.testing.assert_allclose(got, expected, rtol=1e-14)


def test_render_markdown() -> None:
    records = [make(0.25, seed=0), make(0.75, seed=1), make(0.5, method="joint", joint=True)]
    lines = render(summary_rows(records)).splitlines()
    assert len({len(line) for line in lines}) == 1, "the table is of fixed width"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "benchmark", "method", "FAA [%]", "pooled [%]", "AAA [%]", "forgetting [%]", "BWT [%]", "learning acc. [%]",
        "stored params", "train [s]", "note",
    ]  # fmt: skip
    assert cells[2] == [
        "glyphs", "fmlora", "37.5 ± 17.7 (2)", "31.2 ± 8.8 (2)", "56.2 ± 8.8 (2)", "25.0 ± 35.4 (2)",
        "-25.0 ± 35.4 (2)", "50.0 ± 0.0 (2)", "1,001", "2.5", "",
    ]  # fmt: skip
    assert cells[3] == ["*all data at once (upper bound)*"] + [""] * 10
    assert cells[4][2:8] == ["37.5 ± – (1)", "31.2 ± – (1)", "–", "–", "–", "–"]
    assert cells[4][-1] == "missing seeds: 1 of class order 0"


def test_each_benchmark_begins_under_a_heading_of_its_own() -> None:
    records = [
        make(accuracy, method=method, joint=method == "joint", benchmark={"name": name})
        for name in ("birds", "cars")
        for method, accuracy in (("fm_lora", 0.5), ("ncm", 0.25), ("joint", 0.75))
    ]
    joint = "all data at once (upper bound)"
    expected = ["birds", "birds", f"*{joint}*", "birds", "*cars*", "cars", "cars", f"*{joint}*", "cars"]
    for text in (render(summary_rows(records)), render_paired(paired_rows(records))):
        first = [line.strip("|").split("|")[0].strip() for line in text.splitlines()[2:]]
        assert [name for name in first if name[0] == "*"] == [name for name in expected if name[0] == "*"]
    assert [
        line.strip("|").split("|")[0].strip() for line in render(summary_rows(records)).splitlines()[2:]
    ] == expected
    only_joint = render(summary_rows([r for r in records if r["config"]["method"] == "joint"]))
    assert only_joint.count(f"*{joint}*") == 2, "a block is one benchmark's"
    headings = [line for line in render(summary_rows(records), "latex").splitlines() if "multicolumn" in line]
    assert [line.partition(r"\emph{")[2].partition("}")[0] for line in headings] == [joint, "cars", joint]


def test_joint_training_on_one_experience_does_not_compete() -> None:
    records = [make(method=method, joint=method == "joint") for method in ("fm_lora", "joint")]
    for record in records:
        record["benchmark"] |= {"experience_names": ["a"], "n_test": [10]}
        record["accuracy_matrix"], record["metrics"] = [[0.5]], summarize([[0.5]], [10])
        record["experiences"] = record["experiences"][:1]
    assert [row["apart"] for row in summary_rows(records)] == [None, "all data at once (upper bound)"]


def test_no_reader_takes_a_protocol_for_a_number(tmp_path: Path) -> None:
    for epochs in (17, 123, 159):
        records = [make(training={"epochs": epochs})]
        write_csvs(records, tmp_path)
        assert list(pd.read_csv(tmp_path / "runs.csv")["protocol_id"]) == list(runs_frame(records)["protocol_id"])


def test_render_csv_and_latex() -> None:
    records = [make(0.75, label="50% of_it | x"), make(0.5, method="joint", joint=True)]
    rows = list(csv.DictReader(io.StringIO(render(summary_rows(records), "csv"))))
    assert rows[0]["FAA [%]"] == "50.0 ± – (1)"
    assert rows[0]["stored params"] == "1001"
    assert (rows[1]["apart"], rows[1]["AAA [%]"]) == ("all data at once (upper bound)", "")
    (row,) = csv.DictReader(io.StringIO(render(summary_rows([make(label="1,2")]), "csv")))
    assert row["label"] == "1,2"
    bracket = make(benchmark={"name": "image_folder", "path": "[2024]"})
    assert "\n{[}2024] & " in render(summary_rows([bracket]), "latex"), "no optional argument of what stands before"
    latex = render(summary_frame(records), "latex", digits=2)
    lines = latex.splitlines()
    assert lines[0] == r"\begin{tabular}{lllrrrrrrrr}"
    assert lines[4].startswith(r"glyphs & fmlora & 50\% of\_it | x & $50.00$ (1) &")
    assert r" & $0.00$ (1) & " in lines[4], "no negative zero"
    assert lines[6] == r"\multicolumn{11}{l}{\emph{all data at once (upper bound)}} \\"
    assert r" & -- & " in lines[7]
    assert all(line.count("&") == 10 + line.count(r"\&") for line in (lines[2], lines[4], lines[7]))
    assert r"$37.50 \pm 17.68$ (2)" in render(summary_rows([make(0.25, seed=0), make(0.75, seed=1)]), "latex", 2)
    assert r"of_it \| x" in render(summary_rows(records))
    with pytest.raises(ValueError, match=r"'html'"):
        render(summary_rows(records), "html")  # type: ignore[arg-type]


def test_pooled_accuracy_is_drawn_only_where_it_differs() -> None:
    assert "pooled" in render(summary_rows([make(0.5)]))
    assert "pooled" not in render(summary_rows([make(0.25)]))


@pytest.mark.parametrize("format", ["csv", "markdown", "latex"])
def test_frame_and_rows_draw_the_same(format: table.Format) -> None:
    records = [make(o / 10, method=m, order=o) for m in ("fmlora", "ncm") for o in range(3)]
    records += [make(method="joint", joint=True), make(method="lwf", error="x")]
    assert render(summary_frame(records), format) == render(summary_rows(records), format)


def test_no_records() -> None:
    assert list(summary_frame([]).columns) == list(table.SUMMARY_COLUMNS)
    assert len(render([]).splitlines()) == 2


def test_the_table_needs_nothing_heavy(tmp_path: Path) -> None:
    for o in range(20):
        write_record(make(0.5, order=o), tmp_path)
    code = (
        "import sys\nfrom avalanche_fmlora.results import record, table\n"
        f"records = record.read_records({str(tmp_path)!r})\n"
        f"table.render(table.summary_rows(records)); table.write_csvs(records, {str(tmp_path)!r})\nprint(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "avalanche", "pandas", "scipy.stats", "matplotlib", "pydantic"} & set(loaded)
