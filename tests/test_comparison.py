"""`compare` is `fmlora compare` as a call: the same runs, under the same names."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from avalanche_fmlora import compare
from avalanche_fmlora.grid import expand
from avalanche_fmlora.results.record import blank_record, file_name, read_records

SMALL: dict[str, Any] = {"benchmark": {"name": "split_glyphs", "n_experiences": 2}, "training": {"epochs": 1}}


def test_runs_are_those_of_the_command_line_and_run_once(tmp_path: Path) -> None:
    lines: list[str] = []
    methods = ["ncm", {"method": "ncm", "label": "bf16", "precision": "bf16"}]
    records = compare(methods, **SMALL, logit_scale=8.0, out=tmp_path, threads=1, report=lines.append)
    configs = expand({**SMALL, "methods": methods}, [("logit_scale", 8.0)])
    assert [r["id"] for r in records] == [blank_record(c.identity())["id"] for c in configs]
    assert [r["config"]["method_options"]["precision"] for r in records] == ["fp32", "bf16"]
    assert all(0.5 < (r["metrics"]["final_average_accuracy"] or 0) < 0.95 for r in records)
    assert lines[1].startswith("[2/2] ncm (bf16), class order 0: final average accuracy ")
    told: list[str] = []
    again = compare(methods, **SMALL, logit_scale=8.0, out=tmp_path, threads=1, report=told.append)
    assert told[1] == f"{lines[1]} (recorded before in {file_name(records[1])})"
    assert [r["cost"]["train_s"] for r in again] == [r["cost"]["train_s"] for r in records], "read, not run"
    assert len(read_records(tmp_path / "records")) == 2


def test_one_run_under_two_labels_is_said(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    methods = [{"method": "ncm", "label": "baseline"}, {"method": "ncm", "label": "again"}]
    (record,) = compare(methods, **SMALL, out=tmp_path, threads=1)
    assert record["config"]["label"] == "baseline"
    assert "'baseline' and 'again': it runs once, under the first" in caplog.text


def test_wrong_names_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean 'fm_lora'\?"):
        compare(["fmlora"], out=tmp_path)
    with pytest.raises(ValueError, match=r"did you mean `rank`\?"):
        compare(["fm_lora"], rnk=8, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_script_that_is_read_anew_by_its_workers_is_told_what_to_write(tmp_path: Path) -> None:
    call = f"compare(['ncm'], class_order_seeds=[0, 1], benchmark={SMALL['benchmark']}, out='runs', jobs=2)"
    script = tmp_path / "script.py"
    script.write_text(f"from avalanche_fmlora import compare\n{call}\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "ValueError: Worker processes can't start: a script has to call this below `if __name__" in done.stderr
    assert not list(tmp_path.rglob("*.json")), "nothing was started, so nothing failed"


def test_workers_end_when_the_call_is_stopped_while_they_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(worker: Any) -> Any:
        raise KeyboardInterrupt

    killed: list[Any] = []
    monkeypatch.setattr("avalanche_fmlora.executors.local._Worker.start", stopped)
    monkeypatch.setattr("avalanche_fmlora.executors.local._Worker.kill", lambda worker: killed.append(worker))
    with pytest.raises(KeyboardInterrupt):
        compare(["ncm"], class_order_seeds=[0, 1], **SMALL, out=tmp_path, jobs=2)
    assert len(killed) == 2
    assert not list(tmp_path.rglob("*.json"))


def test_a_failure_is_said_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("avalanche_fmlora.experiment.make_benchmark", broken)
    with caplog.at_level(logging.WARNING, "avalanche_fmlora"):
        (record,) = compare(["ncm"], **SMALL, out=tmp_path, threads=1)
    assert record["status"] == "failed"
    message = "[1/1] ncm, class order 0: failed: RuntimeError: out of memory"
    assert caplog.messages == [message]
    monkeypatch.undo()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "avalanche_fmlora"):
        assert compare(["ncm"], **SMALL, out=tmp_path, threads=1) == [record], "shown again, not run again"
    assert caplog.messages == [message.replace("failed", "failed before")]
    (again,) = compare(["ncm"], **SMALL, out=tmp_path, threads=1, retry_failed=True)
    assert again["status"] == "finished"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": {"method": "ncm"}}, r"write methods=\[\{'method': 'ncm'\}\]"),
        ({"methods": "ncm"}, r"`methods` to be a list but got 'ncm': write methods=\['ncm'\]"),
        ({"class_order_seeds": 3}, r"write class_order_seeds=\[3\]"),
        ({"seeds": 3}, r"write seeds=\[3\]"),
        ({"jobs": 0}, "`jobs` to be at least 1 but got 0"),
        ({"threads": -1}, "`threads` to be at least 1 but got -1"),
        ({"epochs": 1}, r"write training=\{'epochs': 1\}"),
    ],
)
def test_what_is_no_list_or_no_number_of_runs_says_how_to_write_it(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(**{"methods": ["ncm"], "out": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()
