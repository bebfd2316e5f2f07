"""image_folder: what the cache of decoded images keeps, and what makes it anew."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import class_files, encoded, pack, write

from avalanche_fmlora.data import image_folder as module
from avalanche_fmlora.data.cache import cached_images, default_cache_dir
from avalanche_fmlora.data.image_folder import image_folder


def decode_counter(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    inner = module._decode_all

    def counted(*arguments: Any) -> np.ndarray:
        calls.append(1)
        return inner(*arguments)

    monkeypatch.setattr(module, "_decode_all", counted)
    return calls


def test_cache_hit_and_what_invalidates_it(
    tmp_path: Path, build: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = decode_counter(monkeypatch)
    path = write(tmp_path / "pets", class_files())

    def run(**options: Any) -> int:
        build(path, **({"n_experiences": 2} | options))
        return len(calls)

    assert run() == 1
    assert run(n_experiences=4, class_order_seed=1, augment="flip", mean=(0, 0, 0), name="x") == 1
    assert run(image_size=4) == 2
    assert run(interpolation="bilinear") == 3
    os.utime(path / "train/c0/0.png", ns=(0, 0))
    assert run() == 4
    (path / "train/c0/0.png").rename(path / "train/c0/7.png")
    assert run() == 5
    monkeypatch.setattr(module, "_DECODER_VERSION", 99)
    assert run() == 6
    assert run() == 6
    assert sorted({p.suffix for p in cache.iterdir()}) == [".json", ".npy"]


def test_a_zip_keeps_its_cache_when_it_moves(tmp_path: Path, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = decode_counter(monkeypatch)
    path = pack(tmp_path / "pets.zip", class_files())
    first = build(path, n_experiences=2).info
    second = build(path.rename(tmp_path / "moved.zip"), n_experiences=2).info
    assert len(calls) == 1
    assert first.split_hash == second.split_hash
    pack(tmp_path / "moved.zip", class_files() | {"train/c0/0.png": encoded((9, 9, 9))})
    assert build(tmp_path / "moved.zip", n_experiences=2).info.split_hash != first.split_hash
    assert len(calls) == 2


def test_torn_or_foreign_cache_is_built_again(
    tmp_path: Path, build: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = decode_counter(monkeypatch)
    path = write(tmp_path / "pets", class_files())
    want = build(path, n_experiences=2).info.split_hash
    (data,), (facts,) = cache.glob("*.npy"), cache.glob("*.json")
    whole = data.read_bytes()

    def foreign() -> None:
        data.write_bytes(b"PK\x03\x04 something else")

    def other_shape() -> None:
        np.save(data, np.zeros((3, 8, 8, 3), np.uint8))

    def spoil(at: int) -> None:
        data.write_bytes(whole[:at] + bytes(len(whole) - at))

    damages = [
        lambda: data.write_bytes(whole[:-7]),
        lambda: data.write_bytes(b""),
        lambda: spoil(len(whole) // 2),
        foreign,
        other_shape,
        lambda: facts.write_text("{"),
        lambda: facts.write_text(json.dumps({"format": "other"})),
    ]
    for n, damage in enumerate(damages, start=2):
        caplog.clear()
        damage()
        assert build(path, n_experiences=2).info.split_hash == want
        assert len(calls) == n
        assert "torn or foreign" in caplog.text
    facts.unlink()
    assert build(path, n_experiences=2).info.split_hash == want
    assert len(calls) == len(damages) + 2


def test_unwritable_cache_works_in_memory(
    tmp_path: Path, build: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "pets", class_files())
    want = build(path, n_experiences=2).info.split_hash
    write(tmp_path, {"a_file": b""})
    assert build(path, n_experiences=2, cache_dir=tmp_path / "a_file").info.split_hash == want
    assert "Can't write the image cache" in caplog.text

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    caplog.clear()
    assert build(path, n_experiences=2, cache_dir=tmp_path / "full").info.split_hash == want
    assert "No space left" in caplog.text
    assert list((tmp_path / "full").iterdir()) == []


def test_builders_at_once_agree(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)

    def one(_: int) -> np.ndarray:
        return cached_images("ab", images.shape, images.copy, tmp_path)

    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(one, range(40)):
            assert np.array_equal(got, images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ab.json", "ab.npy"]


def test_default_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "avalanche_fmlora"
    image_folder(write(tmp_path / "pets", class_files(2)), image_size=4, n_experiences=1)
    assert len(list((tmp_path / "avalanche_fmlora").iterdir())) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/.cache/avalanche_fmlora")


def test_without_a_home_folder_the_mend_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(FileNotFoundError, match="no home folder to keep data in: set XDG_CACHE_HOME, or give a folder"):
        default_cache_dir()
    images = np.zeros((1, 2, 2, 3), np.uint8)
    assert cached_images("ab", images.shape, images.copy) is not None
    assert "images stay in memory. Set XDG_CACHE_HOME or cache_dir." in caplog.text


def test_what_killed_writers_left_goes_once_it_is_old(tmp_path: Path) -> None:
    images = np.zeros((1, 2, 2, 3), np.uint8)
    young, old = tmp_path / ".ab.npy.1.a.part", tmp_path / ".ab.npy.2.b.part"
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cached_images("ab", images.shape, images.copy, tmp_path)
    assert young.exists()
    assert not old.exists()
