"""Decoded images on disk: one memory-mappable .npy of uint8 and one small .json that vouches for it.

Both files are written under another name and then renamed, the .json last, so a reader sees a whole pair or none. Two
processes that build the same key write the same bytes, so whichever renames last changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np

from avalanche_fmlora.results.record import is_old

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
"""Errors of a folder, against those of a disk."""

_FORMAT = "avalanche_fmlora.images.v1"


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/avalanche_fmlora`, or `~/.cache/avalanche_fmlora` where the variable is unset or empty.

    Raises:
        FileNotFoundError: if this user has no home folder and the variable is unset.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "avalanche_fmlora"
    try:
        return Path("~/.cache").expanduser() / "avalanche_fmlora"
    except RuntimeError:
        raise FileNotFoundError(
            "this user has no home folder to keep data in: set XDG_CACHE_HOME, or give a folder"
        ) from None


def cached_images(
    key: str, shape: tuple[int, ...], build: Callable[[], np.ndarray], cache_dir: Path | None = None
) -> np.ndarray:
    """The images stored under `key`, or those that `build` makes, which are then stored.

    Args:
        key: names the content, as hexadecimal digits.
        shape: expected, [M, H, W, 3].
        build: makes the images, uint8 of that shape.
        cache_dir: the folder; None is :func:`default_cache_dir`.

    Returns:
        uint8 of `shape`, mapped from the file, read-only; in memory, with a warning logged, if it can't be written.
    """
    try:
        folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    except (FileNotFoundError, RuntimeError) as error:
        logger.warning("No cache folder (%s): the images stay in memory. Set XDG_CACHE_HOME or cache_dir.", error)
        return build()
    stored = _load(folder, key, shape)
    if stored is not None:
        logger.info("Read %d decoded images from %s", shape[0], folder)
        return stored
    images = build()
    try:
        _store(folder, key, images)
    except OSError as error:
        logger.warning("Can't write the image cache in '%s' (%s): the images stay in memory.", folder, error)
        return images
    stored = _load(folder, key, shape)
    return images if stored is None else stored


def _load(folder: Path, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The stored images if the pair is whole and says what is expected, else None (logged)."""
    data, facts = folder / f"{key}.npy", folder / f"{key}.json"
    try:
        if not facts.exists() or not data.exists():
            return None
        said = json.loads(facts.read_text(encoding="utf-8"))
        images = np.lib.format.open_memmap(data, mode="r")
        if images.dtype != np.uint8 or images.shape != shape or not images.flags.c_contiguous:
            raise ValueError(f"holds {images.dtype} of shape {images.shape}, not uint8 of shape {shape}")
        if said != _facts(key, images, data.stat().st_size):
            raise ValueError("does not match its .json")
        return images
    except (OSError, ValueError, EOFError) as error:
        logger.warning("The image cache '%s' is torn or foreign (%s): it is built again.", data, error)
        return None


def _facts(key: str, images: np.ndarray, n_bytes: int) -> dict[str, Any]:
    checksum = zlib.crc32(images.data)
    return {"format": _FORMAT, "key": key, "shape": list(images.shape), "file_bytes": n_bytes, "crc32": checksum}


def _store(folder: Path, key: str, images: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".{key}.*.part"):
        if is_old(left):  # of a process that was killed
            left.unlink(missing_ok=True)
    write_whole(folder / f"{key}.npy", lambda file: np.save(file, images, allow_pickle=False))
    facts = _facts(key, images, (folder / f"{key}.npy").stat().st_size)
    write_whole(folder / f"{key}.json", lambda file: file.write(json.dumps(facts).encode()))


@contextlib.contextmanager
def locked(path: Path, does: str) -> Iterator[None]:
    """Held by one process at a time; a second one says that another process `does` something, and waits."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.info("Another process %s: waiting for it.", does)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_whole(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Let `fill` write a file of another name in the same folder, flush it to disk and rename it to `path`."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
