"""The accuracy matrix as a heat map: a panel a method, one scale."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from avalanche_fmlora.metrics import Matrix
from avalanche_fmlora.results.figures.labels import wrapped
from avalanche_fmlora.results.figures.style import WIDTH_IN, column_figure, new_figure, per_cent, series_of
from avalanche_fmlora.results.schema import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@column_figure
def accuracy_matrix(records: Iterable[Record]) -> Figure:
    """Accuracy on each experience (across) after training on each (down), mean over runs.

    One method gets the whole width, with the numbers in per cent where there are at most 10 experiences; several are
    panels side by side. Joint training, of which one row is known, is left out.

    Args:
        records: finished runs of one benchmark and protocol.

    Raises:
        ValueError: if there is none, or if they are of several protocols.
    """
    import numpy as np

    series = [s for s in series_of(records) if s.runs[0].record["accuracy_matrix"][0][0] is not None]
    if not series:
        raise ValueError(
            "Expected runs that were evaluated after each experience, but joint training is only at the end."
        )
    means = [np.array([run.record["accuracy_matrix"] for run in s.runs], dtype=float).mean(0) for s in series]
    columns = min(len(series), 2 if len(series) <= 4 else 3)
    rows = math.ceil(len(series) / columns)
    figure = new_figure(2.9 if len(series) == 1 else rows * ((WIDTH_IN - 0.85) / columns + 0.27) + 0.25)
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    low, high = (float(f([f(m) for m in means])) for f in (np.nanmin, np.nanmax))
    for axes, one, mean in zip(grid, series, means, strict=False):
        runs = f", n = {len(one.runs)}" if columns == 1 else ""
        _panel(axes, mean, wrapped(one.name, 24 if columns < 3 else 16) + runs, low, high)
        if len(series) == 1 and len(mean) <= 10:
            _numbers(axes, mean, (low + high) / 2)
    for axes in grid[len(series) :]:
        axes.set_visible(False)
    _frame(figure, grid[0].images[0], shrink=0.8 if rows == 1 else 0.5)
    return figure


@column_figure
def heat_map(R: Matrix, title: str = "") -> Figure:
    """:func:`accuracy_matrix` of a single matrix: of :func:`avalanche_fmlora.metrics.matrix_of`, say.

    Args:
        R: accuracy on experience i (across) after training on t (down), fractions, shape [T, T]; what is unknown (NaN
            or None) stays empty.
        title: above it.
    """
    import numpy as np

    matrix = np.array(R, dtype=float)
    figure = new_figure(2.9)
    axes = figure.subplots()
    low, high = float(np.nanmin(matrix)), float(np.nanmax(matrix))
    _panel(axes, matrix, title, low, high)
    if len(matrix) <= 10:
        _numbers(axes, matrix, (low + high) / 2)
    _frame(figure, axes.images[0], shrink=0.8)
    return figure


def _panel(axes: Axes, matrix: Any, title: str, low: float, high: float) -> None:
    axes.imshow(matrix, cmap="cividis", vmin=low, vmax=high, aspect="equal")
    _ticks(axes, len(matrix))
    axes.set_title(title)


def _frame(figure: Figure, image: Any, shrink: float) -> None:
    """Names of the axes and the scale, once for all panels."""
    figure.supxlabel("evaluated on experience", fontsize=7)
    figure.supylabel("after training on experience", fontsize=7)
    bar = figure.colorbar(image, ax=figure.axes, shrink=shrink, pad=0.02, aspect=25)
    per_cent(bar.ax.yaxis)
    bar.set_label("accuracy [%]")
    bar.outline.set_linewidth(0.4)


def _ticks(axes: Axes, count: int) -> None:
    """Experiences counted from 1, at most ten of them named."""
    step = max(1, math.ceil(count / 5)) if count > 10 else (1 if count <= 5 else 3)
    places = range(0, count, step)
    axes.set_xticks(places, [str(t + 1) for t in places])
    axes.set_yticks(places, [str(t + 1) for t in places])
    axes.tick_params(length=1.5, pad=1.5)


def _numbers(axes: Axes, matrix: Any, middle: float) -> None:
    for t, row in enumerate(matrix):
        for i, value in enumerate(row[: t + 1]):
            colour = "white" if value < middle else "black"
            axes.text(i, t, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=colour)
