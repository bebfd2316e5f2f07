"""Write every table of both READMEs, and the CSVs, anew from the records: python benchmarks/write_tables.py

A table stands between `<!-- table: KIND FOLDER -->` and `<!-- end of table -->`, FOLDER below benchmarks/results.
Kinds: `summary` and `paired` (as `fmlora table` prints them), `tuning` (one line a run: what differs from the
defaults), `changes` (FM-LoRA with one thing changed, against the defaults), `prediction_rules`, `machine_time` and
`overview`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import machine_time
import prediction_rules

from avalanche_fmlora import FM_LORA_CLASSIFIER
from avalanche_fmlora.results.grouping import BEFORE, flat, natural
from avalanche_fmlora.results.record import Record, read_records
from avalanche_fmlora.results.table import paired_rows, render, render_paired, summary_rows, write_csvs
from avalanche_fmlora.strategies.registry import method

BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results"
READMES = (BENCHMARKS / "README.md", BENCHMARKS.parent / "README.md")
MARKED = re.compile(r"(<!-- table: (\w+) ?(\S*) -->\n).*?(\n<!-- end of table -->)", re.DOTALL)
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
HEAD = ("classifier", "row_transport", "whitening", "whitening_covariance", "recurring_rows", "pooling")


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
        cells = " | ".join("–" if value is None else f"{100 * value:.1f}" for value in shown)
        lines.append((record["config"]["method"], setting(record), cells))
    ordered = sorted(lines, key=lambda line: (line[0], natural(line[1])))
    rows = [f"| `{name}` | {text} | {cells} |" for name, text, cells in ordered]
    return "\n".join(["| method | setting | FAA | forgetting | learning accuracy |", "|---|---|---|---|---|", *rows])


def changes(folder: str) -> str:
    """FM-LoRA with one thing changed: means, and the difference to the defaults."""
    records = records_of(folder)
    differences = {row["label"]: row for row in paired_rows(records, "fm_lora") if row["metric"] == FAA}
    ranks: dict[str | None, list[int]] = {}
    for record in records:
        later = [e["rank"] for e in record["experiences"][1:] if e["rank"] is not None]
        ranks.setdefault(record["config"]["label"], []).extend(later)
    lines = [
        "| FM-LoRA | FAA | Δ FAA | forgetting | learning accuracy | mean rank | trained a task | stored |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary_rows(records):
        label = row["label"]
        cells = [label or "**defaults**", _spread(row, FAA)]
        cells.append(_difference(differences[label]) if label in differences else "–")
        cells += [_spread(row, "forgetting", n=False), _spread(row, "learning_accuracy", n=False)]
        cells.append(f"{fmean(ranks[label]):.1f}" if ranks[label] else "–")
        cells += [f"{row[f'{kind}_parameters_mean']:,.0f}" for kind in ("trainable", "stored")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overview(_: str) -> str:
    """The table of the top README: each method on three test beds."""
    beds = {
        bed: {(row["method"], row["label"]): row for row in summary_rows(records_of(bed))}
        for bed in ("caltech100", "emoji20", "split_glyphs")
    }
    lines = [
        "| method | Caltech-100 | forgetting | emoji | split_glyphs | forgetting | stored besides head (ViT-S) |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = sorted(beds["caltech100"], key=lambda key: -beds["caltech100"][key]["final_average_accuracy_mean"])
    keys.sort(key=lambda key: (key[0] == "joint", key != ("fm_lora", None)))
    for key in keys:
        if key[1] is not None and key not in LABELS:
            continue
        on = [rows.get(key) for rows in beds.values()]
        cells = [f"`{key[0]}`" + LABELS.get(key, ""), _spread(on[0], FAA), _spread(on[0], "forgetting", n=False)]
        cells += [_spread(on[1], FAA), _spread(on[2], FAA), _spread(on[2], "forgetting", n=False)]
        stored = beds["caltech100"][key]
        statistics = stored["stored_statistics_mean"]
        cells.append(
            f"{stored['stored_parameters_mean']:,.0f}" + (f" + {statistics:,.0f} of statistics" if statistics else "")
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def setting(record: Record) -> str:
    """In words, what a run has that the method's defaults don't have."""
    config = record["config"]
    own = {**BEFORE, **flat(config["method_options"])}
    defaults = flat(method(config["method"]).config_class().model_dump(mode="json"))
    ours = config["method"] == "fm_lora"
    parts = []
    if ours:
        parts += ["class token"] if own["pooling"] == "model" else []
    elif own["whitening"] is not None:
        parts.append(_head(own, all_at_once=config["method"] == "joint"))
    elif own["pooling"] != defaults["pooling"]:
        parts.append("token and mean")
    for key, value in sorted(own.items(), key=lambda item: item[0] not in RATES):
        if key in HEAD or key in SAID_IN_THE_TEXT:
            continue
        if value != defaults.get(key, value) or (key in RATES and not ours):
            parts.append(f"{key} {_shown(value)}")
    if ours:
        parts += ["rank_selection null"] if "rank_selection" in own else []
        parts += _fm_head(own)
    training = config["training"]
    parts += [f"batches of {training['batch_size']}"] if training["batch_size"] != USUAL["batch_size"] else []
    parts += [f"{training['epochs']} epochs"] if training["epochs"] != USUAL["epochs"] else []
    order = record["seeds"]["class_order_seed"]
    parts += [f"order {order}"] if order != 100 else []
    return "; ".join(parts) or "defaults"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "null" if value is None else str(value)


def _head(own: dict[str, Any], all_at_once: bool) -> str:
    """FM-LoRA's head, and what is not its own; where all data come at once, covariances are one and the same."""
    where = "" if own["pooling"] == FM_LORA_CLASSIFIER["pooling"] else " on the class token"
    same = all_at_once or (not where and own["whitening_covariance"] == FM_LORA_CLASSIFIER["whitening_covariance"])
    return f"FM-LoRA's head{where}" + ("" if same else f", {COVARIANCES[own['whitening_covariance']]}")


