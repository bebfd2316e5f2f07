"""Runs as SLURM jobs through submitit (extra `slurm`): a job that is preempted or out of time is queued again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from avalanche_fmlora.executors.base import Finish, Resources, RunLost, Task, in_worker, optional_package
from avalanche_fmlora.results.record import Record

_POLL_S = 2.0
_TIMEOUTS = 10
_TIME_LIMITS = {"timeout_min", "slurm_time", "time"}


class OnSlurm:
    """One job a run, all in one job array; this process waits for them, and Ctrl-C cancels them.

    Args:
        resources: of a run; `resources.slurm` holds submitit's options, as ``slurm_partition``, and has to say how
            long a job may take (``timeout_min``).
        folder: for submitit's scripts and logs, on a file system that the nodes share.
        cluster: ``slurm``, or for tests submitit's ``local``.
    """

    def __init__(self, resources: Resources, folder: Path, cluster: str = "slurm") -> None:
        self._submitit = optional_package("submitit", "slurm")
        if resources.gpus_per_run != int(resources.gpus_per_run):
            raise ValueError(f"Expected whole GPUs a run on SLURM but got {resources.gpus_per_run}: Ray shares them.")
        if not _TIME_LIMITS & {*resources.slurm, *resources.slurm.get("slurm_additional_parameters", {})}:
            raise ValueError(
                "Expected the minutes that a run may take on SLURM, where submitit asks for 5 unless it is told: give "
                "--slurm timeout_min=240, or Resources(slurm={'timeout_min': 240}). A run that needs more is queued "
                f"again, up to {_TIMEOUTS} times, and goes on after its last finished experience."
            )
        self._cpus = resources.cpus_per_run or resources.threads or 1
        self._threads = resources.threads
        self._folder = folder
        self._cluster = cluster
        self._parameters: dict[str, Any] = {
            "name": "fmlora",
            "cpus_per_task": self._cpus,
            "gpus_per_node": int(resources.gpus_per_run),
            **({"slurm_array_parallelism": resources.jobs} if resources.jobs else {}),
            **resources.slurm,
        }

    def threads(self, count: int) -> int:
        """As many as there are CPUs reserved, unless another number is asked for."""
        return self._threads or self._cpus

    def run(self, tasks: Mapping[str, Task], finish: Finish) -> None:
        """See :class:`~avalanche_fmlora.executors.base.Executor`."""
        jobs = self._submit(tasks)
        keys = {job.job_id: key for job, key in zip(jobs, tasks, strict=True)}
        pending = set(keys)
        try:
            for job in self._submitit.helpers.as_completed(jobs, poll_frequency=_POLL_S):
                outcome = self._outcome(job)
                pending.discard(job.job_id)
                finish(keys[job.job_id], outcome)
        except BaseException:
            for job in jobs:
                if job.job_id in pending:
                    job.cancel(check=False)
            raise

    def _submit(self, tasks: Mapping[str, Task]) -> list[Any]:
        timeouts = {f"{self._cluster}_max_num_timeout": _TIMEOUTS}
        try:
            executor = self._submitit.AutoExecutor(folder=self._folder, cluster=self._cluster, **timeouts)
            executor.update_parameters(**self._parameters)
            with executor.batch():
                return [executor.submit(Requeued(task)) for task in tasks.values()]
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise ValueError(f"submitit can't submit to {self._cluster}: {error}") from None

    def _outcome(self, job: Any) -> Record | RunLost:
        core = self._submitit.core.utils
        try:
            outcome = job.result()
        except core.FailedJobError:
            return RunLost(f"job {job.job_id} broke down outside of the run; its log says more")
        except core.UncompletedJobError:
            return RunLost(f"job {job.job_id} ended without a record, in state {job.state}; its log says more")
        if isinstance(outcome, Exception):
            raise outcome
        return cast("Record", outcome)


class Requeued:
    """A task that submitit may stop and queue again: it goes on from the run's own checkpoint, or from the start."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self) -> Record | Exception:
        """Compute the run; what it raises is handed over, since submitit would keep only the text."""
        try:
            return in_worker(self.task)
        except Exception as error:
            return error

    def checkpoint(self) -> Any:
        """What submitit submits again when it is about to be stopped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
