"""What the rank selector chose: rank over experiences and layers, and against complexity and similarity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from avalanche_fmlora.results.figures.style import Series, column_figure, new_figure, series_of, title
from avalanche_fmlora.results.schema import Experience, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@column_figure
def rank(records: Iterable[Record]) -> Figure:
    """Chosen rank per experience (and layer), and against the complexity and similarity it was chosen by.

    Points are experiences of all runs; the line is the mean over runs. Where ranks differ between layers, the first
    method's are a heat map too, layer against experience.

    Args:
        records: runs of one benchmark and protocol; methods that choose no rank are left out.

    Raises:
        ValueError: if no run chose a rank, or if runs are of several protocols.
    """
    import numpy as np

    series = [s for s in series_of(records) if any(_measured(e) for run in s.runs for e in run.record["experiences"])]
    if not series:
        raise ValueError("Expected runs that choose a rank, fm_lora with `rank_selection` say, but none of these does.")
    layers = _layers(series[0])
    figure = new_figure(3.4 if layers is None else 4.9)
    panels: list[Any] = [["rank", "rank"], ["complexity", "similarity"]]
    if layers is not None:
        panels.insert(1, ["layers", "layers"])
    axes: dict[str, Axes] = figure.subplot_mosaic(panels)
    for k, one in enumerate(series):
        rows = [[e for e in run.record["experiences"] if e["rank"] is not None] for run in one.runs]
        table = np.array([[float(e["rank"] or 0) for e in row] for row in rows])
        x = np.arange(1, table.shape[1] + 1)
        look = one.look
        axes["rank"].plot(x, table.mean(0), linestyle=look.line, color=look.colour, label=one.name)
        flat = [e for row in rows for e in row if _measured(e)]
        points: dict[str, Any] = {"marker": look.marker, "s": 11, "facecolors": "none", "edgecolors": look.colour}
        points["linewidths"] = 0.7
        count = len(series) * len(table)
        nudges = (np.arange(k * len(table), (k + 1) * len(table)) - (count - 1) / 2) * min(0.12, 0.7 / count)
        axes["rank"].scatter((x + nudges[:, None]).ravel(), table.ravel(), **points)
        for name in ("complexity", "similarity"):
            measures: list[dict[str, Any]] = [dict(e) for e in flat]
            known = [e for e in measures if e[name] is not None]
            axes[name].scatter([e[name] for e in known], [e["rank"] for e in known], **points)
    _finish(axes, series)
    if layers is not None:
        _heat_map(figure, axes["layers"], layers, series[0].name)
    return figure


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
    from matplotlib.ticker import MaxNLocator

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
    axes["rank"].xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes["complexity"].set_xlabel("complexity")
    axes["similarity"].set_xlabel("similarity to the past")
    axes["rank"].set_title((f"{series[0].name} on " if len(series) == 1 else "") + title(series), loc="left")
    if len(series) > 1:
        axes["rank"].legend(fontsize=6.5, frameon=False, loc="lower left", ncols=2)


def _heat_map(figure: Figure, axes: Axes, layers: Any, name: str) -> None:
    image = axes.imshow(layers, cmap="cividis", aspect="auto", origin="lower", vmin=0)
    axes.set_xticks(range(layers.shape[1]), [str(t + 1) for t in range(layers.shape[1])])
    axes.set_xlabel("experience")
    axes.set_ylabel(f"layer of {name}")
    figure.colorbar(image, ax=axes, label="rank", aspect=12)
