"""Whole decoded images of any shape on disk: one flat file of uint8, mapped into memory, and an index of it.

``<key>.images`` holds pixel after pixel, ``<key>.npz`` the shape and sha256 of each image and the size of all. Both are
written under another name and renamed, the index last, so a reader sees a whole pair or none. A lock makes a second
process wait for the first one's files instead of decoding, and storing, everything again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from avalanche_fmlora.data.cache import FULL, UNWRITABLE, default_cache_dir, locked, write_whole
from avalanche_fmlora.data.decode import decode_whole, encoded_size, whole_images_only, whole_size

logger = logging.getLogger(__name__)

_FORMAT = "avalanche_fmlora.store.v1"
_ESTIMATED_FROM = 256
_REPORT_EVERY_S = 30.0
_LARGE_BYTES = 10**9
_DIGEST_BYTES = 32


class StoredImages:
    """uint8 images [H, W, 3] of any shapes in a memory-mapped file; ``images[i]`` is a copy of one.

    Reading checks an image against its sha256 the first time this process reads it. Pickled, it is opened anew by path.

    Attributes:
        shapes: int64 [M, 2], height and width.
    """

    def __init__(self, folder: Path, key: str, rows: np.ndarray | None = None) -> None:
        self._folder, self._key = folder, key
        self.path = folder / f"{key}.images"
        with open(folder / f"{key}.npz", "rb") as file, np.load(file, allow_pickle=False) as index:
            said, shapes, self._digests = str(index["format"]), index["shapes"].astype(np.int64), index["digests"]
            size = int(index["n_bytes"])
        if said != f"{_FORMAT} {key}" or self._digests.shape != (len(shapes), _DIGEST_BYTES):
            raise ValueError("its index is of another kind")
        ends = np.cumsum(shapes.prod(axis=1) * 3)
        if size != self.path.stat().st_size or size != ends[-1]:
            raise ValueError(f"holds {self.path.stat().st_size} bytes, not {size}")
        self._pixels = np.memmap(self.path, dtype=np.uint8, mode="r")
        self._starts = ends - shapes.prod(axis=1) * 3
        self._all_shapes, self._checked = shapes, np.zeros(len(shapes), dtype=bool)
        self._rows = np.arange(len(shapes)) if rows is None else rows
        self.shapes = shapes[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        row = int(self._rows[index])
        height, width = (int(side) for side in self._all_shapes[row])
        start = int(self._starts[row])
        image = np.array(self._pixels[start : start + height * width * 3]).reshape(height, width, 3)
        if not self._checked[row]:
            if hashlib.sha256(image.data).digest() != self._digests[row].tobytes():
                raise OSError(f"The image cache '{self.path}' is damaged at image {row}: delete it and run again.")
            self._checked[row] = True
        return image

    def subset(self, rows: Sequence[int] | np.ndarray) -> StoredImages:
        """The images of these rows, in this order, from the same file."""
        part = object.__new__(StoredImages)
        part.__dict__.update(self.__dict__)
        part._rows = self._rows[np.asarray(rows, dtype=np.int64)]
        part.shapes = self._all_shapes[part._rows]
        return part

    def digest(self) -> str:
        """sha256 of all shapes and pixels, in order (of their own sha256): 64 hexadecimal digits."""
        digest = hashlib.sha256(self.shapes.tobytes())
        digest.update(self._digests[self._rows].tobytes())
        return digest.hexdigest()

    def __reduce__(self) -> tuple[type[StoredImages], tuple[Path, str, np.ndarray]]:
        return StoredImages, (self._folder, self._key, self._rows)


def stored_images(
    key: str,
    names: Sequence[str],
    read: Callable[[int], bytes],
    side: int,
    *,
    title: str,
    interpolation: str = "bicubic",
    cache_dir: str | os.PathLike[str] | None = None,
) -> StoredImages:
    """The images stored under `key`, or those decoded from what `read` gives, which are then stored.

    Args:
        key: names the content (files, `side`, `interpolation`, version of the decoder) as hexadecimal digits.
        names: of the images, for messages.
        read: the encoded file of an image by its position; called from several threads.
        side: the shorter side is resized to it [pixels], the aspect ratio kept; smaller images stay as they are.
        title: of the data set, for messages.
        interpolation: of the resizing, antialiased.
        cache_dir: the folder; None is :func:`~avalanche_fmlora.data.cache.default_cache_dir`.

    Raises:
        ValueError: if images can't be decoded; it names them.
        OSError: if the folder can't be written or the disk is too small: it says how much is needed and how much free.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    found = _opened(folder, key, len(names))
    if found is not None:
        logger.info("%s: %d decoded images from '%s'", title, len(names), folder)
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{key}.lock", f"decodes the images of {title}"):
            found = _opened(folder, key, len(names))
            if found is None:
                _build(folder, key, names, read, side, title, interpolation)
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise OSError(
                error.errno,
                f"Expected to store the decoded images of {title} in '{folder}' but it can't be written "
                f"({error.strerror}): point `cache_dir` or XDG_CACHE_HOME to a folder that can",
            ) from error
        raise
    return StoredImages(folder, key) if found is None else found


