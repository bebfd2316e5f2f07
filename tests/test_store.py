"""Whole decoded images on disk: the pixels, torn and damaged files, two processes at once, a full disk."""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from avalanche_fmlora.data import store as module
from avalanche_fmlora.data.store import StoredImages, estimated_bytes, stored_images

KEY = "0123abcd"
SIDE = 24
SIZES = [(40, 30), (30, 48), (24, 24), (10, 16), (100, 25), (31, 29)]


class Photos(NamedTuple):
    pixels: list[np.ndarray]
    encoded: list[bytes]

    def read(self, row: int) -> bytes:
        return self.encoded[row]


@pytest.fixture(scope="module")
def photos() -> Photos:
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in SIZES]
    encoded = []
    for image in made:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return Photos(made, encoded)


@pytest.fixture
def build(photos: Photos, tmp_path: Path) -> Callable[..., StoredImages]:
    def call(**changes: Any) -> StoredImages:
        read = changes.pop("read", photos.read)
        names = [f"{i}.png" for i in range(len(SIZES))]
        return stored_images(KEY, names, read, SIDE, **({"title": "pets", "cache_dir": tmp_path} | changes))

    return call


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_pixels_are_those_of_pil_and_small_images_stay(build: Any, photos: Photos) -> None:
    images = build()
    assert len(images) == len(SIZES)
    for got, shape, source in zip(images, images.shapes, photos.pixels, strict=True):
        height, width = source.shape[:2]
        scale = SIDE / min(width, height)
        size = (int(width * scale), int(height * scale)) if scale < 1 else (width, height)
        assert tuple(shape) == got.shape[:2] == size[::-1]
        assert np.array_equal(got, np.asarray(Image.fromarray(source).resize(size, Image.BICUBIC)))
    assert images[3].shape == (16, 10, 3)
    assert (images[4].shape, images[5].shape) == ((24, 96, 3), (24, 25, 3))


def test_second_time_nothing_is_read_and_the_digest_stays(build: Any) -> None:
    def refuse(row: int) -> bytes:
        raise AssertionError(f"image {row} was read again")

    first, second = build(), build(read=refuse)
    assert first.digest() == second.digest()
    assert np.array_equal(first[1], second[1])
    part = second.subset([4, 1])
    assert np.array_equal(part[1], second[1])
    assert np.array_equal(part.subset([0])[0], second[4])
    assert part.digest() != second.subset([1, 4]).digest()
    assert second.subset(range(len(second))).digest() == second.digest()


def test_pickled_it_is_a_path_and_rows(build: Any) -> None:
    images = build().subset([5, 0])
    packed = pickle.dumps(images)
    assert len(packed) < 1000
    again = pickle.loads(packed)
    assert len(again) == 2
    assert np.array_equal(again[0], images[0])


@pytest.mark.parametrize("suffix", ["images", "npz"])
@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "longer"])
def test_a_torn_pair_is_built_again(
    build: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, damage: str
) -> None:
    want = build().digest()
    path = tmp_path / f"{KEY}.{suffix}"
    whole = path.read_bytes()
    damaged = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "longer": whole + b"x" if suffix == "images" else b"no zip",
    }
    path.unlink() if damage == "missing" else path.write_bytes(damaged[damage])
    again = build()
    assert again.digest() == want
    assert path.read_bytes()[:4] == whole[:4]
    if (suffix, damage) != ("npz", "missing"):
        assert "torn or foreign" in caplog.text


def test_the_index_of_other_images_is_foreign(build: Any, tmp_path: Path) -> None:
    build()
    for suffix in ("images", "npz"):
        shutil.copy(tmp_path / f"{KEY}.{suffix}", tmp_path / f"other.{suffix}")
    with pytest.raises(ValueError, match="another kind"):
        StoredImages(tmp_path, "other")


def test_a_flipped_bit_is_found_when_the_image_is_read(build: Any, tmp_path: Path) -> None:
    images = build()
    path = tmp_path / f"{KEY}.images"
    pixels = bytearray(path.read_bytes())
    pixels[images[0].size + 7] ^= 4
    path.write_bytes(bytes(pixels))
    images = build()
    images[0]
    with pytest.raises(OSError, match=r"damaged at image 1: delete it"):
        images[1]


