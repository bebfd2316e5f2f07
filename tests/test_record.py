"""Result records: identity, atomic writing, refusal of what is torn, foreign or edited."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avalanche_fmlora.metrics import summarize
from avalanche_fmlora.results import record as module
from avalanche_fmlora.results.record import (
    Record,
    blank_record,
    check_folder,
    environment,
    find_record,
    read_record,
    read_records,
    run_id,
    write_record,
)

TOP_LEVEL = [
    "schema",
    "id",
    "status",
    "error",
    "config",
    "benchmark",
    "backbone",
    "accuracy_matrix",
    "metrics",
    "experiences",
    "cost",
    "environment",
    "seeds",
    "started_at",
    "finished_at",
]


def config(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "method": "fmlora",
        "method_options": {"rank": 16, "scale": 0.1},
        "benchmark": {"name": "split_glyphs", "n_experiences": 2},
        "backbone": {"name": "embedded"},
        "training": {"epochs": 1, "batch_size": 32, "eval_batch_size": 64, "precision": "fp32"},
        "seed": 0,
        "class_order_seed": 3,
        "label": None,
    }
    return base | changes


def finished(cfg: dict[str, Any] | None = None) -> Record:
    made = blank_record(cfg or config())
    made["status"], made["error"] = "finished", None
    made["benchmark"] |= {"experience_names": ["a … b", "c … d"], "n_test": [10, 30], "kind": "class_incremental"}
    made["accuracy_matrix"] = [[0.75, math.nan], [0.5, 0.1 + 0.2]]
    made["metrics"] = summarize(made["accuracy_matrix"], [10, 30])  # type: ignore[typeddict-item]
    made["experiences"] = [
        {
            "experience": t,
            "name": made["benchmark"]["experience_names"][t],
            "rank": 16,
            "ranks_per_layer": [8, 16],
            "complexity": 0.5,
            "similarity": None if t == 0 else 0.25,
            "trainable_parameters": 100,
            "trained_parameters": 100,
            "stored_parameters": 300,
            "stored_statistics": 0,
            "head_parameters": 20,
            "train_s": 1.5,
            "eval_s": 0.5,
            "data_wait_s": 0.25,
        }
        for t in range(2)
    ]
    return made


def test_run_id_is_the_hash_of_canonical_json() -> None:
    text = '{"a":[1,0.1],"b":{"x":null,"y":true}}'
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert run_id({"b": {"y": True, "x": None}, "a": (1, 0.1), "label": "free"}) == expected


def test_run_id_changes_with_every_field_but_the_label() -> None:
    ids = {run_id(config())}
    changes: dict[str, Any] = {"method": "ncm", "method_options": {}, "benchmark": {"name": "x"}, "backbone": {}}
    changes |= {"training": {"epochs": 2}, "seed": 1, "class_order_seed": None}
    for key, value in changes.items():
        ids.add(run_id(config(**{key: value})))
    ids.add(run_id(config(method_options={"rank": 16, "scale": math.nextafter(0.1, 1)})))
    assert len(ids) == 9
    assert run_id(config(label="mine")) == run_id(config())


@pytest.mark.parametrize("value", [math.nan, math.inf, Path("x"), {1, 2}, np.int64(3), b"x"])
def test_run_id_refuses_what_json_does_not_know(value: Any) -> None:
    with pytest.raises(ValueError, match="the configuration to hold only what JSON knows"):
        run_id(config(method_options={"x": value}))


def test_blank_record_has_every_key_and_can_be_written(tmp_path: Path) -> None:
    blank = blank_record(config())
    assert list(blank) == TOP_LEVEL
    assert blank["seeds"] == {"seed": 0, "class_order_seed": 3}
    assert read_record(write_record(blank, tmp_path)) == blank


def test_sections_follow_the_types_that_fill_them() -> None:
    from dataclasses import fields

    from avalanche_fmlora.data.base import BenchmarkInfo

    assert list(module.Benchmark.__annotations__) == [f.name for f in fields(BenchmarkInfo)]
    assert list(module.Metrics.__annotations__) == list(summarize([[1.0]], [1]))


def test_write_then_read(tmp_path: Path) -> None:
    path = write_record(finished(), tmp_path / "new")
    assert path.name == f"fmlora-split_glyphs-s0-o3-{run_id(config())}.json"
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file may be left"
    got = read_record(path)
    expected: Any = copy.deepcopy(finished())
    expected["accuracy_matrix"][0][1] = None
    assert got == expected
    assert got["accuracy_matrix"][1][1] == 0.1 + 0.2, "floats come back bit for bit"
    assert "\n  [0.75, null],\n" in path.read_text(encoding="utf-8"), "a row of the matrix is a line"
    assert "a … b" in path.read_text(encoding="utf-8")


def test_arrays_and_numpy_numbers_become_json(tmp_path: Path) -> None:
    made: Any = finished()
    made["accuracy_matrix"] = np.array([[0.75, np.nan], [0.5, 0.25]])
    made["cost"]["train_s"] = np.float32(1.5)
    made["cost"]["peak_memory_bytes"] = np.int64(7)
    made["cost"]["gmacs_per_image"] = math.inf
    got = read_record(write_record(made, tmp_path))
    assert got["accuracy_matrix"] == [[0.75, None], [0.5, 0.25]]
    assert got["cost"]["train_s"] == 1.5
    assert got["cost"]["peak_memory_bytes"] == 7
    assert got["cost"]["gmacs_per_image"] is None


def test_an_error_in_a_file_names_no_folder(tmp_path: Path) -> None:
    made = blank_record(config())
    made["error"] = f"FileNotFoundError: There is no {tmp_path / 'photos.zip'} nor '{tmp_path / 'a b' / 'photos'}'"
    text = write_record(made, tmp_path).read_text()
    assert "There is no photos.zip nor 'photos'" in text
    assert str(tmp_path) not in text


def test_odd_names_and_errors_are_kept(tmp_path: Path) -> None:
    made = blank_record(config(method="../my method", class_order_seed=None))
    made["error"] = 'RuntimeError: [\n 1,\n 2\n] "quoted" \udc80 ünï'
    path = write_record(made, tmp_path)
    assert path.name.startswith(".._my_method-split_glyphs-s0-onone-")
    assert path.parent == tmp_path
    assert read_record(path)["error"] == made["error"]


def _without(key: str, inner: str | None = None) -> Any:
    made: Any = finished()
    del (made[key] if inner else made)[inner or key]
    return made


def _with(**changes: Any) -> Any:
    return finished() | changes


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: _without("cost"), "`cost` is missing"),
        (lambda: _without("metrics", "forgetting"), "`metrics.forgetting` is missing"),
        (lambda: _without("config", "training"), "`config.training` is missing"),
        (lambda: _with(extra=1), "`extra` is unknown"),
        (lambda: _with(experiences=[{"experience": 0}]), r"`experiences\[0\].rank` is missing"),
        (lambda: _with(experiences=[]), "`experiences` is empty"),
        (lambda: _with(status="done"), "neither 'finished' nor 'failed'"),
        (lambda: _with(error="boom"), "`error` is 'boom'"),
        (lambda: _with(status="failed"), "`error` is None"),
        (lambda: _with(id="0" * 16), "not the hash of `config`"),
        (lambda: _with(accuracy_matrix=[[0.5], [0.5, 0.5]]), "not square"),
        (lambda: _with(accuracy_matrix=[[0.5]]), "1 rows for 2 experiences"),
        (lambda: _with(accuracy_matrix=[[50.0, 0.0], [0.0, 0.0]]), "not fractions"),
    ],
)
def test_incomplete_or_contradictory_records_are_not_written(bad: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_record(bad(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_edit_by_hand_is_noticed(tmp_path: Path) -> None:
    path = write_record(finished(), tmp_path)
    whole = path.read_text(encoding="utf-8")
    for old, new in (("0.75", "0.85"), ('"rank": 16', '"rank": 17'), ('"label": null', '"label": "x"')):
        assert old in whole
        path.write_text(whole.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(ValueError, match=r"checksum.*never edited.*run its configuration again"):
            read_record(path)
    path.write_text(json.dumps(json.loads(whole)), encoding="utf-8")
    assert read_record(path)["status"] == "finished", "other white space is no edit"


def test_a_record_torn_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_record(finished(), tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=path.name):
            read_record(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", "lacks `schema`"),
        (b'{"hello": 1}', "move other files"),
        (b'{"schema": 2, "checksum": "x"}', "schema 1 but got 2"),
        (b'{"schema": 1, "checksum": NaN}', "NaN is not JSON"),
        (b"\xff\xfe", "whole JSON"),
        (b"[" * 100_000, "whole JSON"),
    ],
)
def test_foreign_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_records(tmp_path)
    assert "other.json" in str(error.value)


def test_records_come_in_a_stable_order(tmp_path: Path) -> None:
    wanted = []
    for name in ("domain_glyphs", "split_glyphs"):
        for method in ("fmlora", "ncm"):
            for order in (None, 2, 10):
                for seed in (0, 1):
                    cfg = config(method=method, benchmark={"name": name}, class_order_seed=order, seed=seed)
                    wanted.append((name, method, order, seed))
                    write_record(finished(cfg), tmp_path)
    (tmp_path / ".left.json.123.tmp").write_text("half")
    (tmp_path / ".hidden.json").write_text("half")
    (tmp_path / "runs.csv").write_text("id")
    configs = [r["config"] for r in read_records(tmp_path)]
    assert [(c["benchmark"]["name"], c["method"], c["class_order_seed"], c["seed"]) for c in configs] == wanted


def test_an_empty_folder_says_what_makes_records(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no.*fmlora compare"):
        read_records(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"does not exist.*fmlora compare"):
        read_records(tmp_path / "none")


def test_a_copied_record_does_not_count_twice(tmp_path: Path) -> None:
    path = write_record(finished(), tmp_path)
    (tmp_path / "copy.json").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"copy\.json.*count twice"):
        read_records(tmp_path)
    with pytest.raises(ValueError, match=r"copy\.json holds run .*rename it to fm"):
        check_folder(tmp_path)


def test_find_record_knows_finished_runs_only(tmp_path: Path) -> None:
    assert find_record(tmp_path / "none", config()) is None
    write_record(blank_record(config()), tmp_path)
    assert find_record(tmp_path, config()) is None
    write_record(finished(), tmp_path)
    found = find_record(tmp_path, config(label="another name"))
    assert found is not None
    assert found["status"] == "finished"
    assert find_record(tmp_path, config(seed=1)) is None
    (path,) = tmp_path.glob("*.json")
    path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7what macOS puts beside a file on a foreign disk")
    assert find_record(tmp_path, config()) == found
    assert len(read_records(tmp_path)) == 1, "the retry replaces the failure"
    with pytest.raises(FileExistsError, match="delete it"):
        write_record(blank_record(config()), tmp_path)


def test_a_failing_write_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_record(blank_record(config()), tmp_path)
    before = path.read_bytes()

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=f"{path.name} can't be written .No space left on device.: make room"):
        write_record(finished(), tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_writer_leaves_whole_records_only(tmp_path: Path) -> None:
    code = (
        "import itertools, sys\nfrom avalanche_fmlora.results.record import blank_record, write_record\n"
        "cfg = {'method': 'm', 'method_options': {}, 'benchmark': {'name': 'b'}, 'backbone': {}, 'training': {},\n"
        "       'class_order_seed': 0, 'label': None}\n"
        "for seed in itertools.count():\n"
        "    record = blank_record(cfg | {'seed': seed})\n"
        "    record['benchmark']['class_names'] = ['name'] * 20_000\n"
        f"    write_record(record, {str(tmp_path)!r}); print(seed, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        said = [process.stdout.readline() for _ in range(5)]
        process.kill()
        process.wait()
    assert said[-1] == "4\n"
    seeds = [record["seeds"]["seed"] for record in read_records(tmp_path)]
    assert seeds == list(range(len(seeds)))
    assert len(seeds) >= 5


def test_environment() -> None:
    from importlib.metadata import version

    got = environment("cpu", 2)
    assert list(got) == list(module.Environment.__annotations__)
    assert got["torch"] == version("torch")
    assert got["avalanche"] == version("avalanche-lib")
    assert (got["device"], got["threads"], got["cores"]) == ("cpu", 2, os.cpu_count())
    assert got["python"] == ".".join(map(str, sys.version_info[:3]))


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, avalanche_fmlora.results.record; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "avalanche", "numpy", "pandas", "scipy", "pydantic"} & set(loaded)
