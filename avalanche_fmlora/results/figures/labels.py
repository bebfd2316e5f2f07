"""Names beside what they name, moved apart where they would overlap."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE_PT = 7.5
MOST_NAMED = 10
"""Points that :func:`label_points` names in the panel; with more they have numbers."""


def wrapped(name: str, width: int = 20) -> str:
    """A name on at most two lines, cut short if need be."""
    return "\n".join(textwrap.wrap(name, width, max_lines=2, placeholder="…"))


def label_lines(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Names at the right of the axes, beside the ends (name, x, y, colour) of lines, moved apart where they overlap."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    line_height = _LINE_PT * figure.dpi / 72 / axes.get_window_extent().height
    low, high = axes.get_ylim()
    entries = []
    for name, x, y, colour in ends:
        text = wrapped(name)
        entries.append([(y - low) / (high - low), (text.count("\n") + 1) * line_height, text, x, y, colour])
    entries.sort(key=lambda e: -e[0])
    places = _apart([e[0] for e in entries], [e[1] for e in entries])
    for place, (_, _, text, x, y, colour) in zip(places, entries, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(1.06, place),
            textcoords="axes fraction",
            va="center",
            fontsize=6.5,
            color=colour,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.4,
                "patchA": None,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


class Point(NamedTuple):
    """A point with its name, half the lengths of its whiskers and its marker."""

    name: str
    x: float
    y: float
    dx: float
    dy: float
    colour: str
    marker: str
    face: str


def label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Names beside points, clear of markers and whiskers; many are numbers that a legend below explains."""
    import textalloc
    from matplotlib.patheffects import withStroke

    if not points:
        return
    texts = [wrapped(p.name) for p in points]
    if len(points) > MOST_NAMED:
        points = sorted(points, key=lambda p: -p.y)
        texts = [f"{number}" for number in range(1, len(points) + 1)]
        _legend_below(axes.figure, points)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    textalloc.allocate(
        axes,
        [p.x for p in points],
        [p.y for p in points],
        texts,
        x_scatter=[p.x for p in points],
        y_scatter=[p.y for p in points],
        x_lines=[x for p in points for x in ([p.x - p.dx, p.x + p.dx], [p.x, p.x])],
        y_lines=[y for p in points for y in ([p.y, p.y], [p.y - p.dy, p.y + p.dy])],
        max_distance=0.5,
        avoid_label_lines_overlap=True,
        avoid_crossing_label_lines=True,
        textsize=6.5,
        textcolor=[p.colour for p in points],
        linecolor=[p.colour for p in points],
        linewidth=0.4,
        path_effects=[withStroke(linewidth=1.5, foreground="white")],
    )


def _legend_below(figure: Any, points: Sequence[Point]) -> None:
    """What the numbers of points, which count from 1, stand for."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="none", marker=p.marker, color=p.colour, mfc=p.face, label=f"{number}  {p.name}")
        for number, p in enumerate(points, 1)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=1, fontsize=6.5, frameon=False, labelspacing=0.2)


def names_height_in(names: Sequence[str]) -> float:
    """Inches that names below each other take, on their one or two lines."""
    return sum(wrapped(name).count("\n") + 1 for name in names) * _LINE_PT / 72


def legend_height_in(count: int) -> float:
    """Inches that the legend of :func:`label_points` takes below so many points."""
    return (count > MOST_NAMED) * (0.1 + count * 0.12)


def _apart(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Centres of boxes between 1 and 0, downwards, as near to `wanted` (falling) as they can be without overlap."""
    blocks: list[list[float]] = []  # top, height, sum of wanted tops, count
    for centre, height in zip(wanted, heights, strict=True):
        blocks.append([centre + height / 2, height, centre + height / 2, 1])
        while len(blocks) > 1 and blocks[-2][0] - blocks[-2][1] < blocks[-1][0]:
            _, height_below, tops, count = blocks.pop()
            above = blocks[-1]
            above[2] += tops + count * above[1]
            above[1] += height_below
            above[3] += count
            above[0] = above[2] / above[3]
    for k, block in enumerate(blocks):
        block[0] = min(block[0], blocks[k - 1][0] - blocks[k - 1][1] if k else 1.0)
    below = 0.0
    for block in reversed(blocks):
        block[0] = below = max(block[0], below + block[1])
    places, k = [], 0
    for top, _, _, count in blocks:
        for _ in range(int(count)):
            places.append(top - heights[k] / 2)
            top -= heights[k]
            k += 1
    return places