def estimated_bytes(read: Callable[[int], bytes], count: int, side: int) -> int:
    """Bytes of `count` decoded images, from the headers of at most 256 spread evenly over them."""
    sampled = np.unique(np.linspace(0, count - 1, min(count, _ESTIMATED_FROM)).astype(int))
    sizes = []
    for row in sampled.tolist():
        with contextlib.suppress(Exception):  # PIL raises nearly any type; the build names every broken file
            width, height = whole_size(encoded_size(read(row)), side)
            sizes.append(width * height * 3)
    return round(sum(sizes) / len(sizes) * count) if sizes else 0


def _opened(folder: Path, key: str, count: int) -> StoredImages | None:
    """The stored images if the pair is there and whole, else None (logged)."""
    if not (folder / f"{key}.npz").exists():
        return None
    try:
        images = StoredImages(folder, key)
        if len(images) != count:
            raise ValueError(f"holds {len(images)} images, not {count}")
        return images
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("The image cache '%s' is torn or foreign (%s): it is built again.", folder / key, error)
        return None


def _build(
    folder: Path,
    key: str,
    names: Sequence[str],
    read: Callable[[int], bytes],
    side: int,
    title: str,
    interpolation: str,
) -> None:
    Image.init()
    for left in folder.glob(f".{key}.*.part"):  # of a process that was killed: the lock is ours
        left.unlink(missing_ok=True)
    needed = estimated_bytes(read, len(names), side)
    free = shutil.disk_usage(folder).free
    level = logging.INFO if needed < _LARGE_BYTES else logging.WARNING  # so much of a disk is said in any case
    logger.log(
        level,
        "%s: decoding %d images once, shorter side %d px, into about %s of '%s' (%s free)",
        *(title, len(names), side, _readable(needed), folder, _readable(free)),
    )
    if needed > free:
        raise _disk_full(title, folder, needed, free)
    shapes = np.zeros((len(names), 2), dtype=np.int64)
    digests = np.zeros((len(names), _DIGEST_BYTES), dtype=np.uint8)
    broken: list[str] = []

    def decode(row: int) -> np.ndarray | str:
        try:
            return decode_whole(read(row), side, interpolation)
        except Exception as error:  # PIL's decoders raise nearly any type on broken data
            return f"'{names[row]}' ({error})"

    def fill(file: BinaryIO) -> None:
        with whole_images_only():
            for row, image in enumerate(_in_order(decode, len(names), title, level)):
                if isinstance(image, str):
                    broken.append(image)
                elif not broken:
                    pixels = np.ascontiguousarray(image)
                    shapes[row], digests[row] = (
                        image.shape[:2],
                        np.frombuffer(hashlib.sha256(pixels.data).digest(), np.uint8),
                    )
                    file.write(pixels.data)
        if broken:
            shown = ", ".join(broken[:5]) + (" …" if len(broken) > 5 else "")
            raise ValueError(
                f"{len(broken)} of {len(names)} images of {title} can't be decoded: {shown}. "
                "Replace or remove these files."
            )

    try:
        write_whole(folder / f"{key}.images", fill)
        n_bytes = (folder / f"{key}.images").stat().st_size
        index: dict[str, Any] = {"format": f"{_FORMAT} {key}", "shapes": shapes, "digests": digests, "n_bytes": n_bytes}
        write_whole(folder / f"{key}.npz", lambda file: np.savez(file, **index))
    except OSError as error:
        if error.errno in FULL:
            raise _disk_full(title, folder, needed, shutil.disk_usage(folder).free) from error
        raise


def _in_order(decode: Callable[[int], Any], count: int, title: str, level: int) -> Iterator[Any]:
    """``decode(0) … decode(count - 1)``, computed in parallel, a few ahead of what has been taken."""
    workers = os.cpu_count() or 1
    start = said = time.perf_counter()
    pool = ThreadPoolExecutor(workers)
    try:
        pending = deque(pool.submit(decode, row) for row in range(min(count, 4 * workers)))
        for row in range(count):
            yield pending.popleft().result()
            if row + 4 * workers < count:
                pending.append(pool.submit(decode, row + 4 * workers))
            if time.perf_counter() - said > _REPORT_EVERY_S:
                said = time.perf_counter()
                logger.log(level, "%s: %d of %d images decoded", title, row + 1, count)
    finally:
        pool.shutdown(cancel_futures=True)
    logger.log(level, "%s: decoded %d images in %.1f s", title, count, time.perf_counter() - start)


def _disk_full(title: str, folder: Path, needed: int, free: int) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"The decoded images of {title} need about {_readable(needed)} but '{folder}' has {_readable(free)} free: make "
        "room, or point `cache_dir` or XDG_CACHE_HOME to a larger disk",
    )


def _readable(n_bytes: int) -> str:
    """
    >>> _readable(6_200_000_000), _readable(1500)
    ('6.2 GB', '1.5 kB')
    """
    size, units = float(n_bytes), ["bytes", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
