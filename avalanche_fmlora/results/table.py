"""Result records -> tables, as pure functions: the same records give the same bytes in any order.

``*_rows`` give plain rows without pandas, so that ``fmlora table`` answers at once; ``*_frame`` give the same as
pandas. Accuracies are fractions, drawn in per cent by :func:`render` and :func:`render_paired` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from avalanche_fmlora.results.grouping import Row, benchmark_name
from avalanche_fmlora.results.paired import METRICS, PAIRED_COLUMNS, paired_rows
from avalanche_fmlora.results.record import write_atomically
from avalanche_fmlora.results.render import Format, csv_text, render, render_paired
from avalanche_fmlora.results.rows import (
    INTEGERS,
    MATRIX_COLUMNS,
    RANK_COLUMNS,
    RUN_COLUMNS,
    SUMMARY_COLUMNS,
    TEXTS,
    matrix_rows,
    ranks_rows,
    runs_rows,
    summary_rows,
)
from avalanche_fmlora.results.schema import Record

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "MATRIX_COLUMNS",
    "METRICS",
    "PAIRED_COLUMNS",
    "RANK_COLUMNS",
    "RUN_COLUMNS",
    "SUMMARY_COLUMNS",
    "Format",
    "Row",
    "benchmark_name",
    "matrix_frame",
    "matrix_rows",
    "paired_frame",
    "paired_rows",
    "ranks_frame",
    "ranks_rows",
    "render",
    "render_paired",
    "runs_frame",
    "runs_rows",
    "summary_frame",
    "summary_rows",
    "write_csvs",
]


def runs_frame(records: Iterable[Record]) -> pd.DataFrame:
    """:func:`runs_rows` as pandas."""
    return _frame(runs_rows(records), RUN_COLUMNS)


def matrix_frame(records: Iterable[Record]) -> pd.DataFrame:
    """:func:`matrix_rows` as pandas."""
    return _frame(matrix_rows(records), MATRIX_COLUMNS)


def ranks_frame(records: Iterable[Record]) -> pd.DataFrame:
    """:func:`ranks_rows` as pandas."""
    return _frame(ranks_rows(records), RANK_COLUMNS)


def summary_frame(records: Iterable[Record]) -> pd.DataFrame:
    """:func:`summary_rows` as pandas."""
    return _frame(summary_rows(records), SUMMARY_COLUMNS)


def paired_frame(records: Iterable[Record], reference: str | None = None) -> pd.DataFrame:
    """:func:`paired_rows` as pandas."""
    return _frame(paired_rows(records, reference), PAIRED_COLUMNS)


def write_csvs(records: Iterable[Record], folder: str | Path, reference: str | None = None) -> dict[str, Path]:
    """Write ``runs.csv``, ``matrix.csv``, ``ranks.csv``, ``summary.csv`` and ``paired.csv``, each atomically.

    Missing values are empty.

    Args:
        records: runs of any benchmarks and protocols.
        folder: where to.
        reference: what paired differences are from, as in :func:`paired_rows`.

    Raises:
        ValueError: if no method is called `reference`; nothing is written then.

    Returns:
        The path of each, under ``"runs"``, ``"matrix"``, ``"ranks"``, ``"summary"`` and ``"paired"``.
    """
    records = list(records)
    tables = {
        "runs": (RUN_COLUMNS, runs_rows(records)),
        "matrix": (MATRIX_COLUMNS, matrix_rows(records)),
        "ranks": (RANK_COLUMNS, ranks_rows(records)),
        "summary": (SUMMARY_COLUMNS, summary_rows(records)),
        "paired": (PAIRED_COLUMNS, paired_rows(records, reference)),
    }
    return {
        name: write_atomically(Path(folder) / f"{name}.csv", csv_text([columns, *(row.values() for row in rows)]))
        for name, (columns, rows) in tables.items()
    }


def _frame(rows: Sequence[Row], columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    dtypes = {c: "Int64" if c in INTEGERS else "object" if c in TEXTS else "float64" for c in columns}
    dtypes |= {c: "boolean" for c in columns if c == "excludes_zero"}
    frame: pd.DataFrame = pd.DataFrame(rows, columns=list(columns), dtype=object).astype(dtypes)
    return frame
