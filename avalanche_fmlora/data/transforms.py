"""From a decoded uint8 image to the network's input: named presets, as torchvision v2 transforms.

A preset is one choice for training and test images and for all methods of a comparison. Geometry (crops, flips) works
on uint8, an image at a time; a loader can leave all but draws and cuts to the device, a batch at a time
(:mod:`avalanche_fmlora.data.loading`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from avalanche_fmlora.data.presets import stored_side

Transform = Callable[[Tensor], Tensor]

_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Finish:
    """uint8 [..., 3, H, W] -> float32 in [0, 1], then (x - mean) / std: one image or a batch, on any device.

    >>> pixel = torch.tensor([0, 255, 255], dtype=torch.uint8).reshape(3, 1, 1)
    >>> Finish((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(pixel).flatten()
    tensor([-1.,  1.,  1.])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(self.std):
            raise ValueError(f"Expected `std` to be of each channel and not 0 but got {self.std}.")

    def __call__(self, images: Tensor) -> Tensor:
        scaled = v2.functional.to_dtype(images, torch.float32, scale=True)
        mean, std = (_of_channels(values, images.device) for values in (self.mean, self.std))
        return scaled.sub(mean).div_(std)


class ImageTransform:
    """uint8 image [3, H, W] -> float32 [3, S, S], normalised: what an ordinary data loader needs.

    Args:
        geometry: transforms of a uint8 image, in order.
        mean: of each channel in [0, 1], subtracted.
        std: of each channel, divided by.
        seed: of its random draws, where a loader of this package reads; None leaves them to the run's seed.
    """

    def __init__(
        self, geometry: Sequence[Transform], mean: Sequence[float], std: Sequence[float], seed: int | None = None
    ) -> None:
        self.geometry = tuple(geometry)
        self.seed = seed
        self.finish = Finish(tuple(mean), tuple(std))

    def __call__(self, image: Tensor) -> Tensor:
        applied: Tensor = application.get()(self, image)
        return applied

    def shaped(self, image: Tensor) -> Tensor:
        """The geometry alone: uint8 [3, S, S]."""
        for step in self.geometry:
            image = step(image)
        return image.contiguous()  # a batch's memory format, and so the network's rounding, follows its items'

    def whole(self, image: Tensor) -> Tensor:
        """Geometry and finish, whatever a loader has set."""
        return self.finish(self.shaped(image))

    def __repr__(self) -> str:
        return f"ImageTransform({list(self.geometry)}, {self.finish})"


# How each ImageTransform is applied to its image: what a loader sets while it reads an item, to leave a part out.
application: ContextVar[Callable[[ImageTransform, Tensor], Any]] = ContextVar(
    "application", default=ImageTransform.whole
)


@dataclass(frozen=True)
class Transforms:
    """The two transforms of a benchmark, with what the result record says about them.

    Attributes:
        name: of the preset.
        image_size: side of the network's input in pixels.
        train: of training images.
        eval: of test images, and of training images in passes without augmentation.
        described: of both, in words.
    """

    name: str
    image_size: int
    train: ImageTransform
    eval: ImageTransform
    described: str

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel in [0, 1], subtracted."""
        return self.eval.finish.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Of each channel, divided by."""
        return self.eval.finish.std

    def replaced(self, train: Transform | None, evaluate: Transform | None) -> Transforms:
        """With geometry of the caller's own for training or test images; conversion, mean and std stay.

        Args:
            train: uint8 image [3, H, W] -> uint8 [3, image_size, image_size]; None keeps this one.
            evaluate: of test images, and of training images in passes without augmentation; None keeps this one.
        """
        if train is None and evaluate is None:
            return self
        said = {"train": train, "test": evaluate}
        own = "; ".join(f"{which}: as given ({_name_of(given)})" for which, given in said.items() if given is not None)
        return Transforms(
            f"{self.name}, changed",
            self.image_size,
            self.train if train is None else ImageTransform([train], self.mean, self.std),
            self.eval if evaluate is None else ImageTransform([evaluate], self.mean, self.std),
            f"{own}; else {self.described}",
        )

    def seeded(self, seed: int | None) -> Transforms:
        """With a seed of their own for the random draws of training images; None leaves them to the run's."""
        if seed is None:
            return self
        if seed < 0:
            raise ValueError(f"Expected `seed` to be 0 or more, or None, but got {seed}.")
        return replace(self, train=ImageTransform(self.train.geometry, self.mean, self.std, seed))

    def facts(self) -> dict[str, Any]:
        """For ``BenchmarkInfo.extra``."""
        drawn = {} if self.train.seed is None else {"seed": self.train.seed}
        return {"augment": self.name, "transforms": self.described, **drawn}


def make_transforms(preset: str, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Transforms:
    """The transforms of a preset.

    For test images, and as the base of ``none``, ``flip`` and ``crop_flip``, images are resized (bicubic, antialiased)
    so that the shorter side is :func:`~avalanche_fmlora.data.presets.stored_side`, then the centre is cut out; images
    stored at that side are only cut.

    - ``none``: training images as test images; ``flip``: half of them mirrored; ``crop_flip``: also a part of at least
      half the area, resized back.
    - ``published``: a part of 5 to 100 % of the area at an aspect ratio of 3/4 to 4/3, resized, and flip; test images
      resized to 256/224 of the size and cut. That of L2P, DualPrompt, SD-LoRA and most since.
    - ``simple``: as published, but 70 to 100 % of the area.
    - ``resize``: the whole image squeezed to the square, training images flipped; nothing is cut off.

    Args:
        preset: a name of :data:`avalanche_fmlora.data.presets.Preset`.
        image_size: side of the square result in pixels.
        mean: of each channel in [0, 1], subtracted; 0 with `std` 1 leaves the input in [0, 1].
        std: of each channel, divided by.

    Raises:
        ValueError: for an unknown preset or a size below 1.
    """
    side = stored_side(preset, image_size)
    flip = v2.RandomHorizontalFlip()
    centre: list[Transform] = [_resize(side), v2.CenterCrop(image_size)]
    squeeze: list[Transform] = [_resize((image_size, image_size))]
    half = v2.RandomResizedCrop(image_size, scale=(0.5, 1.0), antialias=True)
    train: list[Transform] = {
        "none": centre,
        "flip": [*centre, flip],
        "crop_flip": [*centre, half, flip],
        "published": [_random_crop(image_size, 0.05), flip],
        "simple": [_random_crop(image_size, 0.7), flip],
        "resize": [*squeeze, flip],
    }[preset]
    cut = f"shorter side to {side} px (bicubic, antialiased), centre crop of {image_size} px"
    squeezed = f"whole image to {image_size} x {image_size} px (bicubic, antialiased)"
    described = {
        "none": f"train and test: {cut}",
        "flip": f"train: {cut}, horizontal flip; test: {cut}",
        "crop_flip": f"train: {cut}, random resized crop (scale 0.5 to 1), horizontal flip; test: {cut}",
        "published": f"train: random resized crop (scale 0.05 to 1), horizontal flip; test: {cut}",
        "simple": f"train: random resized crop (scale 0.7 to 1), horizontal flip; test: {cut}",
        "resize": f"train: {squeezed}, horizontal flip; test: {squeezed}",
    }[preset]
    evaluate = squeeze if preset == "resize" else centre
    return Transforms(
        preset, image_size, ImageTransform(train, mean, std), ImageTransform(evaluate, mean, std), described
    )


def _of_channels(values: Sequence[float], device: torch.device) -> Tensor:
    """float32 [C, 1, 1], filled on the device: a copy from the host would wait for all that the device has to do."""
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])


def _name_of(transform: Transform) -> str:
    """Without an address in memory, so that records of the same transform agree."""
    return getattr(transform, "__name__", type(transform).__name__)


def _resize(size: int | tuple[int, int]) -> Transform:
    wanted = [size] if isinstance(size, int) else list(size)
    resize: Transform = v2.Resize(wanted, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return resize


def _random_crop(image_size: int, smallest: float) -> Transform:
    crop: Transform = v2.RandomResizedCrop(image_size, scale=(smallest, 1.0), ratio=_RATIO, antialias=True)
    return crop
