"""Names of the transforms' presets and the size of stored images that each needs; standard library only."""

from __future__ import annotations

from typing import Literal, get_args

Preset = Literal["none", "flip", "crop_flip", "published", "simple", "resize"]
"""What is done to training and test images, see :func:`avalanche_fmlora.data.transforms.make_transforms`."""

SQUARE_PRESETS = ("none", "flip", "crop_flip")
"""Those that see only the central square of an image."""


def stored_side(preset: str, image_size: int) -> int:
    """Shorter side [pixels] at which images are kept, so that all the preset's crops can be taken from them.

    >>> stored_side("published", 224), stored_side("flip", 224)
    (256, 224)

    Raises:
        ValueError: for an unknown preset or a size below 1.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"Expected `image_size` to be a positive whole number of pixels but got {image_size!r}.")
    if preset not in get_args(Preset):
        raise ValueError(f"Expected `augment` to be one of {get_args(Preset)} but got {preset!r}.")
    return image_size if preset in SQUARE_PRESETS else image_size * 256 // 224
