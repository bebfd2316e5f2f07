"""ImageNet-R: 30,000 renditions of 200 ImageNet classes (arXiv 2006.16241), class-incremental, with a fixed split."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from avalanche_fmlora.data.archive import IMAGE_SUFFIXES, Entry, Placed, some
from avalanche_fmlora.data.base import IMAGENET_MEAN, IMAGENET_STD
from avalanche_fmlora.data.download import RemoteFile
from avalanche_fmlora.data.presets import Preset
from avalanche_fmlora.data.published import Files, Options, PathLike, class_benchmark, list_hash, locate
from avalanche_fmlora.data.transforms import Transform

# Size and checksum as TensorFlow Datasets lists them (datasets/imagenet_r/checksums.tsv).
ARCHIVE = RemoteFile(
    "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
    "imagenet-r.tar",
    "sha256:18c6bf493b39a0d975d48e587437f562caab9c52ae6327dcfa9dd8eb54aa1b52",
    2_191_079_936,
)
N_CLASSES, N_IMAGES = 200, 30_000

_LAYOUT = "folders `<wnid>/<image>` such as `n01443537/art_0.jpg`, also below further folders such as imagenet-r/train/"


def remotes() -> tuple[RemoteFile, ...]:
    """The published files."""
    return (ARCHIVE,)


def unpacked(folder: Path) -> set[str]:
    """Names of published files whose content lies in `folder` already, unpacked."""
    wnid = f"n{'[0-9]' * 8}"
    found = any(path.is_dir() for above in ("", "*/", "*/*/") for path in folder.glob(f"{above}{wnid}"))
    return {ARCHIVE.name} if found else set()


def split_imagenet_r(
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
    split_file: PathLike | None = None,
    subset: bool = False,
    cache_dir: PathLike | None = None,
) -> Any:
    """200 classes in `n_experiences` of equal size (5, 10 and 20 are usual), 24,000 training and 6,000 test images.

    ImageNet-R has no official split. Ours depends on the file names alone: see :func:`fixed_split`. Classes are ordered
    by WordNet id.

    Args:
        path: the archive imagenet-r.tar, or a folder that holds it or the class folders; where training and test images
            lie in folders of their own, these are put together first.
        download: fetch the archive (2.2 GB) into the folder `path`, or below the cache folder if that is None;
            nothing if it is there unpacked.
        n_experiences: must divide the number of classes.
        class_order_seed: draws the order of the classes; None is the order of their WordNet ids.
        seed: of the random crops and flips of training images, in strategies of this package: with it they are the same
            in runs of other seeds. None draws them from the run's seed.
        image_size: side of the network's input in pixels.
        mean: of each channel in [0, 1], subtracted; 0 with `std` 1 leaves the input in [0, 1].
        std: of each channel, divided by.
        augment: see :func:`avalanche_fmlora.data.transforms.make_transforms`.
        train_transform: in place of the preset's: a stored image, uint8 [3, H, W] -> uint8 [3, S, S] with S the
            `image_size`; conversion to float, `mean` and `std` follow it.
        eval_transform: the same for test images, and for training images in passes without augmentation.
        split_file: another split, as the list of its *training* images; all others are test images. Plain text with one
            path a line (what follows a space is passed over), or YAML with the list under `data`, as published with
            CODA-Prompt (`imagenet-r_train.yaml`). Of each path the last two parts count, `<wnid>/<image>`.
        subset: accept another number of images or classes than 30,000 and 200.
        cache_dir: where decoded images are kept; None is `$XDG_CACHE_HOME/avalanche_fmlora` (or `~/.cache/…`).

    Returns:
        An Avalanche benchmark with ``info``; its ``extra`` holds the split's rule and hash.

    Raises:
        FileNotFoundError: if there is nothing at `path` or `split_file`.
        ConnectionError: if the server can't be reached.
        ValueError: if files are missing or broken; the message names them.
        OSError: if a disk is full.
    """
    options = Options(
        *("split_imagenet_r", image_size, mean, std, augment, class_order_seed, cache_dir, subset),
        train_transform,
        eval_transform,
        seed,
    )
    with Files(locate(options.title, path, download, remotes()), cache_dir) as files:
        images = _images(files, options)
        if split_file is None:
            train = fixed_split(images)
            rule = "per class the 80 % with the smallest sha256 of `<wnid>/<image>`"
        else:
            train = read_split(Path(split_file).expanduser(), images)
            rule = f"training images of {Path(split_file).name}, all others for test"
        placed = [Placed(e, "", "train" if key in train else "test", key.split("/")[0]) for key, e in images.items()]
        classes = sorted({image.label for image in placed})
        return class_benchmark(
            options, files, placed, classes, n_experiences, split_rule=rule, split_list_sha256=list_hash(placed)
        )


def fixed_split(images: Iterable[str]) -> set[str]:
    """The training images: in each class the 80 % whose names have the smallest sha256.

    The n images of a class, named `<wnid>/<image>`, are ordered by the sha256 of their name (UTF-8, hexadecimal). The
    first floor(0.8 n) are for training. One more is in those classes where 0.8 n lost most by rounding down (of equals,
    those first by WordNet id), as many as bring the total to 0.8 of all images, rounded: 24,000 of 30,000.

    >>> sorted(fixed_split(["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"]))
    ['a/0', 'a/1', 'a/2', 'b/1', 'b/2']
    >>> len(fixed_split([f"a/{i}" for i in range(7)] + [f"b/{i}" for i in range(8)]))
    12
    """
    classes: dict[str, list[str]] = defaultdict(list)
    for image in images:
        classes[image.split("/")[0]].append(image)
    total = (4 * sum(len(members) for members in classes.values()) + 2) // 5
    counts = {wnid: 4 * len(members) // 5 for wnid, members in classes.items()}
    by_loss = sorted(classes, key=lambda wnid: (-(4 * len(classes[wnid]) % 5), wnid))
    for wnid in by_loss[: total - sum(counts.values())]:
        counts[wnid] += 1
    return {
        image
        for wnid, members in classes.items()
        for image in sorted(members, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[: counts[wnid]]
    }


def read_split(path: Path, images: Iterable[str]) -> set[str]:
    """The training images that a file lists.

    Args:
        path: text or YAML, see :func:`split_imagenet_r`.
        images: all that there are, as `<wnid>/<image>`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no list, names images that are not there, or seems to be the list of the test images.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no list of training images '{path}'.")
    listed = _listed(path)
    train = {"/".join(name.split("/")[-2:]) for name in listed}
    present = set(images)
    missing = sorted(train - present)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(train)} images that '{path}' lists are not in the data set: {some(missing)}. "
            "Expected paths that end in `<wnid>/<image>`."
        )
    if 2 * len(train) < len(present):
        raise ValueError(
            f"'{path}' lists {len(train)} of {len(present)} images, less than half: give the list of training images."
        )
    return train


