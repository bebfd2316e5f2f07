"""How a character is drawn: the look of split_glyphs and the five domains of domain_glyphs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .glyph_render import IMAGE_SIZE, Look, colour, layers, place, render, soften, spread_field, waves

Style = Callable[[Tensor, Look], Tensor]
"""Masks [B, 1, H, W] in [0, 1] and their looks -> images [B, 3, IMAGE_SIZE, IMAGE_SIZE] in [0, 1]."""


def _rgb(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def _outline(alpha: Tensor) -> Tensor:
    return F.max_pool2d(alpha, 3, 1, 1) + F.max_pool2d(-alpha, 3, 1, 1)


def _grain(look: Look) -> Tensor:
    """The noise of the first channel, [1, 1, H, W], with variance 1."""
    noise = torch.from_numpy(look.noise[:, :1])
    return noise / noise.std().clamp_min(1e-6)


def broken_outline(masks: Tensor, look: Look, share: float = 1.0) -> Tensor:
    """A speckled outline in any colours on any paper: the look of split_glyphs. With a smaller `share` the strokes are
    filled the more, as the backbone knows them."""
    filled = place(masks, look)
    alpha = _outline(filled) * torch.sigmoid(4 * (_grain(look) + 0.5))
    alpha = torch.lerp(filled, alpha, share)
    paper, ink = layers(look)
    return (soften(paper + alpha * (ink - paper), 0.5 * look.blur) + 0.5 * torch.from_numpy(look.noise)).clamp(0, 1)


def _stamp(masks: Tensor, look: Look) -> Tensor:
    """A stamp's block, so mirrored, in dark ink on cream paper with fibres."""
    alpha = place(masks.flip(-1), look)
    fibres = 0.5 * torch.from_numpy(look.noise) + 0.5 * spread_field(look.texture)
    paper = _rgb(0.93, 0.88, 0.76) + 0.1 * (colour(look.paper) - 0.5) + fibres.mean(1, keepdim=True)
    pen = _rgb(0.12, 0.12, 0.28) + 0.3 * (colour(look.ink) - 0.4)
    return soften(paper + alpha * (pen - paper), look.blur).clamp(0, 1)


def _neon(masks: Tensor, look: Look) -> Tensor:
    """A glowing outline in the dark."""
    alpha = place(masks, look)
    outline = _outline(alpha)
    glow = F.avg_pool2d(outline, 7, 1, 3)
    tube = colour(look.ink / look.ink.max(1, keepdims=True).clip(0.2))
    night = 0.15 * colour(look.paper) + 0.6 * spread_field(look.texture)
    return (night + tube * (0.75 * outline + 0.7 * glow) + 0.5 * torch.from_numpy(look.noise)).clamp(0, 1)


def _chalk(masks: Tensor, look: Look) -> Tensor:
    """Broken strokes of pale chalk on a smeared green board."""
    alpha = place(masks, look)
    grain = _grain(look)
    covered = alpha * torch.sigmoid(4 * (grain + 0.1))
    board = _rgb(0.16, 0.3, 0.24) + 0.12 * (colour(look.paper) - 0.5) + spread_field(look.texture).mean(1, keepdim=True)
    chalk = 0.65 + 0.3 * colour(look.ink)
    return (board + covered * (chalk - board) + 0.06 * grain).clamp(0, 1)


def _stripes(masks: Tensor, look: Look) -> Tensor:
    """Stripes inside the character run across those outside; the mean colours differ little."""
    alpha = place(masks, look)
    plane = 1.1 * look.stripes[:, :2] / np.linalg.norm(look.stripes[:, :2], axis=1, keepdims=True).clip(1e-6)
    across = np.stack([-plane[:, 1], plane[:, 0]], 1)
    outside, inside = (waves(np.concatenate([p, look.stripes[:, 2:]], 1)) for p in (plane, across))
    middle = 0.5 + 0.3 * (colour(look.paper) - 0.5)
    tint = 1.0 * (colour(look.ink) - colour(look.paper))
    lines = 0.10 * (outside + alpha * (inside - outside))
    return (middle + alpha * tint + lines + 0.3 * torch.from_numpy(look.noise)).clamp(0, 1)


def _mosaic(masks: Tensor, look: Look) -> Tensor:
    """Square tiles of uneven colour."""
    picture = render(masks, look)
    tiles = F.interpolate(picture, size=(16, 16), mode="area")
    uneven = F.interpolate(torch.from_numpy(look.noise), size=(16, 16), mode="nearest")
    return F.interpolate(tiles + 0.4 * uneven, size=(IMAGE_SIZE, IMAGE_SIZE), mode="nearest").clamp(0, 1)


STYLES: dict[str, Style] = {"stamp": _stamp, "neon": _neon, "chalk": _chalk, "stripes": _stripes, "mosaic": _mosaic}
"""The domains of :func:`domain_glyphs`, in their order."""
