"""A tar archive of images, plain or compressed, read in place like a folder or a zip (`archive.Source`)."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import logging
import lzma
import os
import re
import shutil
import tarfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from avalanche_fmlora.data.archive import Entry, _skipped
from avalanche_fmlora.data.cache import FULL, UNWRITABLE, locked, write_whole

logger = logging.getLogger(__name__)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

_CHUNK_BYTES = 1 << 22
_BLOCK_BYTES = 512
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


class TarSource:
    """The files of a tar archive, without hidden ones, sorted by name; use as a context manager.

    Nothing is unpacked, so no member can be written anywhere. A compressed archive can't be read from the middle: it is
    decompressed once into a plain .tar in `cache_dir`.

    Args:
        path: the archive.
        cache_dir: where the plain copy of a compressed archive is kept.

    Attributes:
        entries: the files.
        folders: folders that are named on their own.
        identity: what tells this archive from others whose members have the same names, sizes and times.

    Raises:
        ValueError: if it is no sound tar, or if a member leaves it or is a link.
        OSError: if `cache_dir` can't be written or its disk is full.
    """

    def __init__(self, path: Path, cache_dir: Path) -> None:
        self.path = path
        status = path.stat()
        self.identity = f"tar {status.st_size} {status.st_mtime_ns}"
        self._file = open(_plain(path, self.identity, cache_dir), "rb")  # noqa: SIM115 (closed by __exit__)
        try:
            self.entries, self.folders, self._places = _members(path, self._file)
        except BaseException:
            self._file.close()
            raise

    def read(self, entry: Entry) -> bytes:
        """The file's bytes; several threads may read at once."""
        return os.pread(self._file.fileno(), entry.size, self._places[entry.member])

    def __enter__(self) -> TarSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _plain(path: Path, identity: str, cache_dir: Path) -> Path:
    """The archive itself, or its decompressed copy."""
    with open(path, "rb") as file:
        opener = _OPENERS.get(file.read(2))
    if opener is None:
        return path
    key = hashlib.sha256(f"{path.name} {identity}".encode()).hexdigest()[:16]
    plain = cache_dir / f"{path.name.partition('.')[0]}-{key}.tar"
    if plain.exists():
        return plain
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(cache_dir / f".{plain.name}.lock", f"decompresses {path.name}"):
            if not plain.exists():
                _decompress(path, opener, plain)
    except OSError as error:
        if error.errno in (*FULL, *UNWRITABLE):
            free = shutil.disk_usage(next(p for p in (cache_dir, *cache_dir.parents) if p.is_dir())).free
            raise OSError(
                error.errno,
                f"Expected to decompress '{path}' ({path.stat().st_size:,} bytes packed) once into '{cache_dir}' but "
                f"that failed ({error.strerror}; {free:,} bytes are free there): make room, point `cache_dir` or "
                "XDG_CACHE_HOME to another folder, or unpack the archive yourself and give the folder",
            ) from error
        raise
    return plain


def _decompress(path: Path, opener: Any, plain: Path) -> None:
    """Write the whole archive to `plain`, or nothing; the caller holds the lock."""
    for left in plain.parent.glob(f".{plain.name}.*.part"):  # of a process that was killed
        left.unlink(missing_ok=True)
    logger.info("Decompressing %s once into %s", path.name, plain.parent)

    def fill(file: BinaryIO) -> None:
        with opener(path, "rb") as packed:
            while chunk := packed.read(_CHUNK_BYTES):
                file.write(chunk)

    try:
        write_whole(plain, fill)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _torn(path, error) from error
    except OSError as error:
        if error.errno is None:  # gzip's and bzip2's word for broken data; a disk's errors have a number
            raise _torn(path, error) from error
        raise


def _members(path: Path, file: BinaryIO) -> tuple[tuple[Entry, ...], frozenset[str], dict[str, int]]:
    """The files, the folders, and where each file's data start."""
    entries: dict[str, Entry] = {}
    places: dict[str, int] = {}
    folders = set()
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            for member in opened:
                _refuse_unsafe(path, member)
                name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
                if not name or _skipped(tuple(name.split("/"))):
                    continue
                if member.isdir():
                    folders.add(name)
                    continue
                if name in entries:
                    raise ValueError(f"'{path.name}' holds two members named '{name}': pack it again with one of them.")
                entries[name] = Entry(name, member.size, int(member.mtime) ^ (member.chksum << 32), member=member.name)
                places[member.name] = member.offset_data
            end = opened.offset
    except (tarfile.TarError, EOFError) as error:
        raise _torn(path, error) from error
    file.seek(end)
    rest = file.read(_BLOCK_BYTES)
    if rest.strip(b"\0"):  # tarfile stops without a word at a header that is torn
        raise _torn(path, f"what follows byte {end:,} is no member")
    return tuple(sorted(entries.values(), key=lambda e: e.parts)), frozenset(folders), places


def _torn(path: Path, why: object) -> ValueError:
    return ValueError(
        f"Expected a folder, a .zip or a .tar but '{path}' is no tar archive, or a torn one ({why}; "
        f"{path.stat().st_size:,} bytes): fetch or pack it again."
    )


def _refuse_unsafe(path: Path, member: tarfile.TarInfo) -> None:
    """Raise ValueError for a member that could leave the archive's folder, or is no plain file or folder."""
    if member.issparse():
        raise ValueError(
            f"Member '{member.name}' of '{path.name}' is stored with holes left out: pack the images again without "
            "--sparse."
        )
    why = None
    if member.name.startswith("/") or re.match(r"[A-Za-z]:", member.name):
        why = "is an absolute path"
    elif "\\" in member.name:
        why = "has a backslash in its name"
    elif ".." in member.name.split("/"):
        why = "climbs with '..'"
    elif not (member.isreg() or member.isdir()):
        why = "is a link or a device"
    if why:
        raise ValueError(
            f"Member '{member.name}' of '{path.name}' {why}: no path may leave the archive's folder. "
            "Pack the images again with plain relative paths."
        )
