"""The user's own images, in a folder or a zip -> class-incremental or domain-incremental benchmark."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import PIL
from PIL import Image

from avalanche_fmlora.data.archive import SPLITS, Placed, Source, check_experiences, common_classes, placed_images, some
from avalanche_fmlora.data.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Domain,
    ImageSet,
    class_incremental,
    domain_incremental,
)
from avalanche_fmlora.data.cache import cached_images
from avalanche_fmlora.data.decode import decode_image, whole_images_only
from avalanche_fmlora.data.presets import SQUARE_PRESETS, Preset, stored_side
from avalanche_fmlora.data.store import StoredImages, stored_images
from avalanche_fmlora.data.transforms import make_transforms

logger = logging.getLogger(__name__)

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_DECODER_VERSION = 2


def image_folder(
    path: str | os.PathLike[str],
    *,
    image_size: int,
    n_experiences: int | None = None,
    class_order_seed: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    augment: Preset = "none",
    cache_dir: str | os.PathLike[str] | None = None,
    interpolation: Interpolation = "bicubic",
    name: str | None = None,
) -> Any:
    """An Avalanche benchmark from images on disk, decoded once and cached.

    `train/<class>/<image>` with `test/<class>/<image>` is class-incremental, `<domain>/train/<class>/<image>` with
    `<domain>/test/<class>/<image>` is domain-incremental. Classes and domains are ordered by name. A zip is read in
    place; one folder around everything is tolerated. Hidden files and files that are no images are passed over;
    images that can't be read (HEIC, SVG, raw) are refused.

    Args:
        path: a folder or a .zip.
        image_size: side of the square images in pixels: the shorter side is resized to it, then the centre is cut out.
        n_experiences: class-incremental: must divide the number of classes, None is 10. Domain-incremental: the number
            of domains or None.
        class_order_seed: draws the order of the classes, or of the domains; None is the order of their names.
        mean: of each channel in [0, 1], subtracted.
        std: of each channel, divided by.
        augment: what is done to the images, see :func:`avalanche_fmlora.data.transforms.make_transforms`. With "none",
            "flip" and "crop_flip" the central squares are cached, else the whole images.
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
    side = stored_side(augment, image_size)
    transforms = make_transforms(augment, image_size, mean, std)
    if interpolation not in get_args(Interpolation):
        raise ValueError(f"Expected `interpolation` to be one of {get_args(Interpolation)} but got {interpolation!r}.")
    with Source(path) as source:
        files = placed_images(source)
        domains = sorted({f.domain for f in files})
        check_experiences(source.path.name, n_experiences, domains)
        names = common_classes(source.path.name, files)
        square = augment in SQUARE_PRESETS
        decoded = _squares if square else _wholes
        images = decoded(source, files, side, interpolation, None if cache_dir is None else Path(cache_dir))
    index = {label: i for i, label in enumerate(names)}
    common: dict[str, Any] = {
        "class_order_seed": class_order_seed,
        "transforms": transforms,
        "extra": {"source": source.path.name, "n_files": len(files), "listing": _listing(source, files)}
        | (
            {
                "resize": f"shorter side to {image_size} px ({interpolation}, antialiased), centre crop",
                "augment": augment,
            }
            if square
            else {"stored": f"shorter side at most {side} px ({interpolation}, antialiased)", **transforms.facts()}
        ),
    }
    title = name or (source.path.stem if source.is_zip else source.path.resolve().name)
    sets = {(d, s): _subset(images, files, index, d, s) for d in domains for s in SPLITS}
    if domains == [""]:
        count = 10 if n_experiences is None else n_experiences
        return class_incremental(title, sets["", "train"], sets["", "test"], names, n_experiences=count, **common)
    return domain_incremental(title, [Domain(d, sets[d, "train"], sets[d, "test"]) for d in domains], names, **common)


def folder_listing(path: str | os.PathLike[str]) -> str:
    """What a record of :func:`image_folder` says of its files: 64 hexadecimal digits, without reading any image.

    It changes with the name, place, size and content of an image (in a folder, of samples of the file's bytes); not
    with where the folder is or when it was written.

    Raises:
        FileNotFoundError, ValueError: as :func:`image_folder`.
    """
    with Source(path) as source:
        return _listing(source, placed_images(source))


def _listing(source: Source, files: list[Placed]) -> str:
    rows = [(f.domain, f.split, f.label, f.entry.parts[-1], f.entry.size, source.checksum(f.entry)) for f in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _subset(
    images: np.ndarray | StoredImages, files: list[Placed], index: dict[str, int], domain: str, split: str
) -> ImageSet:
    """One split of one domain: a slice, since the files are sorted by domain and split."""
    rows = [i for i, f in enumerate(files) if (f.domain, f.split) == (domain, split)]
    labels = np.array([index[files[i].label] for i in rows], dtype=np.int64)
    return ImageSet(images.subset(rows) if isinstance(images, StoredImages) else images[rows[0] : rows[-1] + 1], labels)


def _squares(source: Source, files: list[Placed], side: int, interpolation: str, cache_dir: Path | None) -> np.ndarray:
    return cached_images(
        _cache_key(source, files, side, interpolation),
        (len(files), side, side, 3),
        partial(_decode_all, source, files, side, interpolation),
        cache_dir,
    )


def _wholes(source: Source, files: list[Placed], side: int, interpolation: str, cache_dir: Path | None) -> StoredImages:
    return stored_images(
        _cache_key(source, files, side, interpolation),
        [f.entry.name for f in files],
        lambda row: source.read(files[row].entry),
        side,
        title=source.path.name,
        interpolation=interpolation,
        cache_dir=cache_dir,
    )


def _cache_key(source: Source, files: list[Placed], side: int, interpolation: str) -> str:
    facts = [source.identity, side, interpolation, _DECODER_VERSION, PIL.__version__]
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

    with whole_images_only():
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
