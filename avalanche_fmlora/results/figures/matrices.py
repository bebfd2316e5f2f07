"""The accuracy matrix as a heat map: a panel a method, one scale."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from avalanche_fmlora.results.figures.labels import wrapped
from avalanche_fmlora.results.figures.style import WIDTH_IN, column_figure, new_figure, per_cent, series_of
from avalanche_fmlora.results.schema import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from avalanche_fmlora.metrics import Matrix


@column_figure
def accuracy_matrix(records: Iterable[Record], only: Collection[str] | None = None) -> Figure:
    """Accuracy on each experience (across) after training on each (down), mean over runs.

    One method gets the whole width, with the numbers in per cent where there are at most 10 experiences; several are
    panels side by side. Joint training, of which one row is known, is left out.

    Args:
        records: finished runs of one benchmark and protocol.
        only: ids of the records to draw; names and looks stay those among all `records`. All if None.

    Raises:
        ValueError: if there is none, or if they are of several protocols.
    """
    import numpy as np

    series = [s for s in series_of(records, only) if s.runs[0].record["accuracy_matrix"][0][0] is not None]
    if not series:
        raise ValueError(
            "Expected runs that were evaluated after each experience, but joint training is only at the end."
        )
    means = [np.array([run.record["accuracy_matrix"] for run in s.runs], dtype=float).mean(0) for s in series]
    count = f", n = {len(series[0].runs)}" if len(series) == 1 else ""
    return _panels([one.name for one in series], means, count)


@column_figure
def heat_maps(matrices: Mapping[str, Matrix]) -> Figure:
    """The picture of :func:`accuracy_matrix` for accuracy matrices of one's own, on one scale.

    Args:
        matrices: name -> fractions, shape [T, T], the same T for all; what is unknown (NaN or None) stays empty. See
            :func:`avalanche_fmlora.metrics.matrix_of`.

    Raises:
        ValueError: if there is none, or if they differ in shape.
    """
    import numpy as np

    arrays = [np.array(R, dtype=float) for R in matrices.values()]
    shapes = sorted({R.shape for R in arrays})
    if len(shapes) != 1:
        raise ValueError(f"Expected matrices of one shape [T, T] but got {shapes or 'none'}: draw a figure for each.")
    return _panels(list(matrices), arrays)


def _panels(names: Sequence[str], matrices: Sequence[Any], after_name: str = "") -> Figure:
    import numpy as np

    columns = min(len(names), 2 if len(names) <= 4 else 3)
    rows = math.ceil(len(names) / columns)
    figure = new_figure(2.9 if len(names) == 1 else rows * ((WIDTH_IN - 0.85) / columns + 0.27) + 0.25)
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    low, high = (float(f([f(m) for m in matrices])) for f in (np.nanmin, np.nanmax))
    for axes, name, matrix in zip(grid, names, matrices, strict=False):
        axes.imshow(matrix, cmap="cividis", vmin=low, vmax=high, aspect="equal")
        _ticks(axes, len(matrix))
        axes.set_title(wrapped(name, 24 if columns < 3 else 13) + after_name)
        if len(matrix) <= (10, 6, 4)[columns - 1]:
            _numbers(axes, matrix, (low + high) / 2)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    _frame(figure, grid[0].images[0], shrink=0.8 if rows == 1 else 0.5)
    return figure


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
            if math.isnan(value):
                continue
            colour = "white" if value < middle else "black"
            axes.text(i, t, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=colour)
