"""How well old class means can be followed, and by which images: one experience, measured on the images of the past.

    python benchmarks/row_drift.py --config benchmarks/configs/split_glyphs.yaml 'fm_lora core_step=1.0'

A method trains up to an experience; then the means of all old classes are taken from their images before and after it,
which no method may. In between they are moved by the ridge map of the drift, fitted on the experience's own images, or
on these and others of them that were moved toward the old means before, or, which no method may either, on all images
of the past: what a linear map can do at best. The error is that of the moved means over that of means left where they
were (squares, summed over classes): 1 for no transport, 0 for a perfect one. Rows go to the CSV; those of the same
run, by its id, and experience are replaced. Without a method, it is printed as a table.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from one_run import KEY, configurations, encoded, parser, run_fields, write
from torch import Tensor

from avalanche_fmlora.config import RunConfig
from avalanche_fmlora.experiment import make_backbone, make_benchmark, make_strategy
from avalanche_fmlora.modules.adversarial import moved_images, nearest_pairs
from avalanche_fmlora.modules.class_rows import class_means, ridge_transport, transport_rows


class Variant(NamedTuple):
    """Moved images for each of the experience's own, gradient steps, length of a step."""

    share: float = 0.0
    steps: int = 0
    length: float = 0.0


RIDGES = (0.1, 0.5, 1.0, 10.0)
VARIANTS = (
    Variant(),
    Variant(1.0, 1, 0.08),
    Variant(1.0, 3, 0.04),
    Variant(1.0, 3, 0.08),
    Variant(1.0, 3, 0.16),
    Variant(1.0, 10, 0.08),
    Variant(2.0, 3, 0.08),
)
ERRORS = tuple(f"error_{ridge:g}" for ridge in RIDGES)
FIELDS = (*KEY, "experience", "images", *Variant._fields, "moved", "cosine_before", "cosine", *ERRORS)


def run(config: RunConfig, experience: int, data_root: Path | None) -> Iterator[dict[str, Any]]:
    """One row of the CSV for each variant, of an experience counted from 0."""
    backbone = make_backbone(config, data_root)
    benchmark = make_benchmark(config, backbone, data_root)
    torch.manual_seed(config.seed)
    strategy = make_strategy(config, backbone, "cpu", len(benchmark.train_stream))
    for e in benchmark.train_stream[:experience]:
        strategy.train(e)
    strategy.model.eval()
    current, past = benchmark.train_stream[experience], benchmark.train_stream[:experience]
    images = torch.cat([x for x, _ in strategy.batches(current.dataset.eval())])
    own = encoded(strategy, current.dataset)[0]
    past_before, start = past_features(strategy, past)
    pairs = [nearest_pairs(start, own, int(v.share * len(own))) for v in VARIANTS]
    moved = [drawn(strategy, images[index], start[rows], v) for (rows, index), v in zip(pairs, VARIANTS, strict=True)]
    before = [torch.cat([own, features_of(strategy, x)]) for x in moved]
    strategy.train(current)
    strategy.model.eval()
    own_after = encoded(strategy, current.dataset)[0]
    past_after, end = past_features(strategy, past)
    known = {**run_fields(config, benchmark.info.name), "experience": experience}
    for v, (rows, index), x, z in zip(VARIANTS, pairs, moved, before, strict=True):
        after = torch.cat([own_after, features_of(strategy, x)])
        cosines = [(own[index] * start[rows]).sum(-1).mean(), (z[len(own) :] * start[rows]).sum(-1).mean()]
        shown = dict(zip(("cosine_before", "cosine"), [f"{c:.3f}" if len(x) else "" for c in cosines], strict=True))
        yield {**known, "images": "current", **v._asdict(), "moved": len(x), **shown, **errors(start, end, z, after)}
    yield {**known, "images": "past", "moved": 0, **errors(start, end, past_before, past_after)}


def past_features(strategy: Any, experiences: Any) -> tuple[Tensor, Tensor]:
    """Normalised features [M, D] of all images of the past under the model as it is, and class means [C, D]."""
    z, y = (torch.cat(parts) for parts in zip(*(encoded(strategy, e.dataset) for e in experiences), strict=True))
    return z, F.normalize(class_means(z, y, y.unique())[0], dim=-1)


def drawn(strategy: Any, images: Tensor, targets: Tensor, variant: Variant) -> Tensor:
    """Images moved toward targets, a batch at a time."""
    if not len(images):
        return images
    size = strategy.eval_mb_size
    batches = zip(images.split(size), targets.split(size), strict=True)
    moved = [moved_images(strategy.features, x, t, steps=variant.steps, length=variant.length) for x, t in batches]
    return torch.cat(moved)


@torch.no_grad()
def features_of(strategy: Any, images: Tensor) -> Tensor:
    """Normalised features [N, D] of images [N, 3, H, W] under the model as it is."""
    batches = images.split(strategy.eval_mb_size) if len(images) else ()
    parts = [F.normalize(strategy.features(x).float(), dim=-1) for x in batches]
    return torch.cat([torch.zeros(0, strategy.model.head.dim), *parts])


def errors(start: Tensor, end: Tensor, before: Tensor, after: Tensor) -> dict[str, str]:
    """By name, for each anchor of the map: squared error of moved rows over that of rows left where they were."""
    moved = [transport_rows(start, ridge_transport(before, after, ridge)) for ridge in RIDGES]
    shares = [(rows - end).square().sum() / (start - end).square().sum() for rows in moved]
    return {name: f"{share:.4f}" for name, share in zip(ERRORS, shares, strict=True)}


def table(path: Path) -> str:
    """Markdown: a row for each run and variant, errors in per cent."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    header = ["benchmark", "map fitted on images", "moved images", "steps", "length", "cosine"]
    header += [f"error, anchor {r:g}" for r in RIDGES]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        some = row["moved"] != "0"
        shown = [row["moved"], row["steps"], row["length"], f"{row['cosine_before']} → {row['cosine']}"]
        images = "the experience's" if row["images"] == "current" else "*all of the past*"
        cells = [row["benchmark"], images, *(shown if some else ["0", "–", "–", "–"])]
        cells += [f"{100 * float(row[name]):.0f}" for name in ERRORS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    made = parser(str(__doc__), "row_drift.csv")
    made.add_argument("--experience", type=int, default=5, help="the one that is measured, counted from 0")
    arguments = made.parse_args()
    for words, config in configurations(arguments):
        rows = list(run(config, arguments.experience, arguments.data_root))
        write(arguments.out, FIELDS, rows, key=(*KEY, "experience"))
        for row in rows:
            print(words, {k: row.get(k) for k in FIELDS[len(KEY) + 1 :]}, flush=True)
    if not arguments.methods:
        print(table(arguments.out))


if __name__ == "__main__":
    main()
