"""Write every table of both READMEs, and the CSVs, anew from the records: python benchmarks/write_tables.py

A table stands between `<!-- table: KIND FOLDER -->` and `<!-- end of table -->`, FOLDER below benchmarks/results.
Kinds: `summary` and `paired` (as `fmlora table` prints them), `tuning` (one line a run: what differs from the
defaults), `changes` (FM-LoRA with one thing changed, against it unchanged), `prediction_rules`, `row_drift`,
`machine_time`, `standings` and `overview`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import machine_time
import prediction_rules
import row_drift
import standings
from prediction_rules import FEATURES

from avalanche_fmlora import FM_LORA_CLASSIFIER
from avalanche_fmlora.results.figures.tradeoffs import trained_an_experience
from avalanche_fmlora.results.grouping import BEFORE, flat, natural
from avalanche_fmlora.results.record import Record, read_records
from avalanche_fmlora.results.render import Cell, Table, difference, draw, number, per_cent
from avalanche_fmlora.results.table import paired_rows, render, render_paired, summary_rows, write_csvs
from avalanche_fmlora.strategies.registry import method

BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results"
READMES = (BENCHMARKS / "README.md", BENCHMARKS.parent / "README.md")
MARKED = re.compile(r"(<!-- table: (\w+) ?(\S*) -->\n)(?:(?!<!-- table: ).)*?(<!-- end of table -->)", re.DOTALL)
FAA = "final_average_accuracy"
LABELS = {
    ("ncm", "ncm, FM-LoRA's head"): " with FM-LoRA's classifier",
    ("fm_lora", "covariance kept"): ", covariance kept (stores statistics)",
    ("inflora", None): " (stores statistics)",
    ("joint", None): " (all data at once, linear head)",
}
USUAL = {"epochs": 5, "batch_size": 32}
RATES = ("lr_lora", "lr_prompt")
SAID_IN_THE_TEXT = ("seed", "precision", "rank_selection")
COVARIANCES = {"current": "current covariance", "secant": "remembered covariance", "running": "covariance kept"}
SHOWN = (
    ("caltech100", FAA),
    ("caltech100", "forgetting"),
    ("emoji20", FAA),
    ("split_glyphs", FAA),
    ("split_glyphs", "forgetting"),
)


def records_of(folder: str) -> list[Record]:
    """Records of a folder below benchmarks/results."""
    return read_records(RESULTS / folder / "records")


def summary(folder: str) -> str:
    """Mean, deviation and number of class orders of each method."""
    return render(summary_rows(records_of(folder))).strip()


def paired(folder: str) -> str:
    """FM-LoRA minus each other method."""
    return render_paired(paired_rows(records_of(folder))).strip()


def tuning(folder: str) -> str:
    """One line a run."""
    lines = []
    for record in records_of(folder):
        metrics = record["metrics"]
        shown = [metrics[key] for key in ("final_average_accuracy", "forgetting", "learning_accuracy")]
        cells = " | ".join(number(None if value is None else 100 * value, 1) for value in shown)
        lines.append((record["config"]["method"], setting(record), cells))
    ordered = sorted(lines, key=lambda line: (line[0], natural(line[1])))
    rows = [f"| `{name}` | {text} | {cells} |" for name, text, cells in ordered]
    return "\n".join(["| method | setting | FAA | forgetting | learning accuracy |", "|---|---|---|---|---|", *rows])


def changes(folder: str) -> str:
    """FM-LoRA with one thing changed: means, and the difference from the one without a label."""
    records = records_of(folder)
    paired_with = {row["label"]: row for row in paired_rows(records, "fm_lora") if row["metric"] == FAA}
    ranks: dict[str | None, list[int]] = {}
    trained: dict[str | None, list[float]] = {}
    for record in records:
        trained.setdefault(record["config"]["label"], []).append(trained_an_experience(record))
        later = [e["rank"] for e in record["experiences"][1:] if e["rank"] is not None]
        ranks.setdefault(record["config"]["label"], []).extend(later)
    header = ["label", "FAA", "Δ FAA [points]", "forgetting", "learning accuracy", "mean rank"]
    header += ["trained a task", "stored"]
    rows = []
    for row in summary_rows(records):
        label = row["label"]
        cells = [Cell(label or "unchanged", bold=label is None), per_cent(row, FAA)]
        cells.append(difference(_turned(paired_with[label])) if label in paired_with else Cell("–"))
        cells += [per_cent(row, "forgetting"), per_cent(row, "learning_accuracy")]
        cells.append(Cell(number(fmean(ranks[label]) if ranks[label] else None, 1)))
        cells += [Cell(number(round(fmean(trained[label])))), Cell(number(row["stored_parameters_mean"]))]
        rows.append(cells)
    return draw(Table(header, rows, [None] * len(rows)), "markdown").strip()


def overview(_: str) -> str:
    """The table of the top README: each method at its best setting on three test beds, bold among the rows shown."""
    beds: dict[str, dict[tuple[str, str | None], dict[str, Any]]] = {}
    for bed in ("caltech100", "emoji20", "split_glyphs"):
        records = records_of(bed)
        shown = standings.best_settings([r for r in records if r["config"]["label"] is None])
        shown += [r for r in records if r["config"]["label"] is not None and _key(r["config"]) in LABELS]
        beds[bed] = {_key(row): row for row in summary_rows(shown)}
    first = beds["caltech100"]
    keys = sorted(first, key=lambda key: (key[0] == "joint", key != ("fm_lora", None), -first[key][f"{FAA}_mean"]))
    rows = []
    for key in keys:
        on = {bed: found.get(key) for bed, found in beds.items()}
        cells = [Cell(f"`{key[0]}`" + LABELS.get(key, ""))]
        for bed, metric in SHOWN:
            row = on[bed]
            cells.append(Cell("–") if row is None else per_cent(row, metric))
        statistics = first[key]["stored_statistics_mean"]
        more = f" + {number(statistics)} of statistics" if statistics else ""
        cells.append(Cell(number(first[key]["stored_parameters_mean"]) + more))
        rows.append(cells)
    header = ["method", "Caltech-100", "forgetting", "emoji", "split_glyphs", "forgetting"]
    return draw(Table([*header, "stored besides head (ViT-S)"], rows, [None] * len(rows)), "markdown").strip()


def _key(row: Mapping[str, Any]) -> tuple[str, str | None]:
    return row["method"], row["label"]


def setting(record: Record) -> str:
    """In words, what a run has that the method's defaults don't have."""
    config = record["config"]
    own = {**BEFORE, **flat(config["method_options"])}
    defaults = flat(method(config["method"]).config_class().model_dump(mode="json"))
    ours = config["method"] == "fm_lora"
    parts = []
    if ours:
        parts += [FEATURES[own["pooling"]]] if own["pooling"] != defaults["pooling"] else []
    elif own["whitening"] is not None:
        parts.append(_head(own, all_at_once=config["method"] == "joint"))
    elif own["pooling"] != defaults["pooling"]:
        parts.append(FEATURES[own["pooling"]])
    for key, value in sorted(own.items(), key=lambda item: item[0] not in RATES):
        if key in FM_LORA_CLASSIFIER or key in SAID_IN_THE_TEXT:
            continue
        if value != defaults.get(key, value) or (key in RATES and not ours):
            parts.append(f"{key} {_shown(value)}")
    if ours:
        parts += ["rank_selection null"] if "rank_selection" in own else []
        parts += _fm_head(own)
    training = config["training"]
    parts += [f"batches of {training['batch_size']}"] if training["batch_size"] != USUAL["batch_size"] else []
    parts += [f"{training['epochs']} epochs"] if training["epochs"] != USUAL["epochs"] else []
    augment = config["benchmark"].get("augment", "none")
    parts += [f"training images by `{augment}`"] if augment != "none" else []
    order = record["seeds"]["class_order_seed"]
    parts += [f"order {order}"] if order != 100 else []
    return "; ".join(parts) or "defaults"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "null" if value is None else str(value)


def _head(own: dict[str, Any], all_at_once: bool) -> str:
    """FM-LoRA's head, and what is not its own; where all data come at once, covariances are one and the same."""
    where = "" if own["pooling"] == FM_LORA_CLASSIFIER["pooling"] else f" on the {FEATURES[own['pooling']]}"
    same = all_at_once or (not where and own["whitening_covariance"] == FM_LORA_CLASSIFIER["whitening_covariance"])
    return f"FM-LoRA's head{where}" + ("" if same else f", {COVARIANCES[own['whitening_covariance']]}")


