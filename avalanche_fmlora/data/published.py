"""What the published data sets share: where their files are, archives read in place, and the way to a benchmark."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import PIL

from avalanche_fmlora.data.archive import Entry, Placed, Source, some
from avalanche_fmlora.data.base import Domain, ImageSet, class_incremental, domain_incremental
from avalanche_fmlora.data.cache import default_cache_dir
from avalanche_fmlora.data.config import MODULES
from avalanche_fmlora.data.download import RemoteFile, fetch
from avalanche_fmlora.data.presets import stored_side
from avalanche_fmlora.data.store import StoredImages, stored_images
from avalanche_fmlora.data.tarball import TAR_SUFFIXES, TarSource
from avalanche_fmlora.data.transforms import Transform, Transforms, make_transforms

PathLike = str | os.PathLike[str]

_STORE_VERSION = 1


def prepare(title: str, path: PathLike | None, download: bool, domains: Sequence[str] | None = None) -> Path:
    """As :func:`locate`, by the name of the benchmark alone: for a look before a run starts."""
    module = importlib.import_module(f"avalanche_fmlora.data.{MODULES[title]}")
    remotes = module.remotes() if domains is None else module.remotes(module.check_domains(domains))
    return locate(title, path, download, remotes)


def locate(title: str, path: PathLike | None, download: bool, remotes: Sequence[RemoteFile]) -> Path:
    """The folder or archive of a data set, fetched first if asked for.

    Args:
        title: of the data set, as on the command line.
        path: what the user has; with `download`, the folder that the archives are kept in. None is a folder below
            :func:`~avalanche_fmlora.data.cache.default_cache_dir`.
        download: fetch what is not there, packed or unpacked. An archive given as `path` is taken as it is.
        remotes: the published files.

    Raises:
        FileNotFoundError: if nothing is there.
        ConnectionError, ValueError, OSError: see :func:`~avalanche_fmlora.data.download.fetch`.
    """
    place = default_cache_dir() / "downloads" / MODULES[title] if path is None else Path(path).expanduser()
    if download and not place.is_file():
        here = importlib.import_module(f"avalanche_fmlora.data.{MODULES[title]}").unpacked(place)
        for remote in remotes:
            if remote.name not in here:
                fetch(remote, place)
    if not place.exists():
        raise FileNotFoundError(
            f"Expected {title} at '{place}' but nothing is there: type `--path FOLDER_OR_ARCHIVE` (path=…) if you have "
            f"it, or `--download true` (download=True) to fetch {some([r.url for r in remotes], quote=False)} to there."
        )
    return place


class Files:
    """The files of a folder or an archive, and of archives that lie in the folder; use as a context manager.

    Args:
        path: a folder, a .zip or a .tar, which may be compressed.
        cache_dir: where a compressed .tar is decompressed to.

    Attributes:
        entries: all files; those of an archive in the folder are named `<archive>/<member>`.
    """

    def __init__(self, path: Path, cache_dir: PathLike | None) -> None:
        self.path = path
        self._cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self._stack = ExitStack()
        self._owners: dict[str, Source | TarSource] = {}
        self._sources = [self._open(path)]
        self.entries: list[Entry] = list(self._sources[0].entries)

    @property
    def identity(self) -> str:
        """What tells these files from others of the same names, sizes and times."""
        return json.dumps([source.identity for source in self._sources])

    def add_archive(self, entry: Entry) -> None:
        """Take in the files of an archive that is itself a file of the folder."""
        source = self._open(self.path / entry.member)
        self._sources.append(source)
        for inner in source.entries:
            named = Entry(f"{entry.name}/{inner.name}", inner.size, inner.stamp, member=inner.member)
            self._owners[named.name] = source
            self.entries.append(named)

    def archive_for(self, title: str, remote: RemoteFile) -> Entry | None:
        """The published archive if it lies in the folder.

        Raises:
            ValueError: if only a part of it does.
        """
        by_name = {entry.name: entry for entry in self.entries if len(entry.parts) == 1}
        part = by_name.get(f"{remote.name}.part")
        if remote.name not in by_name and part is not None:
            raise ValueError(
                f"'{self.path}' holds {part.size:,} bytes of {remote.name}, half a download: "
                f"`--benchmark {title} --path '{self.path}' --download true` goes on from there."
            )
        return by_name.get(remote.name)

    def read(self, entry: Entry) -> bytes:
        """A file's bytes; several threads may read at once."""
        return self._owners.get(entry.name, self._sources[0]).read(entry)

    def _open(self, path: Path) -> Source | TarSource:
        if path.is_file() and path.name.lower().endswith(TAR_SUFFIXES):
            return self._stack.enter_context(TarSource(path, self._cache_dir))
        return self._stack.enter_context(Source(path))

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