def test_broken_images_are_named_and_nothing_is_left(build: Any, photos: Photos, tmp_path: Path) -> None:
    def read(row: int) -> bytes:
        return photos.encoded[row] if row not in (2, 4) else photos.encoded[row][:60]

    with pytest.raises(ValueError, match=r"2 of 6 images of pets can't be decoded: '2.png' .*'4.png'"):
        build(read=read)
    assert files(tmp_path) == []


def test_the_estimate_is_logged_before_any_image_is_decoded(
    build: Any, photos: Photos, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stored = sum(image.size for image in build())
    assert abs(estimated_bytes(photos.read, len(SIZES), SIDE) - stored) == 0
    said = [r.message for r in caplog.records]
    assert f"about {stored / 1000:.1f} kB" in said[0]
    assert "decoding 6 images once, shorter side 24 px" in said[0]
    assert "decoded 6 images" in said[1]


def test_a_large_estimate_is_said_to_those_who_asked_for_warnings_only(
    build: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LARGE_BYTES", 1000)
    monkeypatch.setattr(module, "_REPORT_EVERY_S", 0.0)
    caplog.set_level(logging.WARNING)
    build()
    said = [r.message for r in caplog.records]
    assert "pets: decoding 6 images once, shorter side 24 px, into about" in said[0]
    assert said[1:-1] == [f"pets: {i} of 6 images decoded" for i in range(1, 7)]
    assert said[-1].startswith("pets: decoded 6 images in ")


def test_the_estimate_of_many_images_reads_256_headers(photos: Photos) -> None:
    read: list[int] = []

    def encoded(row: int) -> bytes:
        read.append(row)
        return photos.encoded[row % 6]

    exact = 10_000 / 6 * sum(int(np.prod(module.whole_size(size, SIDE))) * 3 for size in SIZES)
    assert estimated_bytes(encoded, 10_000, SIDE) == pytest.approx(exact, rel=0.1)
    assert len(read) == 256
    assert (min(read), max(read)) == (0, 9_999)


def test_a_small_disk_is_an_error_before_the_work(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=2_000))
    with pytest.raises(OSError, match=r"pets need about \d+\.\d kB but .* has 2\.0 kB free.*`cache_dir`") as caught:
        build()
    assert caught.value.errno == errno.ENOSPC
    assert files(tmp_path) == []


def test_a_disk_that_fills_up_on_the_way_is_the_same_error(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"pets need about .* XDG_CACHE_HOME to a larger disk"):
        build()
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_written_says_where_to_point(build: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"pets in '.*file' but it can't be written .*point `cache_dir`"):
        build(cache_dir=tmp_path / "file")


def test_what_a_killed_process_left_is_removed(build: Any, tmp_path: Path) -> None:
    (tmp_path / f".{KEY}.images.1.ab.part").write_bytes(b"x" * 100)
    (tmp_path / ".other.images.1.ab.part").write_bytes(b"x")
    build()
    assert files(tmp_path) == [".other.images.1.ab.part", f"{KEY}.images", f"{KEY}.npz"]


_BUILDER = """
import sys, time
from pathlib import Path
from avalanche_fmlora.data.store import stored_images
folder, mine = Path(sys.argv[1]), sys.argv[2]
encoded = sorted((folder / "in").iterdir())
def read(row):
    with open(folder / "reads.txt", "a") as log:
        log.write(mine + "\\n")
    time.sleep(0.02)
    return encoded[row].read_bytes()
(folder / f"ready-{mine}").touch()
while not (folder / "go").exists():
    time.sleep(0.005)
print(stored_images("77", [p.name for p in encoded], read, 24, title="pets", cache_dir=folder / "cache").digest())
"""


def test_two_processes_at_once_decode_once_and_agree(photos: Photos, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(30):
        (tmp_path / "in" / f"{i:02}.png").write_bytes(photos.encoded[i % 6])
    start = [sys.executable, "-c", _BUILDER, str(tmp_path)]
    running = [subprocess.Popen([*start, mine], stdout=subprocess.PIPE, text=True) for mine in "ab"]
    while len(list(tmp_path.glob("ready-*"))) < 2 and all(p.poll() is None for p in running):
        time.sleep(0.01)
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=120)[0].strip() for process in running]
    assert [p.returncode for p in running] == [0, 0]
    assert len(said[0]) == 64
    assert said[0] == said[1]
    assert len(set((tmp_path / "reads.txt").read_text().split())) == 1  # one builds, the other waits
    assert files(tmp_path / "cache") == ["77.images", "77.npz"]
