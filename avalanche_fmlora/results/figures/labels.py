"""Names beside what they name, moved apart where they would overlap."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NEAR: tuple[tuple[int, int, str], ...] = (
    *((5, 0, "left"), (-5, 0, "right"), (0, 7, "center"), (0, -7, "center")),
    *((4, 6, "left"), (4, -6, "left"), (-4, 6, "right"), (-4, -6, "right")),
)
_SIDES = tuple((dx * far, dy * far, side) for far in (1.0, 2.2, 3.6) for dx, dy, side in _NEAR)
_Box: TypeAlias = tuple[float, float, float, float]


def wrapped(name: str, width: int = 20) -> str:
    """A name on at most two lines, cut short if need be."""
    return "\n".join(textwrap.wrap(name, width, max_lines=2, placeholder="…"))


def label_lines(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Names at the right of the axes, beside the ends (name, x, y, colour) of lines, moved apart where they overlap."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    line_height = 7.5 * figure.dpi / 72 / axes.get_window_extent().height
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
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


class Point(NamedTuple):
    """A point with its name and half the lengths of its whiskers."""

    name: str
    x: float
    y: float
    dx: float
    dy: float
    colour: str


def label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Names beside points, each on the side where least is in the way."""
    from matplotlib.patheffects import withStroke

    figure: Any = axes.figure
    figure.draw_without_rendering()
    scale, frame, to_pixels = figure.dpi / 72, axes.get_window_extent(), axes.transData.transform
    taken: list[_Box] = []
    for p in points:
        (x, y), (x0, y0), (x1, y1) = to_pixels([(p.x, p.y), (p.x - p.dx, p.y - p.dy), (p.x + p.dx, p.y + p.dy)])
        r = 3 * scale
        taken += [(x - r, y - r, x + r, y + r), (x0, y - r / 2, x1, y + r / 2), (x - r / 2, y0, x + r / 2, y1)]
    for p in points:
        lines = wrapped(p.name).splitlines()
        width, height = 3.7 * scale * max(map(len, lines)), 7 * scale * len(lines)
        x, y = to_pixels((p.x, p.y))
        boxes = [_beside(x + dx * scale, y + dy * scale, width, height, side) for dx, dy, side in _SIDES]
        costs = [sum(_overlap(b, t) for t in taken) + 20 * scale * _outside(b, frame) + k for k, b in enumerate(boxes)]
        k = costs.index(min(costs))
        taken.append(boxes[k])
        text = axes.annotate(
            "\n".join(lines),
            (p.x, p.y),
            xytext=_SIDES[k][:2],
            textcoords="offset points",
            ha=_SIDES[k][2],
            va="center",
            fontsize=6.5,
            color=p.colour,
            arrowprops={"arrowstyle": "-", "color": p.colour, "linewidth": 0.4, "shrinkA": 0} if k >= 8 else None,
        )
        text.set_path_effects([withStroke(linewidth=1.5, foreground="white")])


def _beside(x: float, y: float, width: float, height: float, side: str) -> _Box:
    left = x - {"left": 0.0, "center": width / 2, "right": width}[side]
    return left, y - height / 2, left + width, y + height / 2


def _outside(box: _Box, frame: Any) -> float:
    across = max(0.0, frame.x0 - box[0]) + max(0.0, box[2] - frame.x1)
    return float(across + max(0.0, frame.y0 - box[1]) + max(0.0, box[3] - frame.y1))


def _overlap(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


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
