"""Where the runs of a sweep are computed: this process, processes beside it, Ray, SLURM. One small interface."""

from __future__ import annotations

from avalanche_fmlora.executors.base import (
    EXECUTORS,
    Executor,
    Resources,
    RunLost,
    available_cores,
    default_gpus,
    make_executor,
    quiet_imports,
)

__all__ = [
    "EXECUTORS",
    "Executor",
    "Resources",
    "RunLost",
    "available_cores",
    "default_gpus",
    "make_executor",
    "quiet_imports",
]
