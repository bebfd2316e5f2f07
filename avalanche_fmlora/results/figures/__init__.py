"""Figures as pure functions of records: matplotlib figures as wide as a column, readable in grey.

Each takes the records of one benchmark and protocol, as ``read_records`` gives them; :func:`save` writes PNG, SVG or
PDF.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

from avalanche_fmlora.results.figures.curves import accuracy_over_experiences, forgetting
from avalanche_fmlora.results.figures.matrices import accuracy_matrix, heat_maps
from avalanche_fmlora.results.figures.ranks import rank
from avalanche_fmlora.results.figures.style import as_bytes, save
from avalanche_fmlora.results.figures.tradeoffs import (
    accuracy_against_cost,
    accuracy_against_parameters,
    accuracy_against_trained_parameters,
)
from avalanche_fmlora.results.grouping import protocols_of
from avalanche_fmlora.results.schema import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS: dict[str, Callable[[Iterable[Record], Collection[str] | None], Figure]] = {
    "accuracy": accuracy_over_experiences,
    "matrix": accuracy_matrix,
    "forgetting": forgetting,
    "rank": rank,
    "params": accuracy_against_parameters,
    "trained": accuracy_against_trained_parameters,
    "cost": accuracy_against_cost,
}
"""Every figure by the name that ``fmlora plot --kind`` knows."""


def draw(
    records: Iterable[Record], kinds: Iterable[str], only: Collection[str] | None = None
) -> dict[str, Figure | str]:
    """Figures of each benchmark and protocol, under names for files; a text says why one can't be drawn.

    Args:
        records: runs of any benchmarks and protocols.
        kinds: keys of :data:`KINDS`.
        only: ids of the records to draw, named and coloured as among all; all if None.
    """
    protocols = protocols_of(records)
    with_results = {key: own for key, own in protocols.items() if any(r["status"] == "finished" for r in own)}
    protocols = with_results or protocols
    if only is not None:
        protocols = {key: own for key, own in protocols.items() if any(r["id"] in only for r in own)}
    benchmarks = [benchmark for benchmark, _, _ in protocols]
    figures: dict[str, Figure | str] = {}
    for kind in kinds:
        for (benchmark, identity, _), own in protocols.items():
            parts = [kind] + [benchmark] * (len(set(benchmarks)) > 1) + [identity] * (benchmarks.count(benchmark) > 1)
            try:
                figures["-".join(parts)] = KINDS[kind](own, only)
            except ValueError as error:
                figures["-".join(parts)] = str(error)
    return figures


__all__ = [
    "KINDS",
    "accuracy_against_cost",
    "accuracy_against_parameters",
    "accuracy_against_trained_parameters",
    "accuracy_matrix",
    "accuracy_over_experiences",
    "as_bytes",
    "draw",
    "forgetting",
    "heat_maps",
    "rank",
    "save",
]
