"""Expected GPU hours of the published benchmarks, by counting: ``python benchmarks/expected_hours.py``.

hours = 2 · 17.6e9 · passes / (utilisation · peak) / 3600, where 17.6e9 are the multiply-accumulates of one image
through a ViT-B/16 at 224 px and

    passes = n_train · (epochs · passes of a training image + passes between epochs) + test images · passes at test.

Test images are those of all classes or domains seen, after each experience. Nothing here has been measured on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from avalanche_fmlora.config import RunConfig, make_run, read_yaml
from avalanche_fmlora.grid import expand
from avalanche_fmlora.strategies.joint import JointConfig

CONFIGS = Path(__file__).resolve().parent / "configs"
MACS = 17.6e9
UTILISATION = 0.4
PEAK_FLOPS = {"A100": 312e12, "RTX 3090": 71e12}
"""Dense bf16 with float32 sums, floating-point operations a second, from the makers' data sheets."""
CLASS_ORDERS = 5


class Size(NamedTuple):
    """Images of a benchmark, and its experiences."""

    train: int
    test: int
    experiences: int


class Passes(NamedTuple):
    """Forward passes, or what costs as much; the backward pass through frozen weights costs one forward pass."""

    step: int
    between: int = 0
    test: int = 1


BENCHMARKS = {
    "split_cifar100": Size(50_000, 10_000, 10),
    "split_imagenet_r": Size(24_000, 6_000, 10),
    "split_cub200": Size(5_994, 5_794, 10),
    "domainnet": Size(409_832, 176_743, 6),
    "domainnet_cil": Size(409_832, 176_743, 5),
}
METHODS = {
    "ncm": Passes(step=0, between=1),
    "linear_probe": Passes(step=1),
    "seq_lora": Passes(step=2),
    "l2p": Passes(step=3, test=2),
    "dual_prompt": Passes(step=3, test=2),
    "coda_prompt": Passes(step=3, test=2),
    "inflora": Passes(step=2, between=2),
    "sd_lora": Passes(step=2),
    "fm_lora": Passes(step=3, between=2),
    "joint": Passes(step=2),
}


def image_passes(config: RunConfig) -> int:
    """Forward passes of an image that one run takes, training and tests together."""
    size, passes = BENCHMARKS[config.benchmark.name], METHODS[config.method]
    options = config.resolved_method()
    epochs = config.training.epochs
    joint = isinstance(options, JointConfig)
    if isinstance(options, JointConfig) and options.epochs is not None:
        epochs = options.epochs
    train = size.train * (epochs * passes.step + passes.between)
    return train + round(size.test * (1 if joint else (size.experiences + 1) / 2)) * passes.test


def hours(config: RunConfig, gpu: str) -> float:
    """Of one run on a GPU of :data:`PEAK_FLOPS`."""
    return 2 * MACS * image_passes(config) / (UTILISATION * PEAK_FLOPS[gpu]) / 3600


def runs(benchmark: str, recipe: str) -> list[RunConfig]:
    """One run of each method: by the benchmark's `unified` recipe, or by each method's own (`published`)."""
    if recipe == "unified":
        options = read_yaml(CONFIGS / benchmark / "unified.yaml")
        return expand({**options, "class_order_seeds": [0]})
    return [make_run(read_yaml(CONFIGS / benchmark / f"{method}.yaml")) for method in METHODS]


def table() -> str:
    """Markdown: minutes of one run on an A100 by unified / own recipe; below, hours of whole tables on each GPU."""
    grid = {b: [runs(b, r) for r in ("unified", "published")] for b in BENCHMARKS}
    lines = [
        "| one run, A100 [min] | " + " | ".join(f"`{b}`" for b in BENCHMARKS) + " |",
        "|---" * (len(grid) + 1) + "|",
    ]
    for method in METHODS:
        alone = [[[c for c in of if c.method == method] for of in recipes] for recipes in grid.values()]
        lines.append(_row(f"`{method}`", alone, "A100", 60))
    for gpu in PEAK_FLOPS:
        lines.append(_row(f"**all, {CLASS_ORDERS} class orders, {gpu} [h]**", list(grid.values()), gpu, CLASS_ORDERS))
    return "\n".join(lines)


def _row(title: str, columns: list[list[list[RunConfig]]], gpu: str, factor: float) -> str:
    cells = [" / ".join(f"{factor * sum(hours(c, gpu) for c in of):.1f}" for of in recipes) for recipes in columns]
    return f"| {title} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print(table())
