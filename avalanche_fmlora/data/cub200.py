"""CUB-200-2011: 11,788 photographs of 200 bird species (Wah et al., 2011), officially split, class-incremental."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avalanche_fmlora.data.archive import Entry, Placed, some
from avalanche_fmlora.data.base import IMAGENET_MEAN, IMAGENET_STD
from avalanche_fmlora.data.download import RemoteFile
from avalanche_fmlora.data.presets import Preset
from avalanche_fmlora.data.published import Files, Options, PathLike, class_benchmark, list_hash, locate
from avalanche_fmlora.data.transforms import Transform

# Size and checksum as TensorFlow Datasets lists them (url_checksums/caltech_birds2011.txt); Avalanche lists an MD5.
ARCHIVE = RemoteFile(
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
    "CUB_200_2011.tgz",
    "sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
    1_150_585_339,
)
N_CLASSES, N_IMAGES = 200, 11_788

_LISTS = ("images.txt", "train_test_split.txt", "image_class_labels.txt")


def remotes() -> tuple[RemoteFile, ...]:
    """The published files."""
    return (ARCHIVE,)


def unpacked(folder: Path) -> set[str]:
    """Names of published files whose content lies in `folder` already, unpacked."""
    found = any(
        (path.parent / "images").is_dir() for above in ("", "*/") for path in folder.glob(f"{above}{_LISTS[0]}")
    )
    return {ARCHIVE.name} if found else set()


def split_cub200(
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
    """200 species in `n_experiences` of equal size, 5,994 training and 5,794 test images as officially split.

    Args:
        path: the archive CUB_200_2011.tgz, or a folder that holds it or its content: `images.txt`,
            `train_test_split.txt`, `image_class_labels.txt` and `images/<class>/<image>`.
        download: fetch the archive (1.2 GB) into the folder `path`, or below the cache folder if that is None;
            nothing if it is there unpacked. To be read in place it is decompressed once into the cache folder (1.2 GB
            more).
        n_experiences: must divide the number of classes.
        class_order_seed: draws the order of the classes; None is the official one.
        seed: of the random crops and flips of training images, in strategies of this package: with it they are the same
            in runs of other seeds. None draws them from the run's seed.
        image_size: side of the network's input in pixels.
        mean: of each channel in [0, 1], subtracted; 0 with `std` 1 leaves the input in [0, 1].
        std: of each channel, divided by.
        augment: see :func:`avalanche_fmlora.data.transforms.make_transforms`.
        train_transform: in place of the preset's: a stored image, uint8 [3, H, W] -> uint8 [3, S, S] with S the
            `image_size`; conversion to float, `mean` and `std` follow it.
        eval_transform: the same for test images, and for training images in passes without augmentation.
        subset: accept another number of images or classes than 11,788 and 200.
        cache_dir: where decoded images are kept; None is `$XDG_CACHE_HOME/avalanche_fmlora` (or `~/.cache/…`).

    Returns:
        An Avalanche benchmark with ``info``.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ConnectionError: if the server can't be reached.
        ValueError: if files are missing or broken; the message names them.
        OSError: if a disk is full.
    """
    options = Options(
        *("split_cub200", image_size, mean, std, augment, class_order_seed, cache_dir, subset),
        train_transform,
        eval_transform,
        seed,
    )
    with Files(locate(options.title, path, download, remotes()), cache_dir) as files:
        placed, classes = _images(files, options)
        return class_benchmark(
            options,
            files,
            placed,
            classes,
            n_experiences,
            split_rule="official (train_test_split.txt)",
            split_list_sha256=list_hash(placed),
        )


def _images(files: Files, options: Options) -> tuple[list[Placed], list[str]]:
    """Every image with its place, and the class folders in the official order."""
    base = _base(files, options)
    by_name = {entry.name: entry for entry in files.entries}
    names, splits, labels = (_table(files, by_name[f"{base}{name}"]) for name in _LISTS)
    unmatched = sorted(names.keys() ^ splits.keys() | names.keys() ^ labels.keys())
    if unmatched:
        raise ValueError(
            f"Expected {', '.join(_LISTS)} in '{files.path}' to list the same images but {len(unmatched)} are not in "
            f"all of them: {some(unmatched)}. Unpack the archive again."
        )
    missing = sorted(name for name in names.values() if f"{base}images/{name}" not in by_name)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} images that images.txt lists are not in '{files.path}': {some(missing)}. "
            "Unpack the archive again."
        )
    placed = [
        Placed(by_name[f"{base}images/{name}"], "", "train" if splits[i] == "1" else "test", name.split("/")[0])
        for i, name in names.items()
    ]
    folders = {labels[i]: name.split("/")[0] for i, name in names.items()}
    classes = [folders[label] for label in sorted(folders, key=int)]
    options.require(
        (len(placed), len(classes)) == (N_IMAGES, N_CLASSES),
        f"{N_IMAGES:,} images of {N_CLASSES} classes",
        f"{len(placed):,} of {len(classes)}",
        files.path,
    )
    return placed, classes


def _base(files: Files, options: Options) -> str:
    """What the lists' names start with: the folders above images.txt."""
    found = _list_folders(files)
    if not found and (archive := files.archive_for(options.title, ARCHIVE)):
        files.add_archive(archive)
        found = _list_folders(files)
    if len(found) != 1:
        where = f"in {some(found)} at once" if found else "nowhere"
        raise ValueError(
            f"Expected {', '.join(_LISTS)} side by side in '{files.path}' or a folder below it but found them {where}: "
            "give the folder CUB_200_2011 or the archive CUB_200_2011.tgz."
        )
    return found[0]


def _list_folders(files: Files) -> list[str]:
    names = {entry.name for entry in files.entries}
    bases = sorted(name.removesuffix(_LISTS[0]) for name in names if name.split("/")[-1] == _LISTS[0])
    return [base for base in bases if all(f"{base}{name}" in names for name in _LISTS)]


def _table(files: Files, entry: Entry) -> dict[str, str]:
    """Image id -> what its line says."""
    rows = [line.split() for line in files.read(entry).decode("utf-8", "replace").splitlines() if line.strip()]
    odd = [" ".join(row) for row in rows if len(row) != 2]
    if odd:
        raise ValueError(f"Expected `<image id> <value>` in each line of '{entry.name}' but got {some(odd)}.")
    return dict(rows)
