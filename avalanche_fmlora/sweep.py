"""Many configurations -> records: finished ones are skipped, each new one is written as soon as it is there."""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from avalanche_fmlora.backbones import release_backbones
from avalanche_fmlora.config import RunConfig, by_id, located
from avalanche_fmlora.executors import Executor, Resources, RunLost, default_gpus, make_executor
from avalanche_fmlora.executors.local import InProcess, Processes, check_device
from avalanche_fmlora.results.record import Record, blank_record, check_folder, environment, find_record, write_record
from avalanche_fmlora.resuming import known_record

logger = logging.getLogger(__name__)

Report = Callable[[int, int, Record, bool], None]


def sweep(
    configs: Sequence[RunConfig],
    folder: Path,
    *,
    executor: Executor | str | None = None,
    jobs: int = 1,
    device: str = "cpu",
    threads: int | None = None,
    data_root: Path | None = None,
    retry_failed: bool = False,
    report: Report | None = None,
) -> list[Record]:
    """Run what `folder` has no record of.

    Args:
        configs: the runs; the same one twice counts once.
        folder: of the records; interrupted, it holds all finished runs, and the same call goes on from there.
        executor: ``local``, ``processes``, ``ray`` (a GPU for each run unless `device` is the CPU), or an executor of
            :func:`~avalanche_fmlora.executors.make_executor`, as SLURM needs it, or of your own, which then knows about
            jobs and threads; None is ``processes`` for several jobs, else ``local``.
        jobs: runs at once.
        device: where to compute.
        threads: CPU threads a run; None shares the cores out.
        data_root: folder of relative data paths.
        retry_failed: run those again whose record says that they failed; else they are returned as they are.
        report: called with (how many done, of how many, record, whether it was there before) after each.

    Returns:
        One record a configuration, in order; those that broke down, or whose workers died, have status ``failed``.

    Raises:
        FileNotFoundError: if the data or weights of a run are not there.
        OSError: if nothing can be written into `folder`.
        ValueError: if the executor can't do what is asked of it, this machine shall run them and lacks the device, or
            a record in the folder is torn, edited or of other weights or images of the same name, or two runs of
            different files would have one record.
    """
    folder = folder.absolute()
    if executor is None:
        executor = "processes" if jobs > 1 else "local"
    if isinstance(executor, str):
        resources = Resources(jobs, threads, gpus_per_run=default_gpus(executor, device))
        executor = make_executor(executor, resources, folder)
    if isinstance(executor, InProcess | Processes):
        check_device(device)
    unique = by_id(configs)
    look = functools.partial(known_record, folder=folder, data_root=data_root, failed=not retry_failed, listings={})
    known = ((key, look(config)) for key, config in unique.items())
    done = {key: record for key, record in known if record is not None}
    todo = {key: located(c, data_root) for key, c in unique.items() if key not in done}
    if todo:
        check_folder(folder)
    share = executor.threads(len(todo))

    def finish(key: str, outcome: Record | RunLost) -> None:
        done[key] = _kept(outcome, unique[key], folder, device, share)
        if report is not None:
            report(len(done), len(unique), done[key], False)

    if report is not None:
        for count, record in enumerate(done.values(), 1):
            report(count, len(unique), record, True)
    try:
        executor.run({k: functools.partial(run_and_write, c, folder, device, share) for k, c in todo.items()}, finish)
    finally:
        release_backbones()
    return [done[key] for key in unique]


def run_and_write(
    config: RunConfig,
    folder: Path,
    device: str,
    threads: int,
    data_root: Path | None = None,
    progress: bool = False,
    must_start: bool = False,
) -> Record:
    """Run once and write the record; a breakdown becomes a failed record with its error.

    Checkpoints lie below `folder` until there is a finished record: run again, it goes on from the last of them.

    Raises:
        CannotStart: with `must_start`, if the configuration can't be run, instead of a failed record.
    """
    from avalanche_fmlora.experiment import CannotStart, run
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
        if must_start and isinstance(error, CannotStart):
            raise
        cause = error.__cause__ if isinstance(error, CannotStart) else error
        record = _failed(config, f"{type(cause).__name__}: {cause}", device, threads)
    try:
        write_record(record, folder)
    except FileExistsError:  # another process of the same sweep has finished it meanwhile
        return find_record(folder, config.identity()) or record
    if record["status"] == "finished":
        checkpoints.clear()
    return record


def _kept(outcome: Record | RunLost, config: RunConfig, folder: Path, device: str, threads: int) -> Record:
    """The record in the folder: the worker wrote it, unless it died or sees another file system."""
    finished = find_record(folder, config.identity())
    if finished is not None:
        return finished
    record = _failed(config, f"interrupted: {outcome}", device, threads) if isinstance(outcome, RunLost) else outcome
    write_record(record, folder)
    return record


def _failed(config: RunConfig, error: str, device: str, threads: int) -> Record:
    record = blank_record(config.identity())
    record["environment"] = environment(device, threads)
    record["error"] = error
    return record
