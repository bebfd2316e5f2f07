"""What the measurements of throughput.py compare: a bare LoRA loop, and one step of a strategy in Avalanche's loop."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_fmlora.data.base import ImageSet, class_incremental


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
