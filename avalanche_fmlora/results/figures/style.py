"""What the figures share: the width of a column, lines that differ without colour, files."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

from avalanche_fmlora.results.grouping import JOINT, Run, apart_of, groups_of
from avalanche_fmlora.results.paired import DEFAULT_REFERENCE
from avalanche_fmlora.results.record import write_atomically
from avalanche_fmlora.results.schema import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

WIDTH_IN = 3.3
SCREEN_DPI = 160
"""Dots an inch on a notebook's page, where files of 300 would be twice as wide as the text and as heavy."""
_RC: Any = {
    "font.size": 7.0,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.0,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.5,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.35,
    "svg.hashsalt": "avalanche_fmlora",
    "text.parse_math": False,
}
# After Okabe and Ito, whose colours stay apart for colour-blind readers; line and marker tell them apart in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B85C95", "#3A95C9", "#C28500", "#666666", "#882255")
_LINES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
_MARKERS = "sD^vP*X<>ph"
_GREY = "0.35"


class Look(NamedTuple):
    """How a method is drawn in every figure of the same records."""

    colour: str
    line: Any
    marker: str
    width: float


class Series(NamedTuple):
    """The finished runs of one row of the table."""

    name: str
    runs: list[Run]
    apart: str | None
    look: Look


def column_figure(make: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with the fonts and lines that suit the width of a column."""

    @functools.wraps(make)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(_RC):
            return make(*args, **kwargs)

    return drawn


def new_figure(height_in: float) -> Figure:
    """An empty figure of the width of a column, which a notebook shows by itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class ColumnFigure(Figure):
        def _repr_png_(self) -> bytes:
            return as_bytes(self, "png", SCREEN_DPI)

    # The figure's own dots too: once pyplot is imported, IPython draws any figure with these.
    figure = ColumnFigure(figsize=(WIDTH_IN, height_in), layout="constrained", dpi=SCREEN_DPI)
    FigureCanvasAgg(figure)
    return figure


def series_of(records: Iterable[Record], only: Collection[str] | None = None) -> list[Series]:
    """The finished runs by method and label, FM-LoRA first, each with the name and look that it has among all.

    Args:
        records: of one benchmark and protocol.
        only: ids of those that are wanted; all if None.

    Raises:
        ValueError: if there is none, or if they are of several benchmarks or protocols.
    """
    groups = [[run for run in group if run.finished] for group in groups_of(records)]
    groups = [group for group in groups if group]
    protocols = sorted({" ".join(filter(None, (g[0].benchmark, g[0].protocol))) for g in groups})
    if len(protocols) != 1:
        raise ValueError(
            f"Expected finished records of one benchmark and protocol but got {protocols or 'none'}: put each into a "
            "folder of its own, or take one of `avalanche_fmlora.results.grouping.protocols_of(records)`."
        )
    groups.sort(key=lambda g: (g[0].record["config"]["method"] != DEFAULT_REFERENCE, g[0].name))
    found: list[Series] = []
    others = 0
    for group in groups:
        apart = apart_of(group)
        if not found and group[0].record["config"]["method"] == DEFAULT_REFERENCE:
            look = Look("black", "-", "o", 1.5)
        elif apart == JOINT:
            look = Look(_GREY, (0, (1, 2)), "D", 0.9)
        else:
            k, others = others, others + 1
            look = Look(_COLOURS[k % len(_COLOURS)], _LINES[k % len(_LINES)], _MARKERS[k % len(_MARKERS)], 1.0)
        found.append(Series(group[0].name, group, apart, look))
    wanted = [one for one in found if only is None or any(run.record["id"] in only for run in one.runs)]
    if not wanted:
        raise ValueError("Expected finished runs among those that are to be drawn but there is none.")
    return wanted


def title(series: Sequence[Series]) -> str:
    """Benchmark and number of runs."""
    counts = sorted({len(s.runs) for s in series})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    return f"{series[0].runs[0].benchmark}, n = {n} run{'s' if counts[-1] > 1 else ''}"


def per_cent(axis: Any) -> None:
    """Fractions as per cent."""
    axis.set_major_formatter(lambda value, _: f"{round(100 * value, 6) + 0.0:g}")


def save(figure: Figure, path: str | Path) -> Path:
    """Write PNG, SVG or PDF, by the ending of `path`; the same figure gives the same SVG.

    Raises:
        ValueError: for another ending.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"Expected a file that ends in .png, .svg or .pdf but got {path}.")
    return write_atomically(path, as_bytes(figure, suffix[1:]))


def as_bytes(figure: Figure, format: str, dpi: int = 300) -> bytes:
    """The figure as PNG (of `dpi` dots an inch), SVG or PDF, without the time it was made."""
    import matplotlib

    buffer = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(format)
    with matplotlib.rc_context(_RC):
        figure.savefig(buffer, format=format, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def whole_ticks(axes: Axes) -> None:
    """Ticks of experiences along x: at most some ten, at whole numbers, the first experience among them."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    first, last = math.ceil(axes.dataLim.x0), math.floor(axes.dataLim.x1)
    ticks = [tick for tick in MaxNLocator(10, integer=True).tick_values(first, last) if first < tick <= last]
    axes.xaxis.set_major_locator(FixedLocator([first, *ticks]))
