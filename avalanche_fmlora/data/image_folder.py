"""The user's own images, in a folder or a zip -> class-incremental or domain-incremental benchmark."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import PIL
from PIL import Image, ImageFile, ImageOps
from torchvision.transforms import v2

from avalanche_fmlora.data.archive import SPLITS, Placed, Source, check_experiences, common_classes, placed_images, some
from avalanche_fmlora.data.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Domain,
    ImageSet,
    Transform,
    class_incremental,
    domain_incremental,
)
from avalanche_fmlora.data.cache import cached_images

logger = logging.getLogger(__name__)

Augment = Literal["none", "flip", "crop_flip"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_DECODER_VERSION = 1
# Only formats that PIL decodes by itself: EPS, for one, would start Ghostscript on a stranger's file.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")


def image_folder(
    path: str | os.PathLike[str],
    *,
    image_size: int,
    n_experiences: int | None = None,
    class_order_seed: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    augment: Augment = "none",
    cache_dir: str | os.PathLike[str] | None = None,
    interpolation: Interpolation = "bicubic",
    name: str | None = None,
) -> Any:
    """An Avalanche benchmark from images on disk, decoded once and cached.

    `train/<class>/<image>` with `test/<class>/<image>` is class-incremental, `<domain>/train/<class>/<image>` with
    `<domain>/test/<class>/<image>` is domain-incremental. Classes and domains are ordered by name. A zip is read in
    place; one folder around everything in it is tolerated. Hidden files and files that are no images are passed over.

    Args:
        path: a folder or a .zip.
        image_size: side of the square images in pixels: the shorter side is resized to it, then the centre is cut out.
        n_experiences: class-incremental: must divide the number of classes, None is 10. Domain-incremental: the number
            of domains or None.
        class_order_seed: draws the order of the classes, or of the domains; None is the order of their names.
        mean: of each channel in [0, 1], subtracted.
        std: of each channel, divided by.
        augment: of training images: "flip" mirrors half of them, "crop_flip" also cuts out a part of at least half
            the area and resizes it back.
        cache_dir: where decoded images are kept; None is `$XDG_CACHE_HOME/avalanche_fmlora` (or `~/.cache/…`).
        interpolation: of the resizing, antialiased.
        name: of the benchmark in records; None is the name of the folder or the zip without its ending.

    Returns:
        The benchmark, with ``info`` (:class:`avalanche_fmlora.data.base.BenchmarkInfo`).

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if it has neither layout or both, a class is missing somewhere, classes don't divide, a member or
            link leaves it, or images can't be decoded. The message names the files or the numbers.
    """
    augmentation = _augmentation(augment, image_size)
    if interpolation not in get_args(Interpolation):
        raise ValueError(f"Expected `interpolation` to be one of {get_args(Interpolation)} but got {interpolation!r}.")
    with Source(path) as source:
        files = placed_images(source)
        domains = sorted({f.domain for f in files})
        check_experiences(source.path.name, n_experiences, domains)
        names = common_classes(source.path.name, files)
        images = cached_images(
            _cache_key(source, files, image_size, interpolation),
            (len(files), image_size, image_size, 3),
            partial(_decode_all, source, files, image_size, interpolation),
            None if cache_dir is None else Path(cache_dir),
        )
    index = {label: i for i, label in enumerate(names)}
    common: dict[str, Any] = {
        "class_order_seed": class_order_seed,
        "mean": mean,
        "std": std,
        "augment": augmentation,
        "extra": {
            "source": source.path.name,
            "n_files": len(files),
            "resize": f"shorter side to {image_size} px ({interpolation}, antialiased), centre crop",
            "augment": augment,
        },
    }
    title = name or (source.path.stem if source.is_zip else source.path.resolve().name)
    sets = {(d, s): _subset(images, files, index, d, s) for d in domains for s in SPLITS}
    if domains == [""]:
        count = 10 if n_experiences is None else n_experiences
        return class_incremental(title, sets["", "train"], sets["", "test"], names, n_experiences=count, **common)
    return domain_incremental(title, [Domain(d, sets[d, "train"], sets[d, "test"]) for d in domains], names, **common)


def _augmentation(augment: str, image_size: int) -> tuple[Transform, ...]:
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"Expected `image_size` to be a positive whole number of pixels but got {image_size!r}.")
    if augment not in get_args(Augment):
        raise ValueError(f"Expected `augment` to be one of {get_args(Augment)} but got {augment!r}.")
    flip = v2.RandomHorizontalFlip()
    crop = v2.RandomResizedCrop(image_size, scale=(0.5, 1.0), antialias=True)
    return {"none": (), "flip": (flip,), "crop_flip": (crop, flip)}[augment]


def _subset(images: np.ndarray, files: list[Placed], index: dict[str, int], domain: str, split: str) -> ImageSet:
    """One split of one domain: a slice, since the files are sorted by domain and split."""
    rows = [i for i, f in enumerate(files) if (f.domain, f.split) == (domain, split)]
    labels = np.array([index[files[i].label] for i in rows], dtype=np.int64)
    return ImageSet(images[rows[0] : rows[-1] + 1], labels)


def _cache_key(source: Source, files: list[Placed], image_size: int, interpolation: str) -> str:
    facts = [source.identity, image_size, interpolation, _DECODER_VERSION, PIL.__version__]
    listing = [(f.entry.name, f.entry.size, f.entry.stamp, f.domain, f.split, f.label) for f in files]
    return hashlib.sha256(json.dumps([facts, listing]).encode()).hexdigest()[:32]


def _decode_all(source: Source, files: list[Placed], image_size: int, interpolation: str) -> np.ndarray:
    """uint8 [M, image_size, image_size, 3]; ValueError naming the files that can't be decoded."""
    start = time.perf_counter()
    Image.init()
    images = np.empty((len(files), image_size, image_size, 3), dtype=np.uint8)

    def decode(row: int) -> str | None:
        try:
            data = source.read(files[row].entry)
            images[row] = decode_image(data, image_size, interpolation)
        except Exception as error:  # PIL's decoders raise nearly any type on broken data
            return f"'{files[row].entry.name}' ({error})"
        return None

    with _whole_images_only():
        pool = ThreadPoolExecutor(max_workers=os.cpu_count())
        try:
            broken = [said for said in pool.map(decode, range(len(files))) if said]
        finally:
            pool.shutdown(cancel_futures=True)
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(files)} images in '{source.path.name}' can't be decoded: "
            f"{some(broken, quote=False)}. Replace or remove these files."
        )
    logger.info("Decoded %d images of %s in %.1f s", len(files), source.path.name, time.perf_counter() - start)
    return images


@contextlib.contextmanager
def _whole_images_only() -> Iterator[None]:
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
    resized to `image_size`, the centre is cut out.

    Raises:
        ValueError: if the data are empty or of a kind that can't become 8-bit RGB.
        OSError: or another error of PIL, if the data are broken.
    """
    if not data:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(data), formats=[f for f in _FORMATS if f in Image.OPEN]) as opened:
        opened.load()
        image = _to_rgb(ImageOps.exif_transpose(opened))
    width, height = image.size
    scale = image_size / min(width, height)
    full = (max(image_size, round(width * scale)), max(image_size, round(height * scale)))
    left, top = (round((side - image_size) / 2) for side in full)
    x, y = width / full[0], height / full[1]
    # The box makes PIL compute the centre only, at bounded memory: the pixels of a whole resize, up to what PIL rounds
    # and clips between its two passes, whose order it picks by size.
    box = (left * x, top * y, (left + image_size) * x, (top + image_size) * y)
    resample = Image.Resampling[interpolation.upper()]
    return np.asarray(image.resize((image_size, image_size), resample, box=box))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range: save the image with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels exceed 0..65535: save the image with 8 or 16 bits")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
