"""Where FM-LoRA stands on each test bed, from the records: python benchmarks/standings.py"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from avalanche_fmlora.results.grouping import runs_of
from avalanche_fmlora.results.record import Record, read_records
from avalanche_fmlora.results.render import Cell, Table, difference, draw, number, per_cent
from avalanche_fmlora.results.table import paired_rows, summary_rows

FAA = "final_average_accuracy"
FORGETTING = "forgetting"
OWN, SHARED, FOLLOWED = "its own", "FM-LoRA's", "FM-LoRA's, moved images"
BEDS = (
    ("Caltech-100", OWN, "caltech100"),
    ("Caltech-100", SHARED, "caltech100_same_head"),
    ("Caltech-100", FOLLOWED, "caltech100_moved_images"),
    ("emoji", OWN, "emoji20"),
    ("emoji", SHARED, "emoji20_same_head"),
    ("split_glyphs", OWN, "split_glyphs"),
    ("split_glyphs", FOLLOWED, "split_glyphs_same_head"),
)
HEADER = [
    "benchmark",
    "head of each",
    "FM-LoRA",
    "best other",
    "Δ FAA [points]",
    "higher FAA than",
    "forgets less than",
    "joint",
    "distance closed",
]


def table(results: Path) -> str:
    """A line for each test bed and head: FM-LoRA, the best other, whom it beats beyond chance, joint training.

    Rows with a label (variants of a method, frozen features with FM-LoRA's head among methods with their own) don't
    count. `distance closed` is FM-LoRA's share of the way from the best other to joint training, on the class orders
    that all three have.
    """
    rows = [[Cell(bed), Cell(head), *_cells(results / folder / "records")] for bed, head, folder in BEDS]
    return draw(Table(HEADER, rows, [None] * len(rows)), "markdown").strip()


def _cells(records: Path) -> list[Cell]:
    runs = best_settings([record for record in read_records(records) if record["config"]["label"] is None])
    means = {row["method"]: row for row in summary_rows(runs)}
    pairs = {(row["method"], row["metric"]): row for row in paired_rows(runs, "fm_lora")}
    ours, joint = means.pop("fm_lora"), means.pop("joint", None)
    best = max(means.values(), key=lambda row: float(row[f"{FAA}_mean"]))
    mean = per_cent(best, FAA)
    return [
        per_cent(ours, FAA)._replace(bold=False),
        Cell(f"`{best['method']}` {mean.main}", mean.tail),
        difference(pairs[best["method"], FAA]),
        _beaten(means, lambda method: pairs[method, FAA], 1),
        _beaten(means, lambda method: pairs[method, FORGETTING], -1),
        Cell("–") if joint is None else per_cent(joint, FAA),
        Cell("–") if joint is None else _closed(*_on_common_orders(runs, (best["method"], "fm_lora", "joint"))),
    ]


def best_settings(records: Sequence[Record]) -> list[Record]:
    """Of a method with several settings, the runs of the one with the highest mean."""
    ordered = sorted(summary_rows(records), key=lambda row: float(row[f"{FAA}_mean"]))
    best = {row["method"]: row["label"] for row in ordered}
    return [run.record for run in runs_of(records) if run.label == best[run.record["config"]["method"]]]


def _on_common_orders(runs: Sequence[Record], names: Sequence[str]) -> list[float]:
    """Mean final average accuracy of each method over the class orders that all of them have."""
    found: dict[str, dict[int | None, float]] = {name: {} for name in names}
    for record in runs:
        accuracy = record["metrics"]["final_average_accuracy"]
        if record["config"]["method"] in found and accuracy is not None:
            found[record["config"]["method"]][record["config"]["class_order_seed"]] = accuracy
    common = set.intersection(*map(set, found.values()))
    return [fmean(of[order] for order in common) for of in found.values()]


def _beaten(methods: Iterable[str], pair_of: Callable[[str], Mapping[str, Any]], sign: int) -> Cell:
    """Whose paired interval excludes zero on FM-LoRA's side: `all 9`, `7 of 9, not …`, `1 of 9: …` or `none of 9`."""
    beaten = {m: pair_of(m)["excludes_zero"] and sign * pair_of(m)["difference_mean"] > 0 for m in methods}
    those, others = ([m for m in sorted(beaten) if bool(beaten[m]) is side] for side in (True, False))
    if not those or not others:
        return Cell(f"{'all' if those else 'none of'} {len(beaten)}")
    few = len(those) < len(others)
    named = ", ".join(f"`{method}`" for method in (those if few else others))
    return Cell(f"{len(those)} of {len(beaten)}{': ' if few else ', not '}{named}")


def _closed(best: float, ours: float, joint: float) -> Cell:
    """The share of the way from the best other to joint training; none where joint training is not above it."""
    return Cell(f"{number(100 * (ours - best) / (joint - best))} %" if joint > best else "–")


if __name__ == "__main__":
    print(table(Path(__file__).parent / "results"))
