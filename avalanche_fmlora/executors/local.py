"""Runs on this machine: one after the other in this process, or several at once in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from queue import SimpleQueue

import torch

from avalanche_fmlora.executors.base import Finish, RunLost, Task, available_cores, in_worker
from avalanche_fmlora.results.record import Record

_ATTEMPTS = 2


def check_device(device: str) -> None:
    """Refuse a device that this machine lacks, before a run starts.

    Raises:
        ValueError: that says what there is.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"Expected `device` to be cpu, cuda or cuda:1, say, but got {device!r}.") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ValueError(
            f"Expected a device of this machine but torch {torch.__version__} finds no {device}: it has "
            f"{', '.join(['cpu', *there])}. A GPU needs a torch with CUDA (pytorch.org/get-started) and a driver."
        )
    try:
        if wanted.type not in ("cpu", "cuda"):
            torch.ones(1, device=wanted).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"Expected a device of this machine but {device} can't be used ({reason}): name cpu."
        ) from None


class InProcess:
    """One run after the other, here."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads

    def threads(self, count: int) -> int:
        """All cores, unless fewer are asked for."""
        return self._threads or available_cores()

    def run(self, tasks: Mapping[str, Task], finish: Finish) -> None:
        """See :class:`~avalanche_fmlora.executors.base.Executor`."""
        for key, task in tasks.items():
            finish(key, task())


class Processes:
    """`jobs` runs at once, each in a process of its own; one that is killed costs no other run anything."""

    def __init__(self, jobs: int | None = None, threads: int | None = None) -> None:
        self._jobs = jobs or available_cores()
        self._threads = threads

    def threads(self, count: int) -> int:
        """The cores, shared out among the runs at once."""
        return self._threads or max(1, available_cores() // min(self._jobs, max(1, count)))

    def run(self, tasks: Mapping[str, Task], finish: Finish) -> None:
        """See :class:`~avalanche_fmlora.executors.base.Executor`."""
        if not tasks:
            return
        jobs = min(self._jobs, len(tasks))
        workers = [_Worker(self.threads(len(tasks))) for _ in range(jobs)]
        try:
            for start in [worker.start() for worker in workers]:
                start.result()
        except BaseException as error:
            for worker in workers:
                worker.kill()
            if not isinstance(error, BrokenProcessPool):
                raise
            raise ValueError(
                "Worker processes can't start: a script has to call this below `if __name__ == '__main__':`, as each "
                "of them reads the script anew. With jobs=1 it runs in this process."
            ) from None
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in workers:
            idle.put(worker)

        def call(task: Task) -> Record | RunLost:
            worker = idle.get()
            try:
                return worker.call(task)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(jobs) as drivers:
            futures = {drivers.submit(call, task): key for key, task in tasks.items()}
            try:
                for future in as_completed(futures):
                    finish(futures[future], future.result())
            except BaseException:
                drivers.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.kill()
                raise
            for worker in workers:
                worker.close()


class _Worker:
    """A pool of one process: when the process dies, it is clear which run it had, and no other run notices."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._killed = False
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(self._threads,))

    def start(self) -> Future[int]:
        """Something that is done once the process is there."""
        return self._pool.submit(int)

    def call(self, task: Task) -> Record | RunLost:
        for _ in range(_ATTEMPTS):
            future = self._pool.submit(in_worker, task)
            processes = list((self._pool._processes or {}).values())
            try:
                return future.result()
            except BrokenProcessPool:
                if self._killed:
                    raise
                for process in processes:
                    process.join(1)
                codes = [process.exitcode for process in processes]
                self._pool = self._new_pool()
        reason = f"exit code {codes[0]}" if codes else "no exit code"
        return RunLost(f"the worker died {_ATTEMPTS} times ({reason}; -9 is often a lack of memory)")

    def kill(self) -> None:
        self._killed = True
        for process in list((self._pool._processes or {}).values()):
            process.terminate()
        self.close()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _begin(threads: int) -> None:
    """Ctrl-C is the parent's business; thread pools read the environment when they start; an orphan has no use."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