@dataclass(frozen=True)
class Options:
    """What the builders of all published data sets take; each documents it."""

    title: str
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    augment: str
    class_order_seed: int | None
    cache_dir: PathLike | None
    subset: bool
    train_transform: Transform | None = None
    eval_transform: Transform | None = None
    seed: int | None = None

    @property
    def transforms(self) -> Transforms:
        """Of training and test images."""
        preset = make_transforms(self.augment, self.image_size, self.mean, self.std)
        return preset.replaced(self.train_transform, self.eval_transform).seeded(self.seed)

    @property
    def name(self) -> str:
        """In records: a part of a data set must not pass for the whole."""
        return f"{self.title} (subset)" if self.subset else self.title

    def require(self, holds: bool, expected: str, found: str, where: Path) -> None:
        """Raise ValueError unless the data set is whole or a part is asked for."""
        if not holds and not self.subset:
            raise ValueError(
                f"Expected {self.title} to have {expected} but '{where}' has {found}: unpack it again, or fetch it "
                "into another folder (`--path NEW_FOLDER --download true`). If a part of it is meant, add "
                "`--benchmark.subset true` (subset=True)."
            )


def class_benchmark(
    options: Options, files: Files, images: list[Placed], class_names: Sequence[str], n_experiences: int, **extra: Any
) -> Any:
    """Placed images without domains -> class-incremental benchmark."""
    stored, images = _stored(options, files, images)
    train, test = (_image_set(stored, images, class_names, "", split) for split in ("train", "test"))
    return class_incremental(
        options.name,
        train,
        test,
        class_names,
        n_experiences=n_experiences,
        class_order_seed=options.class_order_seed,
        transforms=options.transforms,
        extra=_facts(options, files, len(images)) | extra,
    )


def domain_benchmark(
    options: Options,
    files: Files,
    images: list[Placed],
    class_names: Sequence[str],
    domains: Sequence[str],
    **extra: Any,
) -> Any:
    """Placed images -> one experience a domain, in the order of `domains`."""
    stored, images = _stored(options, files, images)
    return domain_incremental(
        options.name,
        [
            Domain(d, *(_image_set(stored, images, class_names, d, split) for split in ("train", "test")))
            for d in domains
        ],
        class_names,
        class_order_seed=options.class_order_seed,
        transforms=options.transforms,
        whole=False,
        extra=_facts(options, files, len(images)) | extra,
    )


def list_hash(images: Iterable[Placed]) -> str:
    """sha256 of the lines `<split> <class>/<file>`, sorted and each ended by a newline: the split without pixels."""
    lines = sorted(f"{image.split} {'/'.join(image.entry.parts[-2:])}\n" for image in images)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _stored(options: Options, files: Files, images: list[Placed]) -> tuple[StoredImages, list[Placed]]:
    """The decoded images and their places in the same order."""
    images = sorted(images, key=lambda f: (f.domain, f.split, f.label, f.entry.parts[-1]))
    side = stored_side(options.augment, options.image_size)
    facts = [files.identity, side, _STORE_VERSION, PIL.__version__]
    listing = [(f.entry.name, f.entry.size, f.entry.stamp) for f in images]
    stored = stored_images(
        hashlib.sha256(json.dumps([facts, listing]).encode()).hexdigest()[:32],
        [f.entry.name for f in images],
        lambda row: files.read(images[row].entry),
        side,
        title=options.title,
        cache_dir=options.cache_dir,
    )
    return stored, images


def _image_set(
    stored: StoredImages, images: list[Placed], class_names: Sequence[str], domain: str, split: str
) -> ImageSet:
    index = {name: i for i, name in enumerate(class_names)}
    rows = [i for i, f in enumerate(images) if (f.domain, f.split) == (domain, split)]
    return ImageSet(stored.subset(rows), np.array([index[images[i].label] for i in rows], dtype=np.int64))


def _facts(options: Options, files: Files, n_files: int) -> dict[str, Any]:
    return {"source": files.path.name, "n_files": n_files, "subset": options.subset, **options.transforms.facts()}
