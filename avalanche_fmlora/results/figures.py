"""Figures as pure functions of records: readable in grey, at the width of a column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from avalanche_fmlora.results.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*Xdp"
_STYLES = ("-", "--", "-.", ":")


def accuracy_over_experiences(records: Sequence[Record]) -> Figure:
    """Mean accuracy over the experiences seen so far, a line a method, a band of one standard deviation over runs.

    Methods of which only the end is known (joint training) are a horizontal line.

    Args:
        records: finished runs of one benchmark and protocol.

    Raises:
        ValueError: if there is none, or if they are of several benchmarks.
    """
    import numpy as np
    from matplotlib.figure import Figure

    finished = [r for r in records if r["status"] == "finished"]
    names = sorted({(r["benchmark"]["name"], len(r["accuracy_matrix"])) for r in finished})
    if len(names) != 1:
        raise ValueError(
            f"Expected finished records of one benchmark but got {[n for n, _ in names] or 'none'}: "
            "put the records of each benchmark into a folder of its own."
        )
    groups: dict[str, list[list[float]]] = {}
    for record in finished:
        matrix = np.array(record["accuracy_matrix"], dtype=float)
        curve = [float(np.nanmean(row[: t + 1])) if not np.isnan(row[0]) else np.nan for t, row in enumerate(matrix)]
        groups.setdefault(record["config"]["label"] or record["config"]["method"], []).append(curve)
    figure = Figure(figsize=(5.0, 3.4), layout="constrained")
    axes = figure.subplots()
    order = sorted(groups, key=lambda name: -np.nanmean([c[-1] for c in groups[name]]))
    for i, name in enumerate(order):
        curves = np.array(groups[name])
        mean, std = curves.mean(0), curves.std(0, ddof=1) if len(curves) > 1 else np.zeros(curves.shape[1])
        x = np.arange(1, curves.shape[1] + 1)
        if np.isnan(mean[0]):
            axes.axhline(mean[-1], color="0.4", linestyle=":", label=f"{name} (all data at once)")
            continue
        style = _STYLES[i % len(_STYLES)]
        (line,) = axes.plot(x, mean, style, marker=_MARKERS[i % len(_MARKERS)], markersize=4, label=name)
        axes.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.15, linewidth=0)
    runs = {len(c) for c in groups.values()}
    axes.set_xlabel("experiences learned")
    axes.set_ylabel("accuracy on what was seen")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_title(f"{names[0][0]} ({'–'.join(str(n) for n in sorted(runs))} class orders)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write PNG, SVG or PDF, by the ending of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
