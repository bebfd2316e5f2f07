"""Characters of the fonts that matplotlib ships -> colour images, many at once, deterministic.

A character is drawn once per typeface as a :data:`MASK_SIZE` square mask (:func:`glyph_masks`). All that makes two
images of it differ is in :class:`Look`: numbers drawn for each image by :func:`draw_looks` and applied by
:func:`render` as batched tensor operations. The same code makes the benchmarks and the pretraining images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFont
from torch import Tensor

IMAGE_SIZE = 32
MASK_SIZE = 48
GLYPH_MEAN = (0.5, 0.5, 0.5)
GLYPH_STD = (0.25, 0.25, 0.25)
FAMILIES = {
    "sans": ("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSans-Bold", "DejaVuSans-BoldOblique"),
    "mono": ("DejaVuSansMono", "DejaVuSansMono-Oblique", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique"),
    "serif": ("DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"),
}
FACES = tuple(face for family in FAMILIES.values() for face in family)
_INK_SIDE = 40
_FONT_SIZE = 64


@cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise FileNotFoundError(f"Expected matplotlib to ship the font {path} but it is not there: reinstall it.")
    return ImageFont.truetype(str(path), _FONT_SIZE)


@cache
def _code_points(face: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font(face).path)).get_charmap())


def available_faces(char: str) -> tuple[str, ...]:
    """The typefaces of :data:`FACES` that have `char`.

    >>> len(available_faces("g"))
    12
    """
    return tuple(face for face in FACES if ord(char) in _code_points(face))


@cache
def glyph_mask(char: str, face: str) -> np.ndarray:
    """uint8 [MASK_SIZE, MASK_SIZE], 255 is ink: centred, the longer side of the ink scaled to a fixed length.

    Raises:
        ValueError: if `face` has no ink for `char`.
    """
    core = _font(face).getmask(char, mode="L")
    ink = np.array(core, dtype=np.uint8).reshape(core.size[1], core.size[0])
    rows, columns = np.flatnonzero(ink.max(1, initial=0) > 60), np.flatnonzero(ink.max(0, initial=0) > 60)
    if not len(rows):
        raise ValueError(f"Expected a visible character but {char!r} (U+{ord(char):04X}) leaves no ink in {face}.")
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = _INK_SIDE / max(ink.shape)
    width, height = (max(1, round(side * scale)) for side in (ink.shape[1], ink.shape[0]))
    square = Image.new("L", (MASK_SIZE, MASK_SIZE))
    resized = Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR)
    square.paste(resized, ((MASK_SIZE - width) // 2, (MASK_SIZE - height) // 2))
    return np.asarray(square)


@dataclass(frozen=True)
class Look:
    """The random numbers of B images; every field has B rows.

    Shapes: `affine` [B, 2, 3] maps output to mask coordinates in [-1, 1]; `warp` [B, 2, 4, 4] coarse displacement;
    `weight` [B] below 0 thins and above 0 thickens strokes; `ink`, `paper` [B, 3] in [0, 1]; `texture` [B, 3, 6, 6]
    and `ink_texture` [B, 3, 6, 6] added colour; `stripes` [B, 4] = (frequency x, frequency y, phase, amplitude);
    `blur` [B] in [0, 1]; `noise` [B, 3, IMAGE_SIZE, IMAGE_SIZE] added last.
    """

    affine: np.ndarray
    warp: np.ndarray
    weight: np.ndarray
    ink: np.ndarray
    paper: np.ndarray
    texture: np.ndarray
    ink_texture: np.ndarray
    stripes: np.ndarray
    blur: np.ndarray
    noise: np.ndarray

    def astype(self, dtype: type[np.floating]) -> Look:
        """The same numbers in another floating-point format, which :func:`render` then calculates in."""
        return Look(*(getattr(self, f.name).astype(dtype) for f in fields(self)))


def _contrasting_colours(rng: np.random.Generator, count: int, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """Ink and paper, [count, 3] in [0, 1], whose luminances differ by `contrast` at least."""
    luma = np.array([0.299, 0.587, 0.114])
    colours = rng.random((count, 2, 3))
    low = rng.random(count) * (1 - contrast)
    levels = np.stack([low, low + contrast + rng.random(count) * (1 - contrast - low)], 1)
    levels = np.where(rng.random((count, 1)) < 0.5, levels, levels[:, ::-1])
    colours = 0.6 * (colours - (colours @ luma)[..., None]) + levels[..., None]
    return colours[:, 0].clip(0, 1), colours[:, 1].clip(0, 1)


def draw_looks(rng: np.random.Generator, count: int, difficulty: float) -> Look:
    """Draw `count` looks. `difficulty` 0 is an upright, clear glyph; 1 is hard to read now and then; 1.5 the most."""
    d = difficulty

    def spread(size: tuple[int, ...]) -> np.ndarray:
        return rng.uniform(-1, 1, (count, *size))

    angle, shear = spread(()) * np.deg2rad(22) * d, spread(()) * 0.3 * d
    scale = 1.0 / np.exp(np.log(0.92) + spread((2,)) * 0.18 * d + spread((1,)) * 0.2 * d)
    cos, sin = np.cos(angle), np.sin(angle)
    affine = np.empty((count, 2, 3))
    affine[:, 0, 0], affine[:, 0, 1] = scale[:, 0] * cos, scale[:, 0] * (sin + shear * cos)
    affine[:, 1, 0], affine[:, 1, 1] = -scale[:, 1] * sin, scale[:, 1] * (cos - shear * sin)
    affine[:, :, 2] = spread((2,)) * (0.04 + 0.16 * d)
    ink, paper = _contrasting_colours(rng, count, 0.7 - 0.45 * d)
    frequency = rng.uniform(0.2, 1.3, count)
    direction = rng.uniform(0, 2 * np.pi, count)
    striped = (rng.random(count) < 0.4) * rng.uniform(0, 0.16, count) * d
    stripes = np.stack([frequency * np.cos(direction), frequency * np.sin(direction), spread(()) * np.pi, striped], 1)
    sigma = rng.uniform(0.01, 0.02 + 0.09 * d, (count, 1, 1, 1))
    noise = rng.standard_normal((count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32) * sigma
    look = Look(
        affine=affine,
        warp=spread((2, 4, 4)) * 0.11 * d,
        weight=spread(()) * 0.6 * d,
        ink=ink,
        paper=paper,
        texture=spread((3, 6, 6)) * rng.uniform(0, 0.28, (count, 1, 1, 1)) * d,
        ink_texture=spread((3, 6, 6)) * rng.uniform(0, 0.2, (count, 1, 1, 1)) * d,
        stripes=stripes,
        blur=rng.random(count) * d,
        noise=noise,
    )
    return look.astype(np.float32)


def place(masks: Tensor, look: Look) -> Tensor:
    """Masks [B, 1, MASK_SIZE, MASK_SIZE] in [0, 1] -> moved, warped, re-weighted ink [B, 1, IMAGE_SIZE, IMAGE_SIZE]."""
    side = 2 * IMAGE_SIZE
    grid = F.affine_grid(torch.from_numpy(look.affine), [len(masks), 1, side, side], align_corners=False)
    warp = F.interpolate(torch.from_numpy(look.warp), size=(side, side), mode="bilinear", align_corners=True)
    ink = F.grid_sample(masks, grid + warp.permute(0, 2, 3, 1), align_corners=False)
    weight = torch.from_numpy(look.weight)[:, None, None, None]
    thick = F.max_pool2d(ink, 3, 1, 1)
    thin = -F.max_pool2d(-ink, 3, 1, 1)
    ink = ink + weight.clamp_min(0) * (thick - ink) + weight.clamp_max(0) * (ink - thin)
    return F.avg_pool2d(ink, 2)


def waves(stripes: np.ndarray) -> Tensor:
    """Plane waves [B, 1, IMAGE_SIZE, IMAGE_SIZE] in [-1, 1], without their amplitude; `stripes` as in :class:`Look`."""
    fx, fy, phase, _ = torch.from_numpy(stripes).T[:, :, None, None]
    steps = torch.arange(IMAGE_SIZE, dtype=fx.dtype)
    return torch.sin(fx * steps + fy * steps[:, None] + phase)[:, None]


def spread_field(coarse: np.ndarray) -> Tensor:
    """A coarse field [B, K, h, w] -> [B, K, IMAGE_SIZE, IMAGE_SIZE]."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return F.interpolate(torch.from_numpy(coarse), size=size, mode="bilinear", align_corners=True)


