"""Tables in the repository are those that the records in it give."""

from __future__ import annotations

import importlib
import json
import re
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from made_records import make
from PIL import Image

from avalanche_fmlora.config import read_all
from avalanche_fmlora.grid import expand
from avalanche_fmlora.results.record import read_records
from avalanche_fmlora.results.table import paired_rows, write_csvs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted(p.parent for p in (ROOT / "benchmarks" / "results").glob("*/records"))
TUNING = sorted(p.parent for p in (ROOT / "benchmarks" / "results" / "tuning").glob("*/records"))
TEXT = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_there_are_results() -> None:
    assert {p.name for p in RESULTS} >= {"caltech100", "emoji20"}


@pytest.mark.parametrize("folder", RESULTS, ids=lambda p: p.name)
def test_the_table_and_the_csvs_are_current(folder: Path, tmp_path: Path) -> None:
    records = read_records(folder / "records")
    assert {r["status"] for r in records} == {"finished"}
    for path in write_csvs(records, tmp_path).values():
        assert path.read_text() == (folder / path.name).read_text(), path.name


@pytest.mark.parametrize("folder", TUNING, ids=lambda p: p.name)
def test_what_rates_were_chosen_from_is_no_class_order_of_a_table(folder: Path, tmp_path: Path) -> None:
    records = read_records(folder / "records")
    assert {r["seeds"]["class_order_seed"] for r in records} <= {100, 101, 102}
    for path in write_csvs(records, tmp_path).values():
        assert path.read_text() == (folder / path.name).read_text(), path.name
    for folder in RESULTS:
        assert not {r["seeds"]["class_order_seed"] for r in read_records(folder / "records")} & {100, 101, 102}


@pytest.mark.parametrize("folder", [*RESULTS, *TUNING], ids=lambda p: p.name)
def test_records_name_data_and_weights_but_no_folder(folder: Path) -> None:
    for record in read_records(folder / "records"):
        config = record["config"]
        assert "/" not in (config["benchmark"]["path"] or "")
        assert "/" not in (config["backbone"]["weights"] or "")
        assert record["backbone"]["sha256"] is not None
        assert record["benchmark"]["split_hash"] is not None


def test_records_from_before_a_key_existed_are_read_as_unknown() -> None:
    records = read_records(ROOT / "benchmarks" / "results" / "caltech100" / "records")
    record = next(r for r in records if r["config"]["method"] == "seq_lora")
    assert record["cost"]["data_wait_share"] is None
    assert {e["data_wait_s"] for e in record["experiences"]} == {None}


@pytest.mark.parametrize("name", ["caltech100", "emoji20"])
def test_a_configuration_still_names_the_data_and_training_of_its_records(name: str) -> None:
    """Whatever fields are added, those of a run that has been made stay, or it would be made again."""
    folder = ROOT / "benchmarks" / "configs"
    configs = expand(read_all([folder / f"{name}.yaml", folder / "unified.yaml"]))
    assert {c.benchmark.augment for c in configs} == {"none"}
    for record in read_records(ROOT / "benchmarks" / "results" / name / "records"):
        same = [
            c.identity()
            for c in configs
            if (c.method, c.class_order_seed) == (record["config"]["method"], record["seeds"]["class_order_seed"])
        ]
        assert same, record["config"]["method"]
        for again in same:
            for part in ("benchmark", "backbone", "training"):
                assert again[part] == record["config"][part]
            assert "num_workers" not in again["training"]


def test_the_figures_of_both_readmes_are_current(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    figures = importlib.import_module("draw_figures")
    linked = re.findall(r"figures/(\w+)\.png\)", TEXT + (ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(linked) == set(figures.FIGURES)
    for name in figures.FIGURES:
        shown, drawn = (
            Image.open(f) for f in (ROOT / f"benchmarks/figures/{name}.png", figures.draw_figure(name, tmp_path))
        )
        assert shown.size == drawn.size
        if shown.info["Software"] == drawn.info["Software"]:  # another matplotlib may draw a pixel otherwise
            assert np.array_equal(shown, drawn), "python benchmarks/draw_figures.py"


@pytest.fixture
def write_tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("write_tables")


def test_the_tables_of_both_readmes_are_current(write_tables: ModuleType) -> None:
    for path in write_tables.READMES:
        assert write_tables.filled(path.read_text()) == path.read_text(), "python benchmarks/write_tables.py"


def test_a_new_marker_without_a_table_takes_nothing_but_its_own_place(write_tables: ModuleType) -> None:
    table = write_tables.filled("<!-- table: tuning tuning/domain_glyphs -->\n\nold\n\n<!-- end of table -->")
    assert "`ncm`" in table
    empty = "<!-- table: machine_time -->\n<!-- end of table -->\n\nwords\n\n"
    assert write_tables.filled(empty + table).endswith(f"\n\nwords\n\n{table}")
    torn = "<!-- table: machine_time -->\n\nwords\n\n"  # its end is missing
    assert write_tables.filled(torn + table) == torn + table


def test_each_folder_of_records_has_its_table(write_tables: ModuleType) -> None:
    marked = {(kind, folder) for _, kind, folder, _ in write_tables.MARKED.findall(TEXT)}
    assert {kind for kind, _ in marked} >= {"machine_time", "prediction_rules"}
    for folder in RESULTS:
        if ("changes", folder.name) in marked:
            continue
        assert ("summary", folder.name) in marked
        if any(row["low"] is not None for row in paired_rows(read_records(folder / "records"))):
            assert ("paired", folder.name) in marked
    for folder in TUNING:
        assert ("tuning", f"tuning/{folder.name}") in marked


def test_a_line_of_tuning_says_what_is_not_the_default(write_tables: ModuleType) -> None:
    lines = write_tables.tuning("tuning/caltech100")
    for setting in (
        "`fm_lora` | defaults |",
        "`fm_lora` | rank 16; bases first_experience; core_step 0.5 |",
        "`l2p` | lr_prompt 0.03; lr_head 0.005 |",
    ):
        assert setting in lines


def test_a_change_is_shown_as_what_it_adds_to_the_defaults(
    write_tables: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [make(0.5 + o / 100, method="fm_lora", order=o) for o in range(3)]
    records += [make(0.6 + o / 100, method="fm_lora", label="better", options={"a": 1}, order=o) for o in range(3)]
    monkeypatch.setattr(write_tables, "records_of", lambda _: records)
    defaults, better = (
        [c.strip() for c in line.split("|")[1:4]] for line in write_tables.changes("any").splitlines()[2:]
    )
    assert defaults == ["**unchanged**", "38.0 ± 0.5 (3)", "–"]
    assert better == ["better", "**43.0 ± 0.5** (3)", "**+5.0 [5.0, 5.0]** (3)"]


def test_the_packaged_weights_are_those_of_the_log() -> None:
    assets = ROOT / "avalanche_fmlora" / "assets"
    facts = json.loads((assets / "glyph_vit.json").read_text())
    assert sha256((assets / "glyph_vit.safetensors").read_bytes()).hexdigest() == facts["sha256"]
    last = (ROOT / "benchmarks" / "results" / "pretrain_glyphs.csv").read_text().splitlines()[-1].split(",")
    assert int(last[1]) == facts["images"]
    assert float(last[3]) == pytest.approx(facts["held_out_accuracy"])
