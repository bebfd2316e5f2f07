"""A folder or a zip archive of images, seen as one list of files that can be read into memory.

A zip is never unpacked: members are read straight from the archive. Still, a member or a link that points out of the
archive or the folder is refused by name, so that an archive that passes here is also safe to unpack.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

LAYOUTS = (
    "either `train/<class>/<image>` and `test/<class>/<image>` (class-incremental) or `<domain>/train/<class>/<image>` "
    "and `<domain>/test/<class>/<image>` (domain-incremental), as a folder or a .zip"
)

_SUFFIXES = "jpg jpeg jpe jfif png webp bmp dib gif tif tiff ppm pgm pbm pnm tga jp2 avif"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
_UNREAD = "heic heif hif jxl svg psd dng cr2 cr3 nef arw raf orf"
UNREAD_SUFFIXES = frozenset(f".{suffix}" for suffix in _UNREAD.split())
SPLITS = ("train", "test")

_SAMPLE = 4096
_SKIPPED_NAMES = {"__macosx", "thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class Entry:
    """One file. `name` is its path below the root with `/`; `stamp` changes with the content (mtime or CRC)."""

    name: str
    size: int
    stamp: int
    member: str = field(default="", compare=False)

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders and the file name."""
        return tuple(self.name.split("/"))


