"""DomainNet: 345 classes drawn or photographed in six ways (arXiv 1812.01754), with the official lists.

The cleaned version: 409,832 training and 176,743 test images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avalanche_fmlora.data.archive import IMAGE_SUFFIXES, Entry, Placed, some
from avalanche_fmlora.data.base import IMAGENET_MEAN, IMAGENET_STD
from avalanche_fmlora.data.download import RemoteFile
from avalanche_fmlora.data.presets import Preset
from avalanche_fmlora.data.published import (
    Files,
    Options,
    PathLike,
    class_benchmark,
    domain_benchmark,
    list_hash,
    locate,
)
from avalanche_fmlora.data.transforms import Transform

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
"""In the order of :func:`domainnet` unless another is given: that of the data set's page, which is the alphabet's."""
N_CLASSES = 345

_SPLITS = ("train", "test")
_SITE = "http://csr.bu.edu/ftp/visda/2019/multi-source"
# Sizes and sha256 as TensorFlow Datasets lists them (image_classification/domainnet/checksums.tsv).
_ARCHIVES = {
    "clipart": ("groundtruth/", 1_270_909_081, "f8f248a3e8bbc9868c523ae24e6601b4c2ad102afc60c0efeb4f3255df22354d"),
    "infograph": ("", 4_338_659_804, "891e14f476317e97b6f06d6498c11d0a5b8d0c8b57210765ed9beb072da611fa"),
    "painting": ("groundtruth/", 3_679_366_174, "fa47e6d405503ea0286cabd767f176bd30e988b63ddd7b9db16cf030c9770015"),
    "quickdraw": ("", 459_920_701, "9f37df2a8c3733703dbb35ad9964202a65f675ca30137756457537536b485d84"),
    "real": ("", 6_062_039_589, "d7fe010b430c5b510f85d657d38c4a1924822695fabea4fef57bd00dba251d63"),
    "sketch": ("", 2_633_992_926, "23a7dbae7016b343e934399beaa8a68728fb5e570ebe2c71df9b75cf91c499fc"),
}
_LISTS = {
    "clipart_train": (1_443_819, "affdadf5f95a7583e6b98030a3d35007e2613ee4dd942393c5a705ec2b429312"),
    "clipart_test": (628_917, "62c8e36aaba1c41ad9e249099739707220a44c08f167b37ef420f34a31628a6b"),
    "infograph_train": (1_683_098, "36b44cbd41a2915e0dc73b4f4be8862a6f3c220f93c8d63fb2439beeae3aefda"),
    "infograph_test": (728_028, "413cfa54ac92e7e6b242f4f09fbd9c8ace85c4deaf3cb6c81ff6b68264460136"),
    "painting_train": (2_241_901, "f1da38d50a702fddf1329f85bc607d7a2abcae7e6aec75e1fd49cc1bd340d47b"),
    "painting_test": (971_888, "11472b13b5188e09f06918b12eebb660588c97a20e43e268d9b02e3e37eb8f97"),
    "quickdraw_train": (5_164_600, "3a5edd3bc215772010eebc87f158707703dd7e48091d13b816af81326a9d1c0f"),
    "quickdraw_test": (2_213_400, "2a00a60650a453c65c356da748fec54084a197272137c440e7d52d08947357bf"),
    "real_train": (4_440_944, "19d483256d24aef19e581b65eda8333fd918aef3eb733fe499ff384120e3a289"),
    "real_test": (1_911_327, "2b3f75bcde309aeb5931292084b2162e936b5f189e3bb1ad716f0f74c460864c"),
    "sketch_train": (1_960_222, "72f4bc6afa5702a1ccba800d0053c1427de87439dfaf246dbc9a2e71abfec54f"),
    "sketch_test": (850_581, "3fb48fca18c507c4321f007c3f62b308ec232ff6928cbfe2af64e76ec366e840"),
}


def remotes(domains: Sequence[str] = DOMAINS) -> tuple[RemoteFile, ...]:
    """The published lists and archives of these domains, the lists first."""
    lists = [
        RemoteFile(f"{_SITE}/domainnet/txt/{name}.txt", f"{name}.txt", f"sha256:{_LISTS[name][1]}", _LISTS[name][0])
        for name in (f"{domain}_{split}" for domain in domains for split in _SPLITS)
    ]
    return (*lists, *(_archive(domain) for domain in domains))


def unpacked(folder: Path) -> set[str]:
    """Names of published files whose content lies in `folder` already: lists below it, domains with class folders."""
    domains = {d for d in DOMAINS for above in ("", "*/") if next(folder.glob(f"{above}{d}/*/*.*"), None)}
    lists = {f"{name}.txt" for name in _LISTS if next(folder.glob(f"*/{name}.txt"), None)}
    return {_archive(d).name for d in domains} | lists


def _archive(domain: str) -> RemoteFile:
    folder, size, sha256 = _ARCHIVES[domain]
    return RemoteFile(f"{_SITE}/{folder}{domain}.zip", f"{domain}.zip", f"sha256:{sha256}", size)


def domainnet(
    path: PathLike | None = None,
    *,
    download: bool = False,
    domain_order: Sequence[str] = DOMAINS,
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
    """One experience a domain with all 345 classes, domain-incremental.

    The official lists leave a class out of a domain here and there; ``info.extra["lacking"]`` names these.

    Args:
        path: a folder with the lists `<domain>_train.txt` and `<domain>_test.txt` anywhere below it, and for each
            domain a folder `<domain>/<class>/<image>` or the archive `<domain>.zip`.
        download: fetch lists and archives (18 GB) into the folder `path`, or below the cache folder if that is None;
            not those of a domain that is there unpacked.
        domain_order: the domains in order, which may be fewer than the six of :data:`DOMAINS`.
        class_order_seed: draws the order of the domains instead; None keeps `domain_order`.
        seed: of the random crops and flips of training images, in strategies of this package: with it they are the same
            in runs of other seeds. None draws them from the run's seed.
        image_size: side of the network's input in pixels.
        mean: of each channel in [0, 1], subtracted; 0 with `std` 1 leaves the input in [0, 1].
        std: of each channel, divided by.
        augment: see :func:`avalanche_fmlora.data.transforms.make_transforms`.
        train_transform: in place of the preset's: a stored image, uint8 [3, H, W] -> uint8 [3, S, S] with S the
            `image_size`; conversion to float, `mean` and `std` follow it.
        eval_transform: the same for test images, and for training images in passes without augmentation.
        subset: accept other lists than the official ones.
        cache_dir: where decoded images are kept; None is `$XDG_CACHE_HOME/avalanche_fmlora` (or `~/.cache/…`).

    Returns:
        An Avalanche benchmark with ``info``.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ConnectionError: if the server can't be reached.
        ValueError: if a domain, lists or images are missing or broken; the message names them.
        OSError: if a disk is full.
    """
    domains = check_domains(domain_order)
    options = Options(
        *("domainnet", image_size, mean, std, augment, class_order_seed, cache_dir, subset),
        train_transform,
        eval_transform,
        seed,
    )
    with Files(locate(options.title, path, download, remotes(domains)), cache_dir) as files:
        placed, classes = _images(files, options, domains)
        lacking = {
            f"{d}/{s}": sorted(set(classes) - {f.label for f in placed if (f.domain, f.split) == (d, s)})
            for d in domains
            for s in _SPLITS
        }
        return domain_benchmark(
            options,
            files,
            placed,
            classes,
            domains,
            split_rule="official (<domain>_train.txt, <domain>_test.txt)",
            split_list_sha256=list_hash(placed),
            lacking={place: names for place, names in lacking.items() if names},
        )


def domainnet_cil(
    path: PathLike | None = None,
    *,
    download: bool = False,
    n_experiences: int = 5,
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
    """345 classes, of all six domains together, in `n_experiences` of equal size, class-incremental.

    Result and errors are those of :func:`domainnet`.

    Args:
        path: as there.
        download: as there.
        n_experiences: must divide the number of classes: 5 or 15 are usual.
        class_order_seed: draws the order of the classes; None is the official one.
        seed: as there.
        image_size: as there.
        mean: as there.
        std: as there.
        augment: as there.
        train_transform: as there.
        eval_transform: as there.
        subset: as there.
        cache_dir: as there.
    """
    options = Options(
        *("domainnet_cil", image_size, mean, std, augment, class_order_seed, cache_dir, subset),
        train_transform,
        eval_transform,
        seed,
    )
    with Files(locate(options.title, path, download, remotes()), cache_dir) as files:
        placed, classes = _images(files, options, DOMAINS)
        rule, digest = "official lists of the six domains, together", list_hash(placed)
        pooled = [Placed(f.entry, "", f.split, f.label) for f in placed]
        return class_benchmark(
            options, files, pooled, classes, n_experiences, split_rule=rule, split_list_sha256=digest
        )


def check_domains(domains: Sequence[str]) -> tuple[str, ...]:
    """The domains as a tuple; ValueError unless they are two or more different ones of :data:`DOMAINS`."""
    if len(domains) < 2 or len(set(domains)) < len(domains) or not set(domains) <= set(DOMAINS):
        raise ValueError(
            f"Expected `domain_order` to name two or more of {list(DOMAINS)}, each once, but got {list(domains)}."
        )
    return tuple(domains)


def _images(files: Files, options: Options, domains: Sequence[str]) -> tuple[list[Placed], list[str]]:
    """Every listed image with its place, and the class names in the official order."""
    _add_archives(files, options, domains)
    present: dict[str, Entry] = {}
    for entry in files.entries:
        if len(entry.parts) >= 3 and entry.parts[-3] in domains:
            first = present.setdefault("/".join(entry.parts[-3:]), entry)
            if first is not entry:
                raise ValueError(
                    f"'{files.path}' holds {'/'.join(entry.parts[-3:])} twice, as '{first.name}' and '{entry.name}': "
                    "move one of the two folders elsewhere."
                )
    lists = {entry.parts[-1]: entry for entry in files.entries if entry.name.endswith(".txt")}
    placed: list[Placed] = []
    numbers: dict[str, int] = {}
    missing: list[str] = []
    for name in (f"{domain}_{split}" for domain in domains for split in _SPLITS):
        for image, number in _read_list(files, options, lists, name):
            domain, label, _ = image.split("/")
            if numbers.setdefault(label, number) != number:
                raise ValueError(
                    f"{name}.txt gives class '{label}' the number {number}, another list {numbers[label]}."
                )
            if image in present:
                placed.append(Placed(present[image], domain, name.split("_")[1], label))
            else:
                missing.append(image)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(missing) + len(placed)} images that the lists name are not in '{files.path}': "
            f"{some(missing)}. Unpack the domain's archive again."
        )
    found = f"{len(numbers)} classes in its lists"
    options.require(len(numbers) == N_CLASSES, f"{N_CLASSES} classes", found, files.path)
    return placed, sorted(numbers, key=lambda label: (numbers[label], label))


def _add_archives(files: Files, options: Options, domains: Sequence[str]) -> None:
    """Open the archive of each domain that has no folder of its own."""
    unpacked = {
        e.parts[-3] for e in files.entries if len(e.parts) >= 3 and Path(e.name).suffix.lower() in IMAGE_SUFFIXES
    }
    lacking = []
    for domain in sorted(set(domains) - unpacked):
        archive = files.archive_for(options.title, _archive(domain))
        if archive is None:
            lacking.append(domain)
        else:
            files.add_archive(archive)
    if lacking:
        raise ValueError(
            f"Expected the domains {list(domains)} in '{files.path}' but {lacking} are not there: looked for folders "
            f"like `{lacking[0]}/<class>/<image>` and archives like {lacking[0]}.zip. Fetch {_archive(lacking[0]).url} "
            "into it, or type `--download true`; domainnet goes without if `--domain-order` names the others only."
        )


def _read_list(files: Files, options: Options, lists: dict[str, Entry], name: str) -> list[tuple[str, int]]:
    """(`<domain>/<class>/<image>`, class number) of each line."""
    entry = lists.get(f"{name}.txt")
    if entry is None:
        raise ValueError(
            f"Expected the official list {name}.txt in '{files.path}' or below but it is not there: fetch "
            f"{_SITE}/domainnet/txt/{name}.txt into it, or type `--download true`."
        )
    data = files.read(entry)
    digest = hashlib.sha256(data).hexdigest()
    if digest != _LISTS[name][1]:
        options.require(False, f"{name}.txt with sha256 {_LISTS[name][1]}", f"one with {digest}", files.path)
    rows = [line.split() for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
    odd = [" ".join(r) for r in rows if len(r) != 2 or r[0].count("/") != 2 or not r[1].isdigit()]
    if odd:
        raise ValueError(
            f"Expected `<domain>/<class>/<image> <number>` in each line of {name}.txt but got {some(odd)}."
        )
    return [(image, int(number)) for image, number in rows]
