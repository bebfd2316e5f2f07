"""Accuracy and forgetting over the experiences: a line a method, a band of one standard deviation over runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from avalanche_fmlora.results.figures.labels import label_lines, names_height_in, wrapped
from avalanche_fmlora.results.figures.style import (
    Series,
    column_figure,
    new_figure,
    per_cent,
    series_of,
    title,
    whole_ticks,
)
from avalanche_fmlora.results.schema import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@column_figure
def accuracy_over_experiences(records: Iterable[Record], only: Collection[str] | None = None) -> Figure:
    """Mean accuracy over the experiences seen so far; a method of which only the end is known is a level line.

    Args:
        records: finished runs of one benchmark and protocol; failed ones are left out.
        only: ids of the records to draw; names and looks stay those among all `records`. All if None.

    Raises:
        ValueError: if there is none, or if they are of several protocols.
    """
    import numpy as np

    series = series_of(records, only)
    figure = new_figure(0.6 + _panel_in(series))
    axes = figure.subplots()
    ends = []
    for one in series:
        curves = np.array([[_seen(row, t) for t, row in enumerate(_matrix(run.record))] for run in one.runs])
        ends.append(_draw(axes, one, curves, first=1))
    axes.set_xlabel("experiences learned")
    axes.set_ylabel("accuracy on all seen [%]")
    _finish(axes, series, ends)
    return figure


@column_figure
def forgetting(records: Iterable[Record], only: Collection[str] | None = None) -> Figure:
    """Above: forgetting over the experiences; below: at the end, a bar a method with the standard deviation over runs.

    After experience t it is the mean over earlier experiences of the best accuracy so far minus the accuracy now.

    Args:
        records: finished runs of one benchmark and protocol; joint training has no forgetting and is left out.
        only: ids of the records to draw; names and looks stay those among all `records`. All if None.

    Raises:
        ValueError: if there is none, or if they are of several protocols, or of a single experience.
    """
    import numpy as np

    series = [
        s for s in series_of(records, only) if any(run.record["metrics"]["forgetting"] is not None for run in s.runs)
    ]
    if not series:
        raise ValueError("Expected runs of at least two experiences learned in turn, since forgetting needs them.")
    bars = 0.3 + sum(0.1 + 0.08 * len(wrapped(one.name, 16).splitlines()) for one in series)
    lines = _panel_in(series)
    figure = new_figure(0.9 + lines + bars)
    above, below = figure.subplots(2, height_ratios=[lines, bars])
    ends = []
    for one in series:
        curves = np.array([_forgetting(_matrix(run.record)) for run in one.runs])
        ends.append(_draw(above, one, curves, first=2))
    above.set_xlabel("experiences learned")
    above.set_ylabel("forgetting [points]")
    above.set_ylim(bottom=min(0.0, above.get_ylim()[0]))
    _finish(above, series, ends)
    _bars(below, series)
    return figure


def _panel_in(series: Sequence[Series]) -> float:
    """Height of a panel beside which all names find a place."""
    return max(1.9, 1.05 * names_height_in([one.name for one in series]))


def _matrix(record: Record) -> Any:
    import numpy as np

    return np.array(record["accuracy_matrix"], dtype=float)


def _seen(row: Any, t: int) -> float:
    """Mean over experiences up to t; NaN where one isn't known."""
    return float(row[: t + 1].mean())


def _forgetting(matrix: Any) -> list[float]:
    """After each experience but the first; NaN where unknown."""
    import numpy as np

    count = len(matrix)
    drops = [np.nanmax(matrix[:t, :t], axis=0) - matrix[t, :t] for t in range(1, count) if not np.isnan(matrix[0, 0])]
    return [float(drop.mean()) for drop in drops] or [float("nan")] * (count - 1)


def _draw(axes: Axes, one: Series, curves: Any, first: int) -> tuple[str, float, float, str]:
    """The line, and (name, x, y, colour) of its end; `first` is the number of experiences at the first point."""
    import numpy as np

    mean, colour, x = curves.mean(0), one.look.colour, np.arange(first, first + curves.shape[1])
    if np.isnan(mean[0]):
        axes.axhline(mean[-1], color=colour, linestyle=one.look.line, linewidth=one.look.width)
        return one.name, float(x[-1]), float(mean[-1]), colour
    every = max(1, len(x) // 10)
    axes.plot(
        x, mean, linestyle=one.look.line, marker=one.look.marker, color=colour, lw=one.look.width, markevery=every
    )
    if len(curves) > 1:
        std = curves.std(0, ddof=1)
        axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    return one.name, float(x[-1]), float(mean[-1]), colour


def _finish(axes: Axes, series: Sequence[Series], ends: Sequence[tuple[str, float, float, str]]) -> None:
    per_cent(axes.yaxis)
    whole_ticks(axes)
    axes.set_title(title(series), loc="left")
    axes.grid()
    label_lines(axes, ends)


def _bars(axes: Axes, series: Sequence[Series]) -> None:
    import numpy as np

    values = [[v for run in s.runs if (v := run.record["metrics"]["forgetting"]) is not None] for s in series]
    order = sorted(range(len(series)), key=lambda k: -float(np.mean(values[k])))
    means = [float(np.mean(values[k])) for k in order]
    stds = [float(np.std(values[k], ddof=1)) if len(values[k]) > 1 else 0.0 for k in order]
    axes.barh(range(len(order)), means, color="0.82", edgecolor="0.35", linewidth=0.5, height=0.65)
    if any(stds):
        axes.errorbar(means, range(len(order)), xerr=stds, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
    for k, (mean, std) in enumerate(zip(means, stds, strict=True)):
        place = (max(mean + std, 0), k)
        axes.annotate(f"{100 * mean:.1f}", place, (3, 0), textcoords="offset points", va="center", fontsize=6.5)
    axes.set_yticks(range(len(order)), [wrapped(series[k].name, 16) for k in order])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("forgetting at the end [points]" + (" ± standard deviation" if any(stds) else ""))
    axes.margins(x=0.12)
    per_cent(axes.xaxis)
