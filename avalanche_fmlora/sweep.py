"""Many configurations -> records: finished ones are skipped, each new one is written as soon as it is there."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from avalanche_fmlora.backbones import release_backbones
from avalanche_fmlora.config import RunConfig, check_data
from avalanche_fmlora.results.record import Record, blank_record, environment, find_record, write_record

logger = logging.getLogger(__name__)

Report = Callable[[int, int, Record], None]


def sweep(
    configs: Sequence[RunConfig],
    folder: Path,
    *,
    jobs: int = 1,
    device: str = "cpu",
    threads: int | None = None,
    data_root: Path | None = None,
    report: Report | None = None,
) -> list[Record]:
    """Run what `folder` has no finished record of.

    Args:
        configs: the runs; the same one twice counts once.
        folder: of the records; interrupted, it holds all finished runs, and the same call goes on from there.
        jobs: runs at once, each in a process of its own if more than one.
        device: where to compute.
        threads: CPU threads a run; None shares the cores out.
        data_root: folder of relative data paths.
        report: called with (how many done, of how many, record) after each.

    Returns:
        One record a configuration, in order; those that broke down have status ``failed``.

    Raises:
        FileNotFoundError: if the data or weights of a run are not there.
    """
    from avalanche_fmlora.experiment import available_threads

    for config in configs:
        check_data(config, data_root)
    unique = {blank_record(c.identity())["id"]: c for c in configs}
    done: dict[str, Record] = {}
    for key, config in unique.items():
        found = find_record(folder, config.identity())
        if found is not None:
            done[key] = found
            if report is not None:
                report(len(done), len(unique), found)
    todo = {key: c for key, c in unique.items() if key not in done}
    jobs = max(1, min(jobs, len(todo)))
    share = threads or max(1, available_threads() // jobs)

    def finish(key: str, record: Record) -> None:
        done[key] = record
        if report is not None:
            report(len(done), len(unique), record)

    if jobs == 1:
        try:
            for key, config in todo.items():
                finish(key, run_and_write(config, folder, device, share, data_root))
        finally:
            release_backbones()
    else:
        _in_processes(todo, folder, jobs, device, share, data_root, finish)
    return [done[key] for key in unique]


def run_and_write(
    config: RunConfig, folder: Path, device: str, threads: int, data_root: Path | None, progress: bool = False
) -> Record:
    """Run once and write the record; a breakdown becomes a failed record with its error.

    Checkpoints lie below `folder` until there is a finished record: run again, it goes on from the last of them.
    """
    from avalanche_fmlora.experiment import run
    from avalanche_fmlora.resuming import checkpoint_folder

    checkpoints = checkpoint_folder(folder, config.identity())
    try:
        record = run(
            config,
            device=device,
            threads=threads,
            data_root=data_root,
            progress=progress,
            checkpoint_dir=checkpoints.folder,
        )
    except Exception as error:
        logger.debug("%s", traceback.format_exc())
        record = blank_record(config.identity())
        record["environment"] = environment(device, threads)
        record["error"] = f"{type(error).__name__}: {error}"
    write_record(record, folder)
    if record["status"] == "finished":
        checkpoints.clear()
    return record


def _in_processes(
    todo: dict[str, RunConfig],
    folder: Path,
    jobs: int,
    device: str,
    threads: int,
    data_root: Path | None,
    finish: Callable[[str, Record], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet_worker, initargs=(threads,))
    try:
        futures: dict[Future[Record], str] = {
            pool.submit(run_and_write, config, folder, device, threads, data_root): key for key, config in todo.items()
        }
        for future in as_completed(futures):
            finish(futures[future], future.result())
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def quiet_imports() -> None:
    """Leave out what Avalanche's imports and an evaluator without loggers have to say: nothing a user could mend."""
    warnings.filterwarnings("ignore", message="no QP solver found")
    warnings.filterwarnings("ignore", message="No loggers specified")


def _quiet_worker(threads: int) -> None:
    """Ctrl-C is the parent's business; thread pools read the environment when they start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_imports()
    os.environ["OMP_NUM_THREADS"] = str(threads)
