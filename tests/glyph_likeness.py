"""How alike two characters look: the rule that keeps classes apart from each other and from pretraining characters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avalanche_fmlora.data.glyph_render import MASK_SIZE, available_faces, glyph_mask

MAX_LIKENESS = 0.9
MAX_MIRRORED_LIKENESS = 0.95
INK_SIDE = 40


def likeness(first: str, second: str, faces: Sequence[str], *, mirrored: bool = False) -> np.ndarray:
    """How alike the shapes of characters are, whatever their size: the rule by which no two classes look alike.

    Blurred masks are correlated face by face, and the largest value over `faces` (those that have both characters)
    counts. Without `mirrored`, `first` is also turned by up to 20 degrees and, where the two aspect ratios differ by
    less than a factor of 1.6, both are also stretched to a square. With `mirrored`, `first` is instead turned by
    quarters and reflected.

    Returns:
        float32 [len(first), len(second)] in [-1, 1]; 1 is the same shape.
    """
    turns = [(d, 1) for d in ((90, 180, 270) if mirrored else (-20, -10, 0, 10, 20))]
    turns += [(0, -1), (180, -1)] if mirrored else []
    result = np.full((len(first), len(second)), -1.0, dtype=np.float32)
    for face in faces:
        rows, columns = ([i for i, c in enumerate(chars) if face in available_faces(c)] for chars in (first, second))
        if not rows or not columns:
            continue
        one = torch.from_numpy(np.stack([glyph_mask(first[i], face) for i in rows]))[:, None].float()
        two = torch.from_numpy(np.stack([glyph_mask(second[j], face) for j in columns]))[:, None].float()
        still = _unit(two)
        found = torch.stack([_unit(_turned(one, degrees, flip)) @ still.T for degrees, flip in turns]).amax(0)
        if not mirrored:
            (square, aspect), (other, other_aspect) = _stretched(one), _stretched(two)
            close = (aspect[:, None] - other_aspect).abs() < np.log(1.6)
            found = torch.maximum(found, torch.where(close, _unit(square) @ _unit(other).T, -1.0))
        cells = np.ix_(rows, columns)
        result[cells] = np.maximum(result[cells], found.numpy())
    return result


def _unit(masks: Tensor) -> Tensor:
    """[B, 1, MASK_SIZE, MASK_SIZE] -> blurred, centred rows of unit length [B, K]."""
    taps = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / 2)
    taps = taps / taps.sum()
    small = F.avg_pool2d(masks, 2)
    blurred = F.conv2d(
        F.conv2d(small, taps[None, None, None], padding=(0, 3)), taps[None, None, :, None], padding=(3, 0)
    )
    rows = blurred.flatten(1)
    return F.normalize(rows - rows.mean(1, keepdim=True), dim=1)


def _turned(masks: Tensor, degrees: float, flip: int) -> Tensor:
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    affine = torch.tensor([[flip * cos, -sin, 0.0], [flip * sin, cos, 0.0]], dtype=torch.float32)
    grid = F.affine_grid(affine.expand(len(masks), 2, 3), list(masks.shape), align_corners=False)
    return F.grid_sample(masks, grid, align_corners=False)


def _stretched(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Ink boxes stretched to a square, and the logarithm of width / height, [B]."""
    squares, aspects = torch.zeros_like(masks), []
    side, margin = INK_SIDE, (MASK_SIZE - INK_SIDE) // 2
    for i, mask in enumerate(masks[:, 0]):
        ys, xs = torch.nonzero(mask.amax(1) > 60)[:, 0], torch.nonzero(mask.amax(0) > 60)[:, 0]
        box = mask[None, None, ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        squares[i, :, margin : margin + side, margin : margin + side] = F.interpolate(box, (side, side), mode="area")[0]
        aspects.append(float(np.log(box.shape[3] / box.shape[2])))
    return squares, torch.tensor(aspects)
