"""Images of the present that are moved to where classes of the past were: what drift does there can be seen on them.

Source: adversarial drift compensation (arXiv 2405.19074), which moves the images nearest to an old class mean along the
gradient until the old model takes them for that class. Ours: the target is the cosine to a class-mean row, and all
moved images together serve one linear map.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest_pairs(rows: Tensor, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which image is moved toward which row: the nearest images of each, equally many for all.

    Args:
        rows: normalised targets, shape [P, D].
        features: normalised features of the images at hand, shape [M, D].
        count: pairs wanted; with fewer than P, rows are taken evenly spread.

    Returns:
        Indices of rows and of images, both [N] with N ≤ count.

    >>> rows, features = torch.eye(2), torch.tensor([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]])
    >>> nearest_pairs(rows, features, 4)
    (tensor([0, 0, 1, 1]), tensor([2, 1, 0, 1]))
    """
    chosen = torch.arange(len(rows), device=rows.device)
    if count < len(rows):
        chosen = torch.linspace(0, len(rows) - 1, count, device=rows.device).long()
    each = min(len(features), count // max(1, len(chosen)))
    nearest = (rows[chosen] @ features.T).topk(each, dim=1).indices
    return chosen.repeat_interleave(each), nearest.flatten()


def moved_images(
    features: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor, *, steps: int = 3, length: float = 0.08
) -> Tensor:
    """Images after gradient steps, each of the same length, that raise the cosine of their features to given rows.

    Args:
        features: of images [B, 3, H, W] -> [B, D], under the model as it is.
        images: standardised images, shape [B, 3, H, W].
        targets: normalised rows, one for each image, shape [B, D].
        steps: gradient steps.
        length: of a step, as a root mean square over an image's numbers (standardised images have about 1).

    Returns:
        Shape [B, 3, H, W], detached.
    """
    size = length * images.shape[1:].numel() ** 0.5
    for _ in range(steps):
        with torch.enable_grad():
            images = images.detach().requires_grad_(True)
            cosines = (F.normalize(features(images).float(), dim=-1) * targets).sum(-1)
            (gradient,) = torch.autograd.grad(cosines.sum(), images)
        direction = F.normalize(gradient.flatten(1).float(), dim=1).view_as(gradient)
        images = images.detach() + (size * direction).to(images)
    return images
