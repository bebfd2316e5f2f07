"""Passes over an experience's own training images that the plugins share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset


def training_images(
    strategy: Any, limit: int | None = None, batch_size: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (images, labels) of the current experience, in a fixed order, with the evaluation transform.

    Args:
        strategy: one of this package's strategies, in training.
        limit: at most that many samples, evenly spread over the experience; None means all.
        batch_size: images a batch; as in an evaluation if None.
    """
    dataset = strategy.training_dataset()
    if limit is not None and len(dataset) > limit:
        dataset = Subset(dataset, spread(len(dataset), limit).tolist())
    yield from strategy.batches(dataset, batch_size)


def spread(size: int, limit: int) -> Tensor:
    """At most that many places of `size`, evenly spread.

    >>> spread(9, 3), spread(2, 3)
    (tensor([0, 4, 8]), tensor([0, 1]))
    """
    return torch.linspace(0, size - 1, limit).long() if size > limit else torch.arange(size)


def chosen_images(strategy: Any, index: Tensor) -> Tensor:
    """Images [N, 3, H, W] of the current experience by their places [N] in the order of the passes."""
    places, slots = index.unique(return_inverse=True)
    images = [x for x, _ in strategy.batches(Subset(strategy.training_dataset(), places.tolist()))]
    return torch.cat(images)[slots]


@torch.no_grad()
def training_features(strategy: Any, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Features [M, D] (float32) and labels [M] of the current experience under the model as it is.

    Raises:
        ValueError: if some are not finite, from which nothing could be learned any more.
    """
    pairs = [(strategy.features(x).float(), y) for x, y in training_images(strategy, limit)]
    features, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    broken = int((~features.isfinite()).any(1).sum())
    if broken:
        raise ValueError(
            f"Expected finite features but those of {broken} of {len(features)} training images are not: if it is all "
            "of them, training diverged (build the strategy anew with lower rates, or `clip_grad_norm`) or numbers "
            "overflow (use precision='bf16' or 'fp32'); else look for NaN or infinity in these images."
        )
    return features, labels
