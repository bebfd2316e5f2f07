"""Speed and memory, as ratios measured in one run (absolute times differ from machine to machine).

    python benchmarks/throughput.py --out benchmarks/results/throughput.csv

FM-LoRA's training step against a bare PyTorch loop that trains a plain LoRA of the same rank on the same ViT; merged
inference against the bare timm model; step time, memory and stored parameters at a late experience against an early
one; a step of the prompt methods against one pass without autograd and one with, over the same tokens.

The two sides of a ratio take turns, step by step, so that a busy machine slows both. Memory of
FM-LoRA is what a step keeps for its backward pass; that of the prompt methods the most that is alive at once.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_fmlora.data.base import ImageSet, class_incremental
from avalanche_fmlora.modules.vit import forward_features


class BareLoRA(nn.Module):
    """W₀x with B A x added to its query and value parts, as short as it can be written."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, self.dim = base, base.in_features
        self.down = nn.Parameter(torch.randn(2, rank, self.dim) * self.dim**-0.5)
        self.up = nn.Parameter(torch.zeros(2, self.dim, rank))

    def forward(self, x: Tensor) -> Tensor:
        q, v = (F.linear(F.linear(x, self.down[i]), self.up[i]) for i in range(2))
        return self.base(x) + torch.cat([q, torch.zeros_like(q), v], -1)


def make_vit(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    return timm.create_model(options.model, pretrained=False, img_size=options.image_size, num_classes=0)


def bare_step(options: argparse.Namespace, images: Tensor, labels: Tensor) -> Callable[[], None]:
    vit = make_vit(options).eval().requires_grad_(False)
    for block in vit.blocks:
        block.attn.qkv = BareLoRA(block.attn.qkv, options.rank)
    head = nn.Linear(vit.num_features, 10)
    trained = [p for p in [*vit.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(head(vit(images)), labels).backward()
        optimizer.step()

    return step


def make_strategy(options: argparse.Namespace, **changes: Any) -> Any:
    from avalanche_fmlora import FMLoRAStrategy

    common = {"rank": options.rank, "train_mb_size": options.batch, "train_epochs": 1, "evaluator": None}
    return FMLoRAStrategy(model=make_vit(options), **common, **changes)


def make_stream(options: argparse.Namespace, n_experiences: int) -> Any:
    """Random images: two classes an experience, one batch each."""
    generator = torch.Generator().manual_seed(0)
    classes = 2 * n_experiences
    labels = torch.arange(classes).repeat_interleave(options.batch // 2)
    side = options.image_size
    pixels = torch.randint(0, 256, (len(labels), side, side, 3), generator=generator, dtype=torch.uint8)
    data = ImageSet(pixels.numpy(), labels.numpy())
    names = [str(i) for i in range(classes)]
    return class_incremental("noise", data, data, names, n_experiences=n_experiences).train_stream


def strategy_step(strategy: Any) -> Callable[[], None]:
    """One iteration of Avalanche's own loop on the strategy's dataloader, as in training."""

    def step() -> None:
        strategy.training_epoch()

    return step


def in_training(strategy: Any, experience: Any) -> Callable[[], None]:
    """Open an experience as `train` does, and leave it open: the returned step is one epoch of one batch."""
    strategy.is_training = True
    strategy.model.train()
    strategy._eval_streams = []
    strategy.experience = experience
    strategy._before_training(num_workers=0)
    strategy._before_training_exp(num_workers=0)
    return strategy_step(strategy)


def alternate(sides: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Smallest seconds of each side, taking turns."""
    best = [float("inf")] * len(sides)
    for _ in range(repeats):
        for i, side in enumerate(sides):
            start = time.perf_counter()
            side()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def training_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    stream = make_stream(options, 3)
    images = torch.randn(options.batch, 3, options.image_size, options.image_size)
    labels = torch.randint(0, 10, (options.batch,))
    bare = bare_step(options, images, labels)
    rows = []
    cases: dict[str, dict[str, Any]] = {
        "F-LoRA alone": {"rank_selection": None, "prompt_length": 0, "distillation": 0.0},
        "F-LoRA + DRS + DMP": {"distillation": 0.0},
        "default (free teacher: one more pass)": {},
    }
    for name, changes in cases.items():
        strategy = make_strategy(options, **changes)
        strategy.train(stream[0])
        step = in_training(strategy, stream[1])
        ours, theirs = alternate([step, bare], options.repeats)
        bound = 1.15 if "distillation" in changes else ""  # the teacher's pass is asked for, not overhead
        rows.append({"what": f"training step, {name} / bare LoRA loop", "ratio": ours / theirs, "bound": bound})
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="timm architecture, random weights")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--late", type=int, default=50, help="the late experience")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/throughput.csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="no QP solver found")
    rows = [*training_rows(options), inference_row(options), *long_rows(options), *prompt_rows(options)]
    for row in rows:
        print(f"{row['what']:70} {row['ratio']:.3f} (bound {row['bound']})")
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["what", "ratio", "bound"])
        writer.writeheader()
        writer.writerows({**row, "ratio": f"{row['ratio']:.3f}"} for row in rows)


if __name__ == "__main__":
    main()
