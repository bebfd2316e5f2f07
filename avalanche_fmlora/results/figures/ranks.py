"""What the rank selector chose: rank over experiences and layers, and against complexity and similarity."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from avalanche_fmlora.results.figures.labels import wrapped
from avalanche_fmlora.results.figures.style import Series, column_figure, new_figure, series_of, title, whole_ticks
from avalanche_fmlora.results.schema import Experience, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POINTS = 120


@column_figure
def rank(records: Iterable[Record], only: Collection[str] | None = None) -> Figure:
    """Chosen rank per experience (and layer), and against the complexity and similarity it was chosen by.

    The line is the mean over runs; points are experiences of all runs, or a band of one standard deviation where they
    would be too many. Where ranks differ between layers, the first method's are a heat map, layer against experience.

    Args:
        records: runs of one benchmark and protocol; methods that choose no rank are left out.
        only: ids of the records to draw; names and looks stay those among all `records`. All if None.

    Raises:
        ValueError: if no run chose a rank, or if runs are of several protocols.
    """
    series = [
        s for s in series_of(records, only) if any(_measured(e) for run in s.runs for e in run.record["experiences"])
    ]
    if not series:
        raise ValueError("Expected runs that choose a rank, fm_lora with `rank_selection` say, but none of these does.")
    layers = _layers(series[0])
    several = len(series) > 1
    figure = new_figure(3.4 + 1.5 * (layers is not None) + 0.15 * (len(series) + 1) * several)
    panels: list[Any] = [["rank", "rank"], ["complexity", "similarity"]]
    if layers is not None:
        panels.insert(1, ["layers", "layers"])
    axes: dict[str, Axes] = figure.subplot_mosaic(panels)
    for k, one in enumerate(series):
        _over_experiences(axes["rank"], one, k, len(series))
        for name in ("complexity", "similarity"):
            _against(axes[name], one, name)
    _finish(axes, series)
    if several:
        figure.legend(*axes["rank"].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    if layers is not None:
        _heat_map(figure, axes["layers"], layers, series[0].name)
    return figure


def _over_experiences(axes: Axes, one: Series, k: int, count: int) -> None:
    """The mean, and points beside each other for the runs of series `k` of `count`."""
    import numpy as np

    rows = [[e["rank"] for e in run.record["experiences"] if e["rank"] is not None] for run in one.runs]
    ranks, look = np.array(rows, dtype=float), one.look
    x, mean = np.arange(1, ranks.shape[1] + 1), ranks.mean(0)
    if ranks.size * count > _MOST_POINTS:
        std = ranks.std(0, ddof=1) if len(ranks) > 1 else np.zeros_like(mean)
        axes.fill_between(x, mean - std, mean + std, color=look.colour, alpha=0.15, linewidth=0)
    else:
        places = k * len(ranks) + np.arange(len(ranks)) - (count * len(ranks) - 1) / 2
        nudges = places * min(0.12, 0.7 / (count * len(ranks)))
        axes.scatter((x + nudges[:, None]).ravel(), ranks.ravel(), **_points(one))
    axes.plot(x, mean, linestyle=look.line, color=look.colour)
    axes.plot([], [], look.marker, ls=look.line, color=look.colour, mfc="none", mew=0.7, label=wrapped(one.name, 26))


def _against(axes: Axes, one: Series, name: str) -> None:
    """Rank against a measure."""
    experiences: list[dict[str, Any]] = [dict(e) for run in one.runs for e in run.record["experiences"] if _measured(e)]
    known = [e for e in experiences if e[name] is not None]
    axes.scatter([e[name] for e in known], [e["rank"] for e in known], **_points(one))


def _points(one: Series) -> dict[str, Any]:
    look = one.look
    return {"marker": look.marker, "s": 11, "facecolors": "none", "edgecolors": look.colour, "linewidths": 0.7}


def _measured(experience: Experience) -> bool:
    return experience["rank"] is not None and experience["complexity"] is not None


def _layers(one: Series) -> Any:
    """Mean rank by layer (down) and experience (across), or None where layers never differ."""
    import numpy as np

    tables = [[e["ranks_per_layer"] for e in run.record["experiences"]] for run in one.runs]
    if any(row is None for table in tables for row in table):
        return None
    mean = np.array(tables, dtype=float).mean(0).T
    return mean if np.ptp(mean, axis=0).max() > 0 else None


def _finish(axes: dict[str, Axes], series: Sequence[Series]) -> None:
    ranks = sorted({e["rank"] for s in series for run in s.runs for e in run.record["experiences"] if e["rank"]})
    for name in ("rank", "complexity", "similarity"):
        axes[name].set_ylim(0, 1.12 * max(ranks))
        axes[name].grid()
        if len(ranks) <= 6:
            axes[name].set_yticks([0, *ranks])
        axes[name].set_ylabel("rank chosen")
    axes["similarity"].set_ylabel("")
    axes["similarity"].tick_params(labelleft=False)
    axes["rank"].set_xlabel("experience")
    whole_ticks(axes["rank"])
    axes["complexity"].set_xlabel("complexity")
    axes["similarity"].set_xlabel("similarity to the past")
    axes["rank"].set_title((f"{series[0].name} on " if len(series) == 1 else "") + title(series), loc="left")


def _heat_map(figure: Figure, axes: Axes, layers: Any, name: str) -> None:
    image = axes.imshow(layers, cmap="cividis", aspect="auto", origin="lower", vmin=0)
    step = 1 + (layers.shape[1] - 1) // 10
    axes.set_xticks(range(0, layers.shape[1], step), [str(t + 1) for t in range(0, layers.shape[1], step)])
    rows = 1 + (layers.shape[0] - 1) // 12
    axes.set_yticks(range(0, layers.shape[0], rows))
    axes.set_xlabel("experience")
    axes.set_ylabel(f"layer of\n{wrapped(name)}")
    figure.colorbar(image, ax=axes, label="rank", aspect=12)
