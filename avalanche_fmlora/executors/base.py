"""The interface of executors, and the choice of one by name."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from avalanche_fmlora.results.record import Record

EXECUTORS = ("local", "processes", "ray", "slurm")
RESERVING = ("ray", "slurm")
"""Those that give a run the CPUs and GPUs that it asks for, and no others."""

Task: TypeAlias = Callable[[], Record]
"""One run. It can be pickled, writes its own record, and returns it."""


class RunLost(Exception):
    """The worker of a run died each time that the run was tried: killed, out of memory, or its machine is gone."""


Finish: TypeAlias = Callable[[str, "Record | RunLost"], None]


class Executor(Protocol):
    """Computes tasks somewhere."""

    def threads(self, count: int) -> int:
        """CPU threads for each of `count` tasks."""
        ...

    def run(self, tasks: Mapping[str, Task], finish: Finish) -> None:
        """Call every task, and `finish(key, record)` in this process as each one ends, in any order.

        A task whose worker dies is called again elsewhere; after several deaths `finish` gets a :class:`RunLost`. What
        a task raises is raised here. Any exception, Ctrl-C too, stops the tasks that are under way.
        """
        ...


@dataclass(frozen=True)
class Resources:
    """What runs may use.

    Attributes:
        jobs: runs at once; None leaves it to the executor: one a core, or all that the cluster admits.
        threads: CPU threads a run; None shares them out.
        cpus_per_run: CPU cores that `ray` and `slurm` reserve a run; None is `threads`, or 1.
        gpus_per_run: GPUs that they reserve; Ray takes fractions.
        slurm: further options of submitit, as ``{"timeout_min": 240, "slurm_partition": "gpu"}``.
    """

    jobs: int | None = None
    threads: int | None = None
    cpus_per_run: int | None = None
    gpus_per_run: float = 0.0
    slurm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("jobs", "threads", "cpus_per_run"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1 but got {value}.")


def default_gpus(executor: str | None, device: str) -> float:
    """GPUs that a run reserves unless it is told: one where it computes on one and gets none that it does not reserve.

    >>> default_gpus("slurm", "cuda"), default_gpus("ray", "cpu"), default_gpus("processes", "cuda")
    (1.0, 0.0, 0.0)
    """
    return 1.0 if executor in RESERVING and device != "cpu" else 0.0


def make_executor(name: str, resources: Resources, folder: Path) -> Executor:
    """The executor called `name`, one of :data:`EXECUTORS`; its logs, if any, go beside the records' `folder`.

    Raises:
        ValueError: for an unknown name, for resources that it can't reserve, or if its package is not installed.
    """
    if name not in EXECUTORS:
        raise ValueError(f"Expected the executor to be one of {', '.join(EXECUTORS)} but got {name!r}.")
    if name not in RESERVING and (resources.gpus_per_run or resources.cpus_per_run):
        raise ValueError(f"The executor `{name}` reserves nothing: leave out GPUs and CPUs a run, or take ray.")
    if resources.slurm and name != "slurm":
        raise ValueError(f"The executor `{name}` takes no SLURM options: leave them out, or take slurm.")
    if name == "ray":
        from avalanche_fmlora.executors.on_ray import OnRay

        return OnRay(resources)
    if name == "slurm":
        from avalanche_fmlora.executors.on_slurm import OnSlurm

        return OnSlurm(resources, folder.parent / "slurm")
    from avalanche_fmlora.executors.local import InProcess, Processes

    if name == "local":
        if (resources.jobs or 1) > 1:
            raise ValueError(f"The executor `local` does one run at a time, not {resources.jobs}: take processes.")
        return InProcess(resources.threads)
    return Processes(resources.jobs, resources.threads)


def optional_package(name: str, extra: str) -> Any:
    """Import a package that only one executor needs.

    Raises:
        ValueError: that says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The executor `{extra}` needs the package {name} ({error}): pip install 'avalanche-fmlora[{extra}]'."
        ) from None


def in_worker(task: Task) -> Record:
    """Call a task in a process that belongs to an executor."""
    quiet_imports()
    return task()


def quiet_imports() -> None:
    """Leave out what Avalanche's imports and an evaluator without loggers have to say: nothing a user could mend."""
    warnings.filterwarnings("ignore", message="no QP solver found")
    warnings.filterwarnings("ignore", message="No loggers specified")


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