class Source:
    """Files below `path`, without hidden ones, sorted by name; use as a context manager.

    Args:
        path: a folder or a zip archive.

    Attributes:
        entries: the files.
        folders: folders that are named on their own, which may be empty.
        identity: what tells this source's files from those of another one that has the same names, sizes and stamps.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if it is a file but no sound zip, or if a member or a link leaves it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self._zip: zipfile.ZipFile | None = None
        if not self.path.exists():
            raise FileNotFoundError(f"Expected images at '{self.path}' but nothing is there: give {LAYOUTS}.")
        if self.path.is_dir():
            root = self.path.resolve()
            self.identity = str(root)
            found: list[Entry] = []
            folders: list[str] = []
            for name, entry in _walk(root, root, "", (root,)):
                if entry is None:
                    folders.append(name)
                else:
                    found.append(entry)
        else:
            self.identity = "zip"
            self._zip = _open_zip(self.path)
            try:
                found, folders = _zip_entries(self.path.name, self._zip)
            except BaseException:
                self._zip.close()
                raise
        self.entries: tuple[Entry, ...] = tuple(sorted(found, key=lambda e: e.parts))
        self.folders: frozenset[str] = frozenset(folders)

    @property
    def is_zip(self) -> bool:
        """Whether the files are members of an archive."""
        return self._zip is not None

    def read(self, entry: Entry) -> bytes:
        """The file's bytes; several threads may read at once.

        Raises:
            ValueError: if the archive's data for it are broken or packed in a way Python can't read.
        """
        if self._zip is None:
            return (self.path / entry.member).read_bytes()
        try:
            return self._zip.read(entry.member)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError) as error:
            raise ValueError(f"the archive's data are broken ({error})") from error

    def checksum(self, entry: Entry) -> int:
        """Tells a file from others of its size: a zip's own of the content, else that of three samples of its bytes."""
        if self._zip is not None:
            return entry.stamp
        total = 0
        with (self.path / entry.member).open("rb") as file:
            for start in (0, entry.size // 2, max(0, entry.size - _SAMPLE)):
                file.seek(start)
                total = zlib.crc32(file.read(_SAMPLE), total)
        return total

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._zip is not None:
            self._zip.close()


def _skipped(parts: tuple[str, ...]) -> bool:
    return any(part.startswith(".") or part.lower() in _SKIPPED_NAMES for part in parts)


def _walk(root: Path, folder: Path, prefix: str, above: tuple[Path, ...]) -> Iterator[tuple[str, Entry | None]]:
    """(name, entry) of each file, (name, None) of each folder; `above`: the real folders on the way, against loops."""
    with os.scandir(folder) as scan:
        items = sorted(scan, key=lambda item: item.name)
    for item in items:
        name = prefix + item.name
        if _skipped((item.name,)):
            continue
        if item.is_symlink():
            target = Path(item.path).resolve()
            if not target.is_relative_to(root):
                raise ValueError(
                    f"'{name}' in '{root}' is a link to '{target}', outside of the folder: no path may leave it. "
                    "Replace the link by a copy."
                )
            if not target.exists():
                raise ValueError(f"'{name}' in '{root}' is a link to '{target}', which is missing: remove the link.")
            if target in above:
                raise ValueError(f"'{name}' in '{root}' is a link to a folder that holds it: remove the link.")
        if item.is_dir():
            yield name, None
            yield from _walk(root, Path(item.path), name + "/", (*above, Path(item.path).resolve()))
        elif item.is_file():
            status = item.stat()
            yield name, Entry(name, status.st_size, status.st_mtime_ns, member=name)


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise ValueError(
            f"Expected a folder or a .zip but '{path}' is no zip archive, or a torn one ({error}; "
            f"{path.stat().st_size:,} bytes): fetch or pack it again."
        ) from error


def _zip_entries(archive: str, opened: zipfile.ZipFile) -> tuple[list[Entry], list[str]]:
    entries: dict[str, Entry] = {}
    folders = []
    for info in opened.infolist():
        _refuse_unsafe(archive, info)
        name = "/".join(part for part in info.filename.split("/") if part not in ("", "."))
        if not name or _skipped(tuple(name.split("/"))):
            continue
        if info.is_dir():
            folders.append(name)
        elif name in entries:
            raise ValueError(f"'{archive}' holds two members named '{name}': pack it again with one of them.")
        else:
            entries[name] = Entry(name, info.file_size, info.CRC, member=info.filename)
    return list(entries.values()), folders


def _refuse_unsafe(archive: str, info: zipfile.ZipInfo) -> None:
    """Raise ValueError for a member that could leave the archive's folder or can't be read."""
    name = info.orig_filename
    parts = name.split("/")
    why = None
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        why = "is an absolute path"
    elif "\\" in name or "\0" in name:
        why = "has a backslash or a NUL in its name"
    elif ".." in parts:
        why = "climbs with '..'"
    elif stat.S_ISLNK(info.external_attr >> 16):
        why = "is a symbolic link"
    if why:
        raise ValueError(
            f"Member '{name}' of '{archive}' {why}: no path may leave the archive's folder. "
            "Pack the images again with plain relative paths."
        )
    if info.flag_bits & 0x1:
        raise ValueError(f"Member '{name}' of '{archive}' is encrypted: pack the images again without a password.")


@dataclass(frozen=True)
class Placed:
    """An image with its place; `domain` is empty for class-incremental layouts."""

    entry: Entry
    domain: str
    split: str
    label: str


def placed_images(source: Source) -> list[Placed]:
    """Every image with its place, sorted by it; ValueError for another layout or a class folder without images."""
    what = source.path.name
    depth = _wrapping_depth(source)
    images: list[Placed] = []
    strays: list[str] = []
    unread: list[str] = []
    class_folders: dict[str, int] = {}
    for parts in [tuple(f.split("/"))[depth:] for f in source.folders]:
        if _place(parts):
            class_folders.setdefault("/".join(parts), 0)
    for entry in source.entries:
        parts = entry.parts[depth:]
        place = _place(parts[:-1])
        suffix = Path(entry.name).suffix.lower()
        is_image = suffix in IMAGE_SUFFIXES
        if place and suffix in UNREAD_SUFFIXES:
            unread.append("/".join(parts))
        if place:
            folder = "/".join(parts[:-1])
            class_folders[folder] = class_folders.get(folder, 0) + is_image
        if is_image and place:
            images.append(Placed(entry, *place))
        elif is_image:
            strays.append("/".join(parts))
    if not images and not strays and not class_folders:
        raise ValueError(f"'{source.path}' holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}): give {LAYOUTS}.")
    if strays:
        raise ValueError(
            f"{len(strays)} of {len(strays) + len(images)} images in '{what}' are in no class folder: {some(strays)}. "
            f"Expected {LAYOUTS}."
        )
    if unread:
        raise ValueError(
            f"{len(unread)} images in '{what}' are of kinds that can't be read here: {some(unread)}. Convert them, to "
            "JPEG or PNG say, or remove them."
        )
    bare = sorted(folder for folder, count in class_folders.items() if not count)
    if bare:
        raise ValueError(
            f"{len(bare)} class folders in '{what}' hold no image: {some(bare)}. Add images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}) or remove the folders."
        )
    return sorted(images, key=lambda f: (f.domain, f.split, f.label, f.entry.name))


def _place(folders: tuple[str, ...]) -> tuple[str, str, str] | None:
    """(domain, split, class) of a class folder, else None."""
    if len(folders) == 2 and folders[0] in SPLITS:
        return "", folders[0], unicodedata.normalize("NFC", folders[1])
    if len(folders) == 3 and folders[1] in SPLITS and folders[0] not in SPLITS:
        return (unicodedata.normalize("NFC", folders[0]), folders[1], unicodedata.normalize("NFC", folders[2]))
    return None


def _wrapping_depth(source: Source) -> int:
    """1 if everything but loose files is in one folder that is no split, else 0 (one domain is none)."""
    tops = {e.parts[0] for e in source.entries if len(e.parts) > 1} | {f.split("/")[0] for f in source.folders}
    return int(len(tops) == 1 and not tops & set(SPLITS))


def check_experiences(what: str, n_experiences: int | None, domains: list[str]) -> None:
    """ValueError if both layouts are there ("" is no domain) or the number asked for is not that of the domains."""
    if "" in domains and len(domains) > 1:
        raise ValueError(
            f"'{what}' mixes both layouts: train/ or test/ at the top and the domains {some(domains[1:])}. "
            f"Keep one: {LAYOUTS}."
        )
    if "" not in domains and n_experiences not in (None, len(domains)):
        raise ValueError(
            f"Expected `n_experiences` to be the number of domains of '{what}', {len(domains)} ({some(domains)}), "
            f"but got {n_experiences}: leave it out."
        )


def common_classes(what: str, files: list[Placed]) -> list[str]:
    """The class names, sorted; ValueError if a split or a domain lacks one."""
    names = sorted({f.label for f in files})
    present: dict[tuple[str, str], set[str]] = {(f.domain, s): set() for f in files for s in SPLITS}
    for file in files:
        present[file.domain, file.split].add(file.label)
    lacks = []
    for (domain, split), have in sorted(present.items()):
        missing = sorted(set(names) - have)
        if missing:
            place = f"{domain}/{split}" if domain else split
            lacks.append(f"{place} lacks {len(missing)} of {len(names)} ({some(missing)})")
    if lacks:
        raise ValueError(
            f"Expected every class of '{what}' in every split and domain but {'; '.join(lacks)}. Add images of these "
            "classes or remove the classes everywhere."
        )
    return names


def some(names: Sequence[str], quote: bool = True) -> str:
    shown = ", ".join(repr(n) if quote else n for n in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
