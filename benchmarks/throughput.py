"""Speed and memory, as ratios measured in one run (absolute times differ from machine to machine).

    python benchmarks/throughput.py --out benchmarks/results/throughput.csv
    python benchmarks/throughput.py --only input --threads 2   # some rows anew, the others stay

FM-LoRA's training step against a bare PyTorch loop that trains a plain LoRA of the same rank on the same ViT; merged
inference against the bare timm model; step time, memory and stored parameters at a late experience against an early
one; a step of the prompt methods against one pass without autograd and one with, over the same tokens; reading images
at 224 px from the cache against training a ViT-B/16 on them; the host's part of it with resizing left to the device
against without.

The two sides of a ratio take turns, step by step, so that a busy machine slows both. Memory of
FM-LoRA is what a step keeps for its backward pass; that of the prompt methods the most that is alive at once.
"""

from __future__ import annotations

import argparse
import csv
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from one_run import as_csv
from PIL import Image
from steps import alternate, bare_step, in_training, make_strategy, make_stream, make_vit
from torch import Tensor, nn

from avalanche_fmlora.data.base import ImageSet, class_incremental
from avalanche_fmlora.data.loading import LoaderItems, finish_of
from avalanche_fmlora.data.presets import stored_side
from avalanche_fmlora.data.store import stored_images
from avalanche_fmlora.data.transforms import make_transforms
from avalanche_fmlora.modules.vit import forward_features
from avalanche_fmlora.results.record import write_atomically


def training_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    stream = make_stream(options, 3)
    images = torch.randn(options.batch, 3, options.image_size, options.image_size)
    labels = torch.randint(0, 10, (options.batch,))
    bare = bare_step(options, images, labels)
    rows = []
    cases: dict[str, dict[str, Any]] = {
        "F-LoRA alone": {"rank_selection": None, "prompt_length": 0, "distillation": 0.0},
        "F-LoRA + DRS + DMP": {"distillation": 0.0},
        "default, free teacher included": {},
    }
    for name, changes in cases.items():
        strategy = make_strategy(options, **changes)
        strategy.train(stream[0])
        step = in_training(strategy, stream[1])
        ours, theirs = alternate([step, bare], options.repeats)
        rows.append({"what": f"training step, {name} / bare LoRA loop", "ratio": ours / theirs, "bound": 1.15})
    return rows


@torch.no_grad()
def inference_row(options: argparse.Namespace) -> dict[str, Any]:
    strategy = make_strategy(options, prompt_length=0)
    strategy.train(make_stream(options, 3)[0])
    strategy.merge()
    strategy.model.eval()
    bare = make_vit(options).eval()
    images = torch.randn(options.batch, 3, options.image_size, options.image_size)
    ours, theirs = alternate([lambda: strategy.model(images), lambda: bare(images)], 2 * options.repeats)
    return {"what": "merged inference / bare timm model", "ratio": ours / theirs, "bound": 1.02}


def long_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    stream = make_stream(options, options.late)
    early, late = make_strategy(options), make_strategy(options)
    for strategy, last in ((early, 2), (late, options.late)):
        for experience in stream[: last - 1]:
            strategy.train(experience)
    stored = [s.model.stored_parameters() for s in (late, early)]
    steps = [in_training(late, stream[options.late - 1]), in_training(early, stream[1])]
    seconds = alternate(steps, options.repeats)
    memory = [saved_bytes(step, s.model) for step, s in zip(steps, (late, early), strict=True)]
    name = f"experience {options.late} / experience 2"
    return [
        {"what": f"training step, {name}", "ratio": seconds[0] / seconds[1], "bound": 1.03},
        {"what": f"memory of a training step, {name}", "ratio": memory[0] / memory[1], "bound": 1.03},
        {"what": f"stored adapter parameters, {name}", "ratio": stored[0] / stored[1], "bound": 1.0},
    ]


