"""CIFAR-100: 60,000 images of 32 × 32 pixels in 100 classes (Krizhevsky, 2009), class-incremental.

The archive's address, its download and all checksums are torchvision's.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR100

from avalanche_fmlora.data.base import IMAGENET_MEAN, IMAGENET_STD, ImageSet, class_incremental
from avalanche_fmlora.data.download import RemoteFile
from avalanche_fmlora.data.presets import Preset
from avalanche_fmlora.data.published import Files, Options, PathLike, locate
from avalanche_fmlora.data.transforms import Transform

ARCHIVE = RemoteFile(CIFAR100.url, CIFAR100.filename, f"md5:{CIFAR100.tgz_md5}", size=169_001_437, by_torchvision=True)

_SIDE = 32
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def remotes() -> tuple[RemoteFile, ...]:
    """The published files."""
    return (ARCHIVE,)


def unpacked(folder: Path) -> set[str]:
    """Names of published files whose content lies in `folder` already, unpacked."""
    found = any((meta.parent / "train").is_file() for pattern in ("meta", "*/meta") for meta in folder.glob(pattern))
    return {ARCHIVE.name} if found else set()


def split_cifar100(
    path: PathLike | None = None,
    *,
    download: bool = False,
    n_experiences: int = 10,
    class_order_seed: int | None = None,
    seed: int | None = None,
    image_size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    augment: Preset = "published",
    train_transform: Transform | None = None,
    eval_transform: Transform | None = None,
    subset: bool = False,
    cache_dir: PathLike | None = None,
) -> Any:
    """100 classes in `n_experiences` of equal size, 50,000 training and 10,000 test images.

    Images are kept at 32 pixels and resized when they are read.

    Args:
        path: the archive cifar-100-python.tar.gz, or a folder that holds it or its files `train`, `test` and `meta`.
        download: fetch the archive (169 MB) into the folder `path`, or below the cache folder if that is None;
            nothing if it is there unpacked.
        n_experiences: must divide the number of classes.
        class_order_seed: draws the order of the classes; None is the official one, by name.
        seed: of the random crops and flips of training images, in strategies of this package: with it they are the same
            in runs of other seeds. None draws them from the run's seed.
        image_size: side of the network's input in pixels.
        mean: of each channel in [0, 1], subtracted; 0 with `std` 1 leaves the input in [0, 1].
        std: of each channel, divided by.
        augment: see :func:`avalanche_fmlora.data.transforms.make_transforms`.
        train_transform: in place of the preset's: a stored image, uint8 [3, H, W] -> uint8 [3, S, S] with S the
            `image_size`; conversion to float, `mean` and `std` follow it.
        eval_transform: the same for test images, and for training images in passes without augmentation.
        subset: accept files with other checksums than the official ones.
        cache_dir: where the archive is decompressed to; None is `$XDG_CACHE_HOME/avalanche_fmlora` (or `~/.cache/…`).

    Returns:
        An Avalanche benchmark with ``info``.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ConnectionError: if the server can't be reached.
        ValueError: if files are missing or not the official ones; the message names them.
        OSError: if a disk is full.
    """
    options = Options(
        *("split_cifar100", image_size, mean, std, augment, class_order_seed, cache_dir, subset),
        train_transform,
        eval_transform,
        seed,
    )
    transforms = options.transforms
    with Files(locate(options.title, path, download, remotes()), cache_dir) as files:
        if _folder(files) is None and (archive := files.archive_for(options.title, ARCHIVE)):
            files.add_archive(archive)
        train, test = (_image_set(files, options, *entry) for entry in (CIFAR100.train_list[0], CIFAR100.test_list[0]))
        meta, key = CIFAR100.meta["filename"], CIFAR100.meta["key"]
        (classes,) = _unpickled(files, options, meta, CIFAR100.meta["md5"], [key])
        return class_incremental(
            options.name,
            train,
            test,
            classes,
            n_experiences=n_experiences,
            class_order_seed=class_order_seed,
            transforms=transforms,
            extra={"source": files.path.name, "subset": subset, "split_rule": "official", **transforms.facts()},
        )


def _folder(files: Files) -> str | None:
    """What the names of `train`, `test` and `meta` start with, if they lie side by side."""
    names = {entry.name for entry in files.entries}
    for name in sorted(names):
        base = name.removesuffix("meta")
        if name.split("/")[-1] == "meta" and {f"{base}train", f"{base}test"} <= names:
            return base
    return None


def _unpickled(files: Files, options: Options, name: str, md5: str, keys: Sequence[str]) -> list[Any]:
    """What one of the three files holds under these keys."""
    base = _folder(files)
    if base is None:
        raise ValueError(
            f"Expected the files `train`, `test` and `meta` side by side in '{files.path}' or below, or the archive "
            f"{ARCHIVE.name}, but they are not there: give the folder cifar-100-python or the archive."
        )
    data = files.read(next(entry for entry in files.entries if entry.name == f"{base}{name}"))
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    options.require(found == md5, f"`{name}` with MD5 {md5}", f"one with {found}", files.path)
    try:
        content = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"`{name}` in '{files.path}' is no pickle of arrays ({error}): fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected `{name}` in '{files.path}' to hold a dictionary but got {type(content).__name__}.")
    if lacking := [key for key in keys if key not in content]:
        raise ValueError(
            f"Expected `{name}` in '{files.path}' to hold {list(keys)} but {lacking} are not there: give CIFAR-100's "
            "files in their Python version."
        )
    return [content[key] for key in keys]


class _ArraysOnly(pickle.Unpickler):
    """Loads arrays, numbers, text, lists and dictionaries; anything else in a pickle could run a stranger's code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _image_set(files: Files, options: Options, name: str, md5: str) -> ImageSet:
    data, labels = _unpickled(files, options, name, md5, ["data", "fine_labels"])
    pixels = np.asarray(data, dtype=np.uint8).reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return ImageSet(np.ascontiguousarray(pixels), np.asarray(labels, dtype=np.int64))
