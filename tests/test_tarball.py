"""A packed tar is decompressed once: by one process of several, and never half; every failure says how to mend it."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avalanche_fmlora.data import tarball
from avalanche_fmlora.data.tarball import TarSource

FILES = {f"pets/{i}.jpg": np.random.default_rng(i).bytes(5000) for i in range(8)}


def pack(path: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def content(path: Path, cache: Path) -> dict[str, bytes]:
    with TarSource(path, cache) as source:
        return {entry.name: source.read(entry) for entry in source.entries}


def left_in(folder: Path) -> list[str]:
    return sorted(p.suffix for p in folder.iterdir() if p.suffix != ".lock")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_every_kind_is_decompressed_once(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, cache = pack(tmp_path / f"pets.tar.{kind}", f"w:{kind}"), tmp_path / "cache"
    caplog.set_level("INFO")
    assert content(path, cache) == content(path, cache) == FILES
    assert caplog.messages == [f"Decompressing pets.tar.{kind} once into {cache}"]
    assert left_in(cache) == [".tar"]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_ones_are_refused_by_name_and_leave_nothing(tmp_path: Path, kind: str, damage: str) -> None:
    path, cache = pack(tmp_path / f"pets.tar.{kind}", f"w:{kind}"), tmp_path / "cache"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=rf"'.*pets.tar.{kind}' is no tar archive, or a torn one .*fetch or pack it"):
        content(path, cache)
    assert left_in(cache) == []


def test_a_full_disk_says_what_to_do_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = pack(tmp_path / "pets.tgz", "w:gz"), tmp_path / "cache"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError,
        match=r"decompress '.*pets.tgz' \([\d,]+ bytes packed\) once into '.*cache' but that failed \(No space left on "
        r"device; [\d,]+ bytes are free there\): make room, point `cache_dir` .* or unpack the archive yourself",
    ) as caught:
        content(path, cache)
    assert caught.value.errno == errno.ENOSPC
    assert left_in(cache) == []


def test_a_folder_that_cannot_be_written_says_where_to_point(tmp_path: Path) -> None:
    path = pack(tmp_path / "pets.tgz", "w:gz")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"once into '.*file/inner' but that failed \(Not a directory; .*`cache_dir`"):
        content(path, tmp_path / "file" / "inner")


def test_what_a_killed_process_left_is_removed_and_not_read(tmp_path: Path) -> None:
    path, cache = pack(tmp_path / "pets.tgz", "w:gz"), tmp_path / "cache"
    content(path, cache)
    (plain,) = cache.glob("*.tar")
    part = cache / f".{plain.name}.1.ab.part"
    part.write_bytes(plain.read_bytes()[:1000])
    plain.unlink()
    assert content(path, cache) == FILES
    assert not part.exists()


def test_of_several_at_once_one_decompresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = pack(tmp_path / "pets.tgz", "w:gz"), tmp_path / "cache"
    inner, calls, ready = tarball._decompress, [], threading.Barrier(3)

    def slow(*arguments: Any) -> None:
        calls.append(arguments)
        time.sleep(0.1)
        inner(*arguments)

    def read(_: int) -> dict[str, bytes]:
        ready.wait(timeout=20)
        return content(path, cache)

    monkeypatch.setattr(tarball, "_decompress", slow)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(read, range(3))) == [FILES] * 3
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_with_holes_are_refused_since_their_bytes_lie_elsewhere(tmp_path: Path, kind: int) -> None:
    member = tarfile.TarInfo("pets/0.jpg")
    member.size = 512
    if kind == tarfile.GNU_FORMAT:
        member.type = tarfile.GNUTYPE_SPARSE
    else:
        member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.map": "0,512", "GNU.sparse.size": "4096"}
    with tarfile.open(tmp_path / "pets.tar", "w", format=kind) as archive:
        archive.addfile(member, io.BytesIO(bytes(512)))
    with pytest.raises(ValueError, match=r"'pets/0.jpg' of 'pets.tar' .*without --sparse"):
        content(tmp_path / "pets.tar", tmp_path)