def _listed(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() not in (".yaml", ".yml"):
        return [line.split()[0] for line in text.splitlines() if line.strip()]
    try:
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"'{path}' is no valid YAML: {error}") from None
    names = content.get("data") if isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"Expected '{path}' to hold a list of paths, or one under `data`.")
    return names


def _images(files: Files, options: Options) -> dict[str, Entry]:
    """`<wnid>/<image>` -> the file."""
    found = _class_images(files.entries)
    if not found and (archive := files.archive_for(options.title, ARCHIVE)):
        files.add_archive(archive)
        found = _class_images(files.entries)
    if not found:
        raise ValueError(f"Expected {_LAYOUT} in '{files.path}' but found none: give the folder that holds them.")
    images: dict[str, Entry] = {}
    for entry in found:
        key = "/".join(entry.parts[-2:])
        if key in images:
            raise ValueError(
                f"'{files.path}' holds '{key}' twice: '{images[key].name}' and '{entry.name}'. Remove one."
            )
        images[key] = entry
    classes = {key.split("/")[0] for key in images}
    options.require(
        (len(images), len(classes)) == (N_IMAGES, N_CLASSES),
        f"{N_IMAGES:,} images of {N_CLASSES} classes",
        f"{len(images):,} of {len(classes)}",
        files.path,
    )
    return images


def _class_images(entries: Iterable[Entry]) -> list[Entry]:
    return [e for e in entries if _is_wnid(e.parts[-2:-1]) and Path(e.name).suffix.lower() in IMAGE_SUFFIXES]


def _is_wnid(folder: tuple[str, ...]) -> bool:
    return bool(folder) and len(folder[0]) == 9 and folder[0][0] == "n" and folder[0][1:].isdigit()
