"""Draw every figure of both READMEs anew from the records: python benchmarks/draw_figures.py

Each is what `fmlora plot benchmarks/results/FOLDER --kind KIND --to FILE` draws.
"""

from __future__ import annotations

from pathlib import Path

from avalanche_fmlora.results.figures import draw, save
from avalanche_fmlora.results.record import read_records

BENCHMARKS = Path(__file__).parent
FIGURES = {
    "caltech100": ("caltech100", "accuracy"),
    "caltech100_params": ("caltech100", "params"),
    "caltech100_same_head": ("caltech100_same_head", "accuracy"),
    "caltech100_50": ("caltech100_50", "accuracy"),
    "emoji20": ("emoji20", "accuracy"),
    "split_glyphs": ("split_glyphs", "accuracy"),
    "split_glyphs_50": ("split_glyphs_50", "accuracy"),
    "uneven_glyphs_ranks": ("uneven_glyphs", "rank"),
    "uneven_glyphs_trained": ("uneven_glyphs", "trained"),
}
"""Name of each figure: folder of its records below benchmarks/results, and kind."""


def draw_figure(name: str, to: Path) -> Path:
    """Draw one figure into the folder `to`."""
    folder, kind = FIGURES[name]
    (figure,) = draw(read_records(BENCHMARKS / "results" / folder / "records"), [kind]).values()
    assert not isinstance(figure, str), figure
    return save(figure, to / f"{name}.png")


if __name__ == "__main__":
    for name in FIGURES:
        print(draw_figure(name, BENCHMARKS / "figures"))
