"""Encoded image files -> uint8 RGB, the same on every machine."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

_LOG = logging.getLogger(__name__)

# Only formats that PIL decodes by itself: EPS, for one, would start Ghostscript on a stranger's file.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")


@contextlib.contextmanager
def whole_images_only() -> Iterator[None]:
    """PIL's switch that fills torn images with grey is off inside, whatever the caller's program has set."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode_image(data: bytes, image_size: int, interpolation: str = "bicubic") -> np.ndarray:
    """An encoded image (of several frames, the first) as uint8 RGB [image_size, image_size, 3].

    The orientation in the EXIF data is applied, transparency is laid on white, 16 bits become 8. The shorter side is
    resized to `image_size`, the centre is cut out, as torchvision's `Resize` and `CenterCrop` do it.

    Raises:
        ValueError: if the data are empty or of a kind that can't become 8-bit RGB.
        OSError: or another error of PIL, if the data are broken.
    """
    image = _opened(data)
    width, height = image.size
    full = tuple(image_size * length // min(width, height) for length in (width, height))  # cut as torchvision does
    left, top = (round((side - image_size) / 2) for side in full)
    x, y = width / full[0], height / full[1]
    # The box makes PIL compute the centre only, at bounded memory: the pixels of a whole resize, up to what PIL rounds
    # and clips between its two passes, whose order it picks by size.
    box = (left * x, top * y, (left + image_size) * x, (top + image_size) * y)
    resample = Image.Resampling[interpolation.upper()]
    return np.asarray(image.resize((image_size, image_size), resample, box=box))


def decode_whole(data: bytes, side: int, interpolation: str = "bicubic") -> np.ndarray:
    """As :func:`decode_image`, but the whole image [H, W, 3], its shorter side resized to `side`, never enlarged."""
    image = _opened(data)
    size = whole_size(image.size, side)
    if size != image.size:
        image = image.resize(size, Image.Resampling[interpolation.upper()])
    return np.asarray(image)


def whole_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height with the shorter side at most `side`, the longer one cut to whole pixels as torchvision does.

    >>> whole_size((500, 375), 256), whole_size((32, 32), 256)
    ((341, 256), (32, 32))
    """
    width, height = size
    if min(size) <= side:
        return size
    return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


def encoded_size(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded image from its header, before any rotation; errors as :func:`decode_image`."""
    with _open(data) as opened:
        return opened.size


def _open(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise ValueError("the file is empty")
    try:
        return Image.open(io.BytesIO(data), formats=[f for f in _FORMATS if f in Image.OPEN])
    except UnidentifiedImageError:  # Pillow names the buffer's address, which is another each time
        raise UnidentifiedImageError("cannot identify an image in its data") from None


def _opened(data: bytes) -> Image.Image:
    with _open(data) as opened:
        opened.load()
        return _to_rgb(ImageOps.exif_transpose(opened))


@functools.cache
def _warn_once(bits: int) -> None:
    _LOG.warning(
        "An image of 16 bits a pixel has none above %d: if its camera has %d bits, it is nearly black: 65535 is white. "
        "Scale such images to 16 bits (said once).",
        2**bits - 1, bits,
    )  # fmt: skip


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range: save the image with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels exceed 0..65535: save the image with 8 or 16 bits")
        if 0 < values.max() < 256:
            raise ValueError("16- or 32-bit pixels up to 255 may mean 8 bits or a dark image: save it with 8 bits")
        if 0 < values.max() < 4096:
            _warn_once(int(values.max()).bit_length())
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