def _fm_head(own: dict[str, Any]) -> list[str]:
    if own["classifier"] != "class_mean":
        return [f"{own['classifier']} head"]
    if own["whitening"] is None:
        return ["no whitening"]
    return [] if own["whitening_covariance"] == "secant" else [COVARIANCES[own["whitening_covariance"]]]


def _turned(row: dict[str, Any]) -> dict[str, Any]:
    """A paired difference the other way round: method minus reference."""
    mean, low, high = (None if row[key] is None else -row[key] for key in ("difference_mean", "low", "high"))
    return row | {"difference_mean": mean, "low": high, "high": low}


KINDS: dict[str, Callable[[str], str]] = {
    "summary": summary,
    "paired": paired,
    "tuning": tuning,
    "changes": changes,
    "overview": overview,
    "standings": lambda _: standings.table(RESULTS),
    "machine_time": lambda _: machine_time.table(),
    "prediction_rules": lambda _: prediction_rules.table(RESULTS / "prediction_rules.csv"),
    "row_drift": lambda _: row_drift.table(RESULTS / "row_drift.csv"),
}


def filled(text: str) -> str:
    """A text with each marked table as the records give it."""
    return MARKED.sub(lambda found: f"{found[1]}\n{KINDS[found[2]](found[3])}\n\n{found[4]}", text)


def main() -> None:
    """Rewrite CSVs and READMEs."""
    for records in sorted(RESULTS.rglob("records")):
        write_csvs(read_records(records), records.parent)
    for path in READMES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
