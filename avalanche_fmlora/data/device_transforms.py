"""A transform's geometry in two parts: draws and cuts on the host, resizing and flips on the device, a batch at a time.

An item leaves the host as the uint8 pixels of its crop with what is still to be done to them (:class:`Crop`), a batch
as one flat buffer of such pixels (:class:`Crops`), which one copy moves whatever the crops' shapes are. The steps are
torchvision's functions, those of the transforms that work item by item: on a CPU the pixels are the same to the bit.
GPUs resize in float32 and round: where nothing overshoots, a pixel differs by at most 1 of 255.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2


@dataclass(frozen=True)
class Cut:
    """images [..., C, H, W] -> a view [..., C, height, width]; zeros where it reaches beyond the image."""

    top: int
    left: int
    height: int
    width: int

    def __call__(self, images: Tensor) -> Tensor:
        cut: Tensor = v2.functional.crop(images, self.top, self.left, self.height, self.width)
        return cut


@dataclass(frozen=True)
class Resize:
    """images [..., C, H, W] -> [..., C, height, width]."""

    height: int
    width: int
    interpolation: Any
    antialias: bool | None

    def __call__(self, images: Tensor) -> Tensor:
        size = [self.height, self.width]
        resized: Tensor = v2.functional.resize(images, size, interpolation=self.interpolation, antialias=self.antialias)
        return resized


Step: TypeAlias = Cut | Resize


@dataclass(frozen=True, eq=False)
class Crop:
    """One image on its way to the device.

    Attributes:
        pixels: uint8 [C, h, w], often a view of a larger image.
        steps: what is to be done to them, in order.
        flip: whether the result is mirrored.
    """

    pixels: Tensor
    steps: tuple[Step, ...] = ()
    flip: bool = False


@dataclass(frozen=True, eq=False)
class Crops:
    """A batch of B crops of any shapes, in memory that can be pinned and moved like a tensor's.

    Attributes:
        pixels: uint8 [sum of h * w * C], one crop [h, w, C] after another.
        flips: bool [B], whether the result is mirrored.
        runs: neighbours that are alike, in order: how many, their shape (C, h, w) and steps; they stay on the host.

    >>> crops = [Crop(torch.full((3, 2, side), side, dtype=torch.uint8), (Cut(0, 0, 2, 1),)) for side in (2, 5)]
    >>> Crops.packed(crops).finished()[:, 0]
    tensor([[[2],
             [2]],
    <BLANKLINE>
            [[5],
             [5]]], dtype=torch.uint8)
    """

    pixels: Tensor
    flips: Tensor
    runs: tuple[tuple[int, tuple[int, int, int], tuple[Step, ...]], ...]

    @classmethod
    def packed(cls, crops: Sequence[Crop]) -> Crops:
        """Of crops on the host."""
        pixels = torch.empty(sum(crop.pixels.numel() for crop in crops), dtype=torch.uint8)
        for part, crop in zip(pixels.split([crop.pixels.numel() for crop in crops]), crops, strict=True):
            n_channels, height, width = crop.pixels.shape
            part.view(height, width, n_channels).copy_(crop.pixels.permute(1, 2, 0))
        alike = groupby(crops, key=lambda crop: (tuple(crop.pixels.shape), crop.steps))
        runs = tuple((sum(1 for _ in run), shape, steps) for (shape, steps), run in alike)
        return cls(pixels, torch.tensor([crop.flip for crop in crops]), runs)

    def __len__(self) -> int:
        return len(self.flips)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Crops:
        """On another device, as a tensor's."""
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in ("pixels", "flips")}
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Crops:
        """In pinned memory: what a data loader calls."""
        return dataclasses.replace(self, pixels=self.pixels.pin_memory(), flips=self.flips.pin_memory())

    def finished(self) -> Tensor:
        """uint8 [B, C, S, S], all steps and flips done where the pixels are; a run of crops that are alike at once."""
        done = []
        sizes = [count * n_channels * height * width for count, (n_channels, height, width), _ in self.runs]
        for part, (count, (n_channels, height, width), steps) in zip(self.pixels.split(sizes), self.runs, strict=True):
            images = part.view(count, height, width, n_channels).permute(0, 3, 1, 2)
            for step in steps:
                images = step(images)
            done.append(images)
        batch = torch.cat(done)
        return torch.where(self.flips[:, None, None, None], batch.flip(-1), batch).contiguous()


def planned(geometry: Sequence[Any], image: Tensor) -> Crop | None:
    """What `geometry` would do to `image`, drawn from torch's generator as it would, and done as far as cuts go.

    Args:
        geometry: transforms of torchvision v2 in order: Resize, CenterCrop, RandomResizedCrop, and at the end
            RandomHorizontalFlip.
        image: uint8 [C, H, W].

    Returns:
        The crop, or None, with nothing drawn, if there are other transforms or none.
    """
    flips = type(geometry[-1]) is v2.RandomHorizontalFlip if geometry else False
    moves = geometry[:-1] if flips else geometry
    if not geometry or not all(_is_known(move) for move in moves):
        return None
    steps: list[Step] = []
    height, width = image.shape[-2:]
    for move in moves:
        for step in _drawn(move, height, width):
            if isinstance(step, Cut) or (step.height, step.width) != (height, width):
                steps.append(step)
            height, width = step.height, step.width
    while steps and isinstance(steps[0], Cut):
        image = steps.pop(0)(image)
    flip = flips and bool(torch.rand(1) < geometry[-1].p)
    return Crop(image, tuple(steps), flip)


def resizes_on(device: torch.device) -> bool:
    """Whether torch can resize with antialiasing there; Apple's GPUs learned it with torch 2.8."""
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8, device=device)
    try:
        for mode in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC):
            Resize(2, 2, mode, True)(images)
    except NotImplementedError:
        return False
    return True


def _is_known(move: Any) -> bool:
    """Of subclasses we do not know what they do."""
    return type(move) in (v2.CenterCrop, v2.RandomResizedCrop) or (type(move) is v2.Resize and move.max_size is None)


def _drawn(move: Any, height: int, width: int) -> list[Step]:
    """The steps of one transform for an image of this size."""
    if isinstance(move, v2.CenterCrop):
        return [Cut(_start(height, move.size[0]), _start(width, move.size[1]), *move.size)]
    if isinstance(move, v2.Resize):
        tall, wide = move.size if len(move.size) == 2 else _by_shorter_side(height, width, *move.size)
        return [Resize(tall, wide, move.interpolation, move.antialias)]
    of_this_size = torch.empty(()).expand(1, height, width)
    cut = Cut(*move.get_params(of_this_size, move.scale, move.ratio))
    tall, wide = move.size
    return [cut, Resize(tall, wide, move.interpolation, move.antialias)]


def _start(have: int, wanted: int) -> int:
    """Where torchvision's centre crop starts; before the image, which it pads, if that is smaller.

    >>> _start(9, 4), _start(4, 9)
    (2, -2)
    """
    return -((wanted - have) // 2) if wanted > have else round((have - wanted) / 2)


def _by_shorter_side(height: int, width: int, side: int) -> tuple[int, int]:
    """
    >>> _by_shorter_side(20, 27, 16)
    (16, 21)
    """
    return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