def _fm_head(own: dict[str, Any]) -> list[str]:
    if own["classifier"] != "class_mean":
        return [f"{own['classifier']} head"]
    if own["whitening"] is None:
        return ["no whitening"]
    return [] if own["whitening_covariance"] == "secant" else [COVARIANCES[own["whitening_covariance"]]]


def _spread(row: dict[str, Any] | None, key: str, n: bool = True) -> str:
    if row is None or row[f"{key}_mean"] is None:
        return "–"
    std = row[f"{key}_std"]
    text = f"{100 * row[f'{key}_mean']:.1f} ± " + ("–" if std is None else f"{100 * std:.1f}")
    if key in (row["best"] or "").split():
        text = f"**{text}**"
    return f"{text} ({row['n']})" if n else text


def _difference(row: dict[str, Any]) -> str:
    text = f"{-100 * row['difference_mean']:+.1f}"
    if row["low"] is not None:
        text += f" [{-100 * row['high']:.1f}, {-100 * row['low']:.1f}]"
    return f"**{text}**" if row["excludes_zero"] else text


KINDS: dict[str, Callable[[str], str]] = {
    "summary": summary,
    "paired": paired,
    "tuning": tuning,
    "changes": changes,
    "overview": overview,
    "machine_time": lambda _: machine_time.table(),
    "prediction_rules": lambda _: prediction_rules.table(RESULTS / "prediction_rules.csv"),
}


def filled(text: str) -> str:
    """A text with each marked table as the records give it."""
    return MARKED.sub(lambda found: f"{found[1]}\n{KINDS[found[2]](found[3])}\n{found[4]}", text)


def main() -> None:
    """Rewrite CSVs and READMEs."""
    for records in sorted(RESULTS.rglob("records")):
        write_csvs(read_records(records), records.parent)
    for path in READMES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
