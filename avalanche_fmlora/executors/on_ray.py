"""Runs as Ray tasks: a workstation with several GPUs, or a cluster (extra `ray`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from avalanche_fmlora.executors.base import (
    Finish,
    Resources,
    RunLost,
    Task,
    available_cores,
    in_worker,
    optional_package,
)

logger = logging.getLogger(__name__)

_RETRIES = 2


class OnRay:
    """Ray decides where and when; it calls a run again whose worker or machine died.

    The cluster is the one that is initialised already, else that of the environment variable ``RAY_ADDRESS``, else a
    local one for the time of the sweep. On several machines the package and the data lie at the same places on each;
    records come back to this process in any case, checkpoints need a shared folder.
    """

    def __init__(self, resources: Resources) -> None:
        self._ray = optional_package("ray", "ray")
        self._cpus = resources.cpus_per_run or resources.threads or 1
        self._gpus = resources.gpus_per_run
        self._threads = resources.threads
        self._jobs = resources.jobs

    def threads(self, count: int) -> int:
        """As many as there are CPUs reserved, unless another number is asked for."""
        return self._threads or self._cpus

    def run(self, tasks: Mapping[str, Task], finish: Finish) -> None:
        """See :class:`~avalanche_fmlora.executors.base.Executor`."""
        ours = not self._ray.is_initialized()
        if ours:
            self._start()
        pending: dict[Any, str] = {}
        try:
            self._check_resources()
            call = self._ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=_RETRIES)(in_worker)
            pending |= {call.remote(task): key for key, task in tasks.items()}
            while pending:
                (ready,), _ = self._ray.wait(list(pending), num_returns=1)
                outcome = self._outcome(ready)
                finish(pending.pop(ready), outcome)
        finally:
            for reference in pending:
                self._ray.cancel(reference, force=True)
            if ours:
                self._ray.shutdown()

    def _outcome(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            return RunLost(f"{type(error).__name__}, after {_RETRIES + 1} attempts: {str(error).splitlines()[0]}")
        except errors.RayTaskError as error:
            raise (error.cause or error) from None

    def _start(self) -> None:
        address = os.environ.get("RAY_ADDRESS", "local")
        size = {}
        if address == "local":
            size = {"num_cpus": self._cpus * self._jobs if self._jobs else available_cores()}
        self._ray.init(
            address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **size
        )

    def _check_resources(self) -> None:
        """Ray would wait for ever for what a cluster lacks; one that grows on demand may yet get it."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= self._cpus and n.get("GPU", 0) >= self._gpus for n in nodes):
            logger.warning(
                "No machine of the Ray cluster has %s CPUs and %s GPUs for a run: unless it grows, nothing will start.",
                self._cpus,
                self._gpus,
            )