def colour(rows: np.ndarray) -> Tensor:
    """[B, 3] -> [B, 3, 1, 1]."""
    return torch.from_numpy(rows)[:, :, None, None]


def soften(images: Tensor, amount: np.ndarray) -> Tensor:
    """Mix in a 3x3 mean: `amount` [B], 0 keeps the image."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    return images + torch.from_numpy(amount)[:, None, None, None] * (F.avg_pool2d(padded, 3, 1) - images)


def render(masks: Tensor, look: Look) -> Tensor:
    """Masks float [B, 1, MASK_SIZE, MASK_SIZE] and looks -> images float [B, 3, IMAGE_SIZE, IMAGE_SIZE] in [0, 1]."""
    alpha = place(masks, look)
    paper, ink = layers(look)
    images = soften(paper + alpha * (ink - paper), look.blur)
    return (images + torch.from_numpy(look.noise)).clamp_(0, 1)


def layers(look: Look) -> tuple[Tensor, Tensor]:
    """Textured, striped paper and textured ink, both [B, 3, IMAGE_SIZE, IMAGE_SIZE]."""
    amplitude = torch.from_numpy(look.stripes[:, 3])[:, None, None, None]
    paper = colour(look.paper) + spread_field(look.texture) + amplitude * waves(look.stripes)
    return paper, colour(look.ink) + spread_field(look.ink_texture)
