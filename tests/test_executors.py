"""Executors: every task once, workers that are killed, jobs that are preempted, and the records that come out of it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import executor_tasks as tasks

from avalanche_fmlora.config import RunConfig, make_run
from avalanche_fmlora.executors import Executor, Resources, RunLost, make_executor
from avalanche_fmlora.results.record import Record, read_records, write_record
from avalanche_fmlora.sweep import sweep

pytestmark = pytest.mark.timeout(900)  # whole processes start here, slowly on a busy machine


@pytest.fixture(autouse=True)
def _workers_find_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent), *([path] if path else [])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


def executor(name: str, folder: Path, **resources: Any) -> Executor:
    if name == "ray":
        pytest.importorskip("ray", reason="needs the extra `ray`")
    if name == "slurm":
        pytest.importorskip("submitit", reason="needs the extra `slurm`")
        from avalanche_fmlora.executors.on_slurm import OnSlurm

        return OnSlurm(Resources(slurm={"timeout_min": 60}, **resources), folder / "slurm", cluster="local")
    return make_executor(name, Resources(**resources), folder / "records")


def outcomes(executor: Executor, work: Mapping[str, Callable[[], Record]]) -> dict[str, Record | RunLost]:
    found: dict[str, Record | RunLost] = {}
    executor.run(work, lambda key, outcome: found.update({key: outcome}))
    return found


def seeds_of(found: Mapping[str, Record | RunLost]) -> dict[str, int]:
    return {key: record["seeds"]["seed"] for key, record in found.items() if not isinstance(record, RunLost)}


class Sender(threading.Thread):
    """Sends a signal to each process that a file names, up to `times`."""

    def __init__(self, pids: Path, number: int, times: int) -> None:
        super().__init__(daemon=True)
        self.pids, self.number, self.times = pids, number, times
        self.start()

    def run(self) -> None:
        sent = 0
        while sent < self.times:
            time.sleep(0.05)
            pids = self.pids.read_text().split() if self.pids.exists() else []
            if len(pids) > sent:
                time.sleep(0.1)
                os.kill(int(pids[-1]), self.number)
                sent = len(pids)


@pytest.mark.parametrize("name", ["local", "processes", "slurm"])
def test_every_task_once(name: str, tmp_path: Path) -> None:
    jobs = {"jobs": 2} if name == "processes" else {}
    work = {str(seed): partial(tasks.at_once, seed) for seed in range(3)}
    found = outcomes(executor(name, tmp_path, threads=1, **jobs), work)
    assert seeds_of(found) == {"0": 0, "1": 1, "2": 2}
    assert {r["environment"]["threads"] for r in found.values() if not isinstance(r, RunLost)} == {1}
    with pytest.raises(ArithmeticError, match="a mistake"):
        outcomes(executor(name, tmp_path), {"x": tasks.breaks_down})


def killed_workers(name: str, folder: Path) -> None:
    once, always = folder / "once", folder / "always"
    senders = [Sender(once, signal.SIGKILL, 1), Sender(always, signal.SIGKILL, 9)]
    work = {
        "always": partial(tasks.dies, always, 1, 99),
        "once": partial(tasks.dies, once, 2, 1),
        **{str(seed): partial(tasks.at_once, seed) for seed in (3, 4)},
    }
    found = outcomes(executor(name, folder, jobs=2), work)
    senders[1].times = 0
    lost = found.pop("always")
    assert isinstance(lost, RunLost)
    assert seeds_of(found) == {"once": 2, "3": 3, "4": 4}
    assert len(once.read_text().split()) == 2
    assert len(set(always.read_text().split())) == {"processes": 2, "ray": 3}[name]


def test_a_killed_process_costs_no_other_run_anything(tmp_path: Path) -> None:
    killed_workers("processes", tmp_path)


def test_processes_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avalanche_fmlora.executors.local.available_cores", lambda: 8)
    assert [executor("processes", tmp_path, jobs=4).threads(count) for count in (1, 3, 4, 9)] == [8, 2, 2, 2]
    assert executor("processes", tmp_path, jobs=4, threads=3).threads(9) == 3
    assert executor("local", tmp_path).threads(9) == 8


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the process in /proc")
def test_workers_end_with_the_process_that_began_them(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = (
        "if __name__ == '__main__':\n"
        "    from functools import partial; from pathlib import Path; import executor_tasks as t\n"
        "    from avalanche_fmlora.executors import Resources, make_executor\n"
        "    e = make_executor('processes', Resources(jobs=1), Path('records'))\n"
        f"    e.run({{'a': partial(t.dies, Path({str(pids)!r}), 0, 1)}}, print)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (pids.exists() and pids.read_text()) and time.monotonic() < deadline and parent.poll() is None:
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    worker = Path("/proc") / pids.read_text().strip()
    while worker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists()


class Disturbed:
    """An executor whose first run is stopped half-way by a signal, at the first attempt."""

    def __init__(self, inner: Executor, pids: Path, number: int) -> None:
        self.inner, self.pids, self.number = inner, pids, number

    def threads(self, count: int) -> int:
        return 1

    def run(self, work: Mapping[str, Callable[[], Record]], finish: Callable[[str, Record | RunLost], None]) -> None:
        first = next(iter(work))
        Sender(self.pids, self.number, 1)
        self.inner.run({**work, first: partial(tasks.half_way, work[first], self.pids)}, finish)
        assert self.pids.exists()


@pytest.fixture(scope="module")
def configs(photos: Path) -> list[RunConfig]:
    shared = {
        "benchmark": {"name": "image_folder", "path": photos, "n_experiences": 2},
        "backbone": {"name": "test_vit", "pretrained": False, "image_size": 32},
        "training": {"epochs": 1, "batch_size": 8},
    }
    methods: list[dict[str, Any]] = [{"method": "fm_lora", "method_options": {"rank": 4}}, {"method": "ncm"}]
    return [make_run({**shared, **method}) for method in methods]


@pytest.fixture(scope="module")
def whole(configs: list[RunConfig], tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """What comes out where nothing happens."""
    return sweep(configs, tmp_path_factory.mktemp("whole"), executor="local", threads=1)


def result(record: Record) -> dict[str, Any]:
    """All that does not depend on the clock and the machine."""
    parts = {key: record[key] for key in ("id", "status", "error", "config", "benchmark", "accuracy_matrix", "metrics")}
    seconds = ("train_s", "eval_s", "data_wait_s")
    return {**parts, "rows": [{k: v for k, v in row.items() if k not in seconds} for row in record["experiences"]]}


def disturbed_sweep(name: str, number: int, configs: list[RunConfig], whole: list[Record], folder: Path) -> None:
    stopped = Disturbed(executor(name, folder, jobs=2), folder / "pids", number)
    records = sweep(configs, folder / "records", executor=stopped)
    assert [record["status"] for record in records] == ["finished"] * len(configs)
    assert [result(r) for r in records] == [result(r) for r in whole[: len(configs)]]
    assert [result(r) for r in read_records(folder / "records")] == [result(r) for r in records]


def test_a_sweep_with_a_process_killed_half_way(configs: list[RunConfig], whole: list[Record], tmp_path: Path) -> None:
    disturbed_sweep("processes", signal.SIGKILL, configs[:1], whole, tmp_path)


def test_a_sweep_with_a_slurm_job_preempted_half_way(
    configs: list[RunConfig], whole: list[Record], tmp_path: Path
) -> None:
    disturbed_sweep("slurm", signal.SIGUSR2, configs[:1], whole, tmp_path)
    (log,) = (path.read_text() for path in (tmp_path / "slurm").glob("*.out"))
    assert "Requeued job" in log


@contextmanager
def skipped_if_ray_does_not_start() -> Iterator[None]:
    """Ray gives itself 30 s to start, which a machine with many more processes than cores may not do."""
    try:
        yield
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the processes that Ray began and forgot
            del error
            gc.collect()
        pytest.skip("Ray did not start in time")


def test_a_sweep_on_two_ray_workers_with_one_killed_half_way(
    configs: list[RunConfig], whole: list[Record], tmp_path: Path
) -> None:
    with skipped_if_ray_does_not_start():
        disturbed_sweep("ray", signal.SIGKILL, configs, whole, tmp_path)
    import ray

    assert not ray.is_initialized(), "the cluster that the sweep began has ended with it"


def test_ray_workers_that_are_killed_cost_no_other_run_anything(tmp_path: Path) -> None:
    with skipped_if_ray_does_not_start():
        killed_workers("ray", tmp_path)


def test_a_lost_run_is_a_failed_record_until_it_is_asked_for(
    configs: list[RunConfig], whole: list[Record], tmp_path: Path
) -> None:
    class Loses:
        called = 0

        def threads(self, count: int) -> int:
            return 1

        def run(self, work: Mapping[str, Any], finish: Callable[[str, Record | RunLost], None]) -> None:
            Loses.called += len(work)
            for key in work:
                finish(key, RunLost("the worker died"))

    (lost,) = sweep(configs[1:], tmp_path, executor=Loses())
    assert lost["status"] == "failed"
    assert lost["error"] == "interrupted: the worker died"
    assert sweep(configs[1:], tmp_path, executor=Loses()) == [lost]
    assert Loses.called == 1
    (again,) = sweep(configs[1:], tmp_path, threads=1, retry_failed=True)
    assert result(again) == result(whole[1])
    assert sweep(configs[1:], tmp_path, executor=Loses(), retry_failed=True) == [again]
    assert Loses.called == 1


def test_a_sweep_on_a_cluster_reserves_the_gpu_that_it_computes_on(
    configs: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def make(name: str, resources: Resources, folder: Path) -> None:
        asked.append(resources.gpus_per_run)
        raise ValueError("seen")

    monkeypatch.setattr("avalanche_fmlora.sweep.make_executor", make)
    for device in ("cuda", "cpu"):
        with pytest.raises(ValueError, match="seen"):
            sweep(configs, tmp_path, executor="ray", device=device)
    assert asked == [1.0, 0.0]


def test_a_run_that_another_process_finished_meanwhile_is_taken_from_it(
    configs: list[RunConfig], whole: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_down(config: RunConfig, **options: Any) -> Record:
        write_record(whole[1], tmp_path)
        raise OSError("the disk is full")

    monkeypatch.setattr("avalanche_fmlora.experiment.run", breaks_down)
    assert sweep(configs[1:], tmp_path, threads=1) == [whole[1]]


def test_records_from_another_file_system_are_kept(
    configs: list[RunConfig], whole: list[Record], tmp_path: Path
) -> None:
    class Elsewhere:
        def threads(self, count: int) -> int:
            return 1

        def run(self, work: Mapping[str, Any], finish: Callable[[str, Record | RunLost], None]) -> None:
            for key in work:
                finish(key, next(record for record in whole if record["id"] == key))

    sweep(configs, tmp_path, executor=Elsewhere())
    assert read_records(tmp_path) == sorted(whole, key=lambda record: record["config"]["method"])


@pytest.mark.parametrize(
    ("name", "resources", "message"),
    [
        ("threads", {}, "one of local, processes, ray, slurm"),
        ("local", {"jobs": 2}, "take processes"),
        ("processes", {"gpus_per_run": 1.0}, "reserves nothing"),
        ("ray", {"slurm": {"timeout_min": 1}}, "takes no SLURM options"),
        ("slurm", {"gpus_per_run": 0.5}, "whole GPUs"),
        ("slurm", {}, "the minutes .*--slurm timeout_min=240"),
        ("slurm", {"slurm": {"slurm_partition": "fast"}}, "the minutes .*goes on after its last finished experience"),
    ],
)
def test_resources_that_an_executor_cannot_give(
    name: str, resources: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if name == "slurm":
        pytest.importorskip("submitit", reason="needs the extra `slurm`")
    with pytest.raises(ValueError, match=message):
        make_executor(name, Resources(**resources), tmp_path)


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}.*avalanche-fmlora\[{name}\]"):
        make_executor(name, Resources(), tmp_path)


def test_what_is_asked_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="needs the extra `slurm`")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    work = {key: partial(tasks.at_once, 0) for key in "abc"}
    options = {"timeout_min": 90, "slurm_partition": "fast"}
    slurm = partial(Resources, jobs=2, cpus_per_run=4, gpus_per_run=1.0)
    with pytest.raises(ValueError, match="srun"):
        outcomes(make_executor("slurm", slurm(slurm=options), tmp_path / "records"), work)
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text('#!/bin/sh\ncp "$1" "$(dirname "$0")/script"\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    with pytest.raises(ValueError, match="nonsense"):
        outcomes(make_executor("slurm", slurm(slurm={**options, "nonsense": 1}), tmp_path / "records"), work)
    executor = make_executor("slurm", slurm(slurm=options), tmp_path / "records")
    with pytest.raises(ValueError, match="can't submit"):
        outcomes(executor, work)
    assert executor.threads(3) == 4
    asked = (tmp_path / "script").read_text()
    for line in ("array=0-2%2", "cpus-per-task=4", "gpus-per-node=1", "time=90", "partition=fast"):
        assert f"#SBATCH --{line}\n" in asked
