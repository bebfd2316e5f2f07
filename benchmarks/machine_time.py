"""How long the runs behind the tables took: python benchmarks/machine_time.py

One line for each folder of records below benchmarks/results: how many runs, and hours of training and testing, which is
one CPU core each. Runs that left no record (interrupted, or thrown away with an earlier definition) are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from avalanche_fmlora.results.record import Record, read_records

RESULTS = Path(__file__).parent / "results"


def hours(records: Iterable[Record]) -> float:
    """Of training and testing."""
    return sum((r["cost"]["train_s"] or 0) + (r["cost"]["eval_s"] or 0) for r in records) / 3600


def table() -> str:
    """Markdown: a row for each folder, and all runs, those once that are in two folders."""
    found = {p.parent.relative_to(RESULTS): read_records(p) for p in sorted(RESULTS.rglob("records"))}
    lines = ["| records | runs | hours on one core |", "|---|---|---|"]
    lines += [f"| `{name}` | {len(records)} | {hours(records):.1f} |" for name, records in found.items()]
    different = {r["id"]: r for records in found.values() for r in records}
    return "\n".join([*lines, f"| all, each run once | {len(different)} | {hours(different.values()):.1f} |"])


if __name__ == "__main__":
    print(table())
