"""The checkpoint file: what it holds, what it refuses, how large it is, what a crash leaves behind."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from avalanche_fmlora.checkpoint import (
    CheckpointFolder,
    random_state,
    read_checkpoint,
    set_random_state,
    write_checkpoint,
)

IDENTITY = {"method": "fm_lora", "options": {"rank": 4, "lr": 0.1}}
STATE: dict[str, Any] = {
    "numbers": [1, -2.5, 1e-300, 0.1 + 0.2, True, None, "text", math.inf, -math.inf],
    "containers": {1: "int", None: "none", ("a", 2): {"set": {3, 4}, "$odd": ()}},
    "tensors": (torch.arange(6.0).reshape(2, 3).T, torch.zeros(0, 5), torch.tensor(True)),
    "half": [torch.ones(2, dtype=torch.bfloat16), torch.full((), -0.0, dtype=torch.float16)],
    "a/b": torch.tensor([1]),
    "a": {"b": torch.tensor([2])},
}  # fmt: skip


def _assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            _assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            _assert_equal(*pair)
    else:
        assert one == other


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "deep" / "x.safetensors", STATE, IDENTITY)
    _assert_equal(read_checkpoint(path, IDENTITY), STATE)
    assert math.isnan(read_checkpoint(write_checkpoint(path, {"x": math.nan}, {}), {})["x"])
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_only_plain_values_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`a/0` is a Linear"):
        write_checkpoint(tmp_path / "x", {"a": [torch.nn.Linear(1, 1)]}, {})
    assert not list(tmp_path.iterdir())


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def test_torn_changed_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "x.safetensors", STATE, IDENTITY)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.safetensors is no whole safetensors file"):
            read_checkpoint(path, IDENTITY)
    for word, changed in ((b"text", b"tent"), (b"1e-300", b"1e-301"), (b"0.30000000000000004", b"0.30000000000000005")):
        assert whole.count(word) == 1
        path.write_bytes(whole.replace(word, changed))
        with pytest.raises(ValueError, match="does not match its checksum"):
            read_checkpoint(path, IDENTITY)
    path.write_bytes(whole)
    _flip(path, -1)  # a tensor's last byte
    with pytest.raises(ValueError, match="does not match its checksum"):
        read_checkpoint(path, IDENTITY)
    path.write_bytes(safetensors.torch.save({"x": torch.zeros(1)}))
    with pytest.raises(ValueError, match="no checkpoint of this package: its format is None"):
        read_checkpoint(path, IDENTITY)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"something else: it has options\.rank = 4 and here it is 8\."):
        read_checkpoint(path, {"method": "fm_lora", "options": {"rank": 8, "lr": 0.1}})
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_checkpoint(tmp_path / "none", IDENTITY)


def test_nothing_in_it_is_code(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "x.safetensors", STATE, IDENTITY)
    with safetensors.safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["identity"]) == IDENTITY
        assert json.loads(file.metadata()["state"])["numbers"][:2] == [1, -2.5]
        assert "tensors/0" in file.keys()  # noqa: SIM118


def test_the_last_two_are_kept_and_the_last_good_one_is_used(tmp_path: Path, caplog: Any) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    assert folder.latest(IDENTITY) is None
    for n in (1, 2, 3):
        folder.save(n, {"n": n, "t": torch.tensor(n)}, IDENTITY)
    assert list(folder.files()) == [2, 3]
    assert folder.latest(IDENTITY) == (3, {"n": 3, "t": torch.tensor(3)})
    _flip(folder.files()[3], -1)
    assert folder.latest(IDENTITY) == (2, {"n": 2, "t": torch.tensor(2)})
    assert "experience-0003.safetensors does not match its checksum" in caplog.text
    _flip(folder.files()[2], -1)
    with pytest.raises(ValueError, match=r"(?s)experience-0003.*experience-0002"):
        folder.latest(IDENTITY)
    folder.save(2, {"n": "again"}, IDENTITY)
    assert list(folder.files()) == [2], "the damaged third is of a future that is now another"
    (folder.folder / "mine.txt").touch()
    folder.clear()
    assert [p.name for p in folder.folder.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="`keep` to be at least 1 but got 0"):
        CheckpointFolder(tmp_path, keep=0)


def test_a_crash_while_writing_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"n": 1}, IDENTITY)
    before = folder.files()[1].read_bytes()
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, _interrupt)
            with pytest.raises(KeyboardInterrupt):
                folder.save(1, {"n": 2}, IDENTITY)
        assert [p.name for p in tmp_path.iterdir()] == ["experience-0001.safetensors"]
        assert folder.files()[1].read_bytes() == before
    left = tmp_path / ".experience-0002.safetensors.77-ab.tmp"  # of a process that was killed while it wrote
    left.write_bytes(before[:20])
    assert folder.latest(IDENTITY) == (1, {"n": 1})
    folder.save(2, {"n": 2}, IDENTITY)
    folder.clear()
    assert left.exists(), "it may be what another process is writing now"
    os.utime(left, (left.stat().st_atime, left.stat().st_mtime - 7200))
    folder.save(2, {"n": 2}, IDENTITY)
    assert not left.exists()


def _interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_random_numbers_go_on(tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second number for the next call
    state = random_state()
    drawn = [[random.gauss(0, 1), random.random(), *np.random.standard_normal(3), *torch.rand(3).tolist()]]
    path = write_checkpoint(tmp_path / "x", state, {})
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    set_random_state(read_checkpoint(path, {}))
    drawn.append([random.gauss(0, 1), random.random(), *np.random.standard_normal(3), *torch.rand(3).tolist()])
    assert drawn[0] == drawn[1]