def saved_bytes(step: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that one step keeps for its backward pass, the model's own tensors left out: the same on every machine."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def peak_bytes(step: Callable[[], Any]) -> int:
    """Most bytes of tensors alive at once during one step, those from before it left out."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    live = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def bare_prompt_step(
    options: argparse.Namespace, method: str, images: Tensor
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A pass without autograd, and a step through the frozen ViT with the method's number of prompts or prefixes."""
    vit = make_vit(options).eval().requires_grad_(False)
    dim, labels = vit.num_features, torch.randint(0, 10, (len(images),))
    prompt = nn.Parameter(torch.randn(25, dim)) if method == "l2p" else None
    lengths = {"dual_prompt": [5] * 5, "coda_prompt": [4] * 5}.get(method, [])
    prefixes = {
        i: (nn.Parameter(torch.randn(n, dim)), nn.Parameter(torch.randn(n, dim))) for i, n in enumerate(lengths)
    }
    head = nn.Linear(dim, 10)
    trained = [
        *head.parameters(),
        *([] if prompt is None else [prompt]),
        *(p for pair in prefixes.values() for p in pair),
    ]
    optimizer = torch.optim.Adam(trained, 1e-3)

    @torch.no_grad()
    def query() -> None:
        forward_features(vit, images)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(head(forward_features(vit, images, prompt, prefixes)), labels).backward()
        optimizer.step()

    return query, step


def prompt_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    from avalanche_fmlora.strategies.registry import method as strategy_class

    stream, rows = make_stream(options, 2), []
    images = torch.randn(options.batch, 3, options.image_size, options.image_size)
    for name in ("l2p", "dual_prompt", "coda_prompt"):
        steps = []
        for cache in (False, True):
            strategy = strategy_class(name)(
                model=make_vit(options),
                train_mb_size=options.batch,
                train_epochs=1,
                evaluator=None,
                cache_queries=cache,
            )
            steps.append(in_training(strategy, stream[0]))
        bare = bare_prompt_step(options, name, images)
        steps[1]()  # the first epoch fills the cache
        ours, cached, query_s, step_s = alternate([*steps, *bare], options.repeats)
        two_passes = query_s + step_s
        memory = [peak_bytes(steps[0]), sum(peak_bytes(side) for side in bare)]
        rows += [
            {"what": f"training step, {name} / two bare passes", "ratio": ours / two_passes, "bound": 1.10},
            {
                "what": f"peak memory of a training step, {name} / bare training step + query",
                "ratio": memory[0] / memory[1],
                "bound": 1.0,
            },
            {"what": f"training step, {name} with cached queries / without", "ratio": cached / ours, "bound": ""},
        ]
    return rows


def photos(count: int) -> list[bytes]:
    """JPEGs of 500 x 375 px, as large as ImageNet's usually are: smooth colours and some noise."""
    rng, encoded = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        noisy = smooth + rng.normal(0, 8, (375, 500, 3))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def host_row(dataset: Any) -> dict[str, Any]:
    """What the host does for an image if the device makes it float, with resizing and flips left to it and without."""
    finish, sides = finish_of(dataset), []
    for crops in (True, False):
        items = LoaderItems(dataset, (0,), finish, crops=crops)
        sides.append(lambda items=items: [items.collate([items[i] for i in range(len(items))]) for _ in range(4)])
    left, done = alternate(sides, 30)
    print(
        f"{1e3 * left / 4 / len(dataset):.2f} ms of the host an image, {done / left:.1f} times fewer than with resizing"
    )
    what = "host time of an image at 224 px (cache, random resized crop, flip), resized on the device / on the host"
    return {"what": what, "ratio": left / done, "bound": 0.5}


def input_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Images a second of the pipeline of the published benchmarks, against those of the training that it feeds."""
    changes = {"model": "vit_base_patch16_224", "image_size": 224, "batch": 8}
    options = argparse.Namespace(**{**vars(options), **changes})
    encoded, labels = photos(options.batch), torch.arange(options.batch).numpy() % 2
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{i}.jpg" for i in range(options.batch)]
        side = stored_side("published", options.image_size)
        stored = stored_images("0", names, encoded.__getitem__, side, title="photos", cache_dir=folder)
        images = ImageSet(stored, labels)
        unit: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        transforms = make_transforms("published", options.image_size, **unit)
        stream = class_incremental("photos", images, images, "ab", n_experiences=1, transforms=transforms).train_stream
        strategy = make_strategy(options)
        in_training(strategy, stream[0])
        bare = bare_step(options, torch.rand(options.batch, 3, 224, 224), torch.from_numpy(labels))
        read_s, step_s = alternate([lambda: list(strategy.dataloader), bare], min(options.repeats, 3))
        trained = make_strategy(options)
        start = time.perf_counter()
        trained.train(stream[0])
        waiting = trained.data_wait_s / (time.perf_counter() - start)
        host = host_row(stream[0].dataset)
    print(f"{options.batch / read_s:.0f} images a second are read, {options.batch / step_s:.2f} are trained on")
    reading = "reading an image at 224 px (cache, random resized crop, flip) / a bare LoRA step with it, ViT-B/16"
    return [
        {"what": reading, "ratio": read_s / step_s, "bound": 0.2},
        {
            "what": "share of FM-LoRA's training that waits for images, ViT-B/16 at 224 px",
            "ratio": waiting,
            "bound": 0.05,
        },
        host,
    ]


GROUPS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "training": training_rows,
    "inference": lambda options: [inference_row(options)],
    "long": long_rows,
    "prompts": prompt_rows,
    "input": input_rows,
}


def merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the file, those that are in `rows` too replaced, new ones behind them."""
    with path.open(newline="") as file:
        kept = {row["what"]: row for row in csv.DictReader(file)}
    return list({**kept, **{row["what"]: row for row in rows}}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="timm architecture, random weights")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--late", type=int, default=50, help="the late experience")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=GROUPS, help="measure these rows; those of other groups stay in the file")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/throughput.csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="no QP solver found")
    rows = [row for name, group in GROUPS.items() if options.only in (None, name) for row in group(options)]
    for row in rows:
        print(f"{row['what']:70} {row['ratio']:.3f} (bound {row['bound']})")
        row["ratio"] = f"{row['ratio']:.3f}" if row["ratio"] >= 0.1 else f"{row['ratio']:.2g}"
    with_others = merged(options.out, rows) if options.only and options.out.exists() else rows
    write_atomically(options.out, as_csv(["what", "ratio", "bound"], with_others))


if __name__ == "__main__":
    main()
