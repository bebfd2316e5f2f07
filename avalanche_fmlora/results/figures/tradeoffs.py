"""Accuracy against what it costs: stored and trained parameters, training time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from avalanche_fmlora.results.figures.labels import Point, label_points, legend_height_in
from avalanche_fmlora.results.figures.style import (
    column_figure,
    new_figure,
    per_cent,
    series_of,
    title,
)
from avalanche_fmlora.results.grouping import JOINT
from avalanche_fmlora.results.schema import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@column_figure
def accuracy_against_parameters(records: Iterable[Record], only: Collection[str] | None = None) -> Figure:
    """Final average accuracy against the parameters stored after the last experience, backbone and head left out.

    Args:
        records: finished runs of one benchmark and protocol.
        only: ids of the records to draw; names and looks stay those among all `records`. All if None.

    Raises:
        ValueError: if there is none, or if they are of several protocols.
    """
    return _scatter(
        records, only, lambda r: r["experiences"][-1]["stored_parameters"], "stored parameters besides the head"
    )


@column_figure
def accuracy_against_trained_parameters(records: Iterable[Record], only: Collection[str] | None = None) -> Figure:
    """Final average accuracy against the parameters trained an experience within the chosen rank, the head left out.

    The mean over experiences. Records from before this was counted are drawn as if the rank had left out nothing.

    Args:
        records: finished runs of one benchmark and protocol.
        only: ids of the records to draw; names and looks stay those among all `records`. All if None.

    Raises:
        ValueError: if there is none, or if they are of several protocols.
    """
    return _scatter(records, only, trained_an_experience, "parameters trained an experience, without the head")


@column_figure
def accuracy_against_cost(records: Iterable[Record], only: Collection[str] | None = None) -> Figure:
    """Final average accuracy against the seconds of training over all experiences, on the machine of the runs.

    Args:
        records: finished runs of one benchmark and protocol.
        only: ids of the records to draw; names and looks stay those among all `records`. All if None.

    Raises:
        ValueError: if there is none, or if they are of several protocols.
    """
    return _scatter(records, only, lambda r: r["cost"]["train_s"], "training time of the whole run [s]")


def trained_an_experience(record: Record) -> float:
    """Parameters trained an experience within the rank, averaged over experiences; all trainable ones if not known."""
    counts = [(e["trained_parameters"], e["trainable_parameters"]) for e in record["experiences"]]
    return fmean(trainable if trained is None else trained for trained, trainable in counts)


def _scatter(
    records: Iterable[Record], only: Collection[str] | None, cost: Callable[[Record], float | None], label: str
) -> Figure:
    """A point a method with its standard deviations; hollow, and a dotted line, for the upper bound."""
    import numpy as np

    series = series_of(records, only)
    figure = new_figure(2.4 + legend_height_in(len(series)))
    axes = figure.subplots()
    points = []
    for one in series:
        pairs = [(cost(run.record), run.record["metrics"]["final_average_accuracy"]) for run in one.runs]
        known = np.array([(x, y) for x, y in pairs if x is not None and y is not None], dtype=float)
        if not len(known):
            continue
        x, y = known.mean(0)
        dx, dy = known.std(0, ddof=1) if len(known) > 1 else (0.0, 0.0)
        look = one.look
        face = "white" if one.apart else look.colour
        axes.errorbar(x, y, dy or None, dx or None, fmt=look.marker, color=look.colour, mfc=face, elinewidth=0.7)
        if one.apart == JOINT:
            axes.axhline(y, color="0.6", linestyle=look.line, linewidth=0.7, zorder=0)
        points.append(Point(one.name, float(x), float(y), float(dx), float(dy), look.colour, look.marker, face))
    _log_axis(axes, [p.x for p in points])
    axes.set_xlabel(label)
    axes.set_ylabel("final average accuracy [%]")
    axes.margins(y=0.12)
    per_cent(axes.yaxis)
    axes.set_title(title(series), loc="left")
    axes.grid()
    label_points(axes, points)
    return figure


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic, with a place for zero where there is one; ticks as 1k or 2M."""
    from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

    positive = [value for value in values if value > 0]
    if not positive:
        return
    low, high = min(positive) / 1.6, max(positive) * 1.6
    zero = len(positive) < len(values)
    if zero:
        axes.set_xscale("symlog", linthresh=low, linscale=0.35)
        axes.set_xlim(-0.5 * low, high)
    else:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
    steps = (1, 2, 5) if high / low < 100 else (1,)
    ticks = [step * 10.0**power for power in range(-3, 15) for step in steps]
    axes.xaxis.set_major_locator(FixedLocator([0.0] * zero + [tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
