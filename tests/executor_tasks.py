"""Tasks for the tests of executors, in a module that worker processes can import."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from avalanche_fmlora.results.record import Record, blank_record

CONFIG: dict[str, Any] = {"method": "ncm", "benchmark": {"name": "none"}, "seed": 0, "class_order_seed": 0}


def at_once(seed: int) -> Record:
    """A record whose environment says how many threads the worker was given."""
    record = blank_record({**CONFIG, "seed": seed})  # type: ignore[typeddict-item]
    record["environment"]["threads"] = int(os.environ.get("OMP_NUM_THREADS", 0))
    return record


def dies(pids: Path, seed: int, times: int) -> Record:
    """Writes down its process, then waits to be killed, `times` times; the next call returns."""
    with pids.open("a") as file:
        file.write(f"{os.getpid()}\n")
    if len(pids.read_text().split()) <= times:
        time.sleep(120)
    return at_once(seed)


def breaks_down() -> Record:
    """A mistake of the program."""
    raise ArithmeticError("a mistake")


def half_way(task: Callable[[], Record], pids: Path) -> Record:
    """A run that at the first attempt writes down its process after one experience and waits to be killed."""
    from avalanche_fmlora.strategies.base import ContinualStrategy

    train = ContinualStrategy.train

    def train_and_wait(self: Any, *arguments: Any, **options: Any) -> Any:
        result = train(self, *arguments, **options)
        if not pids.exists():
            pids.write_text(f"{os.getpid()}\n")
            time.sleep(120)
        return result

    ContinualStrategy.train = train_and_wait  # type: ignore[method-assign]
    try:
        return task()
    finally:
        ContinualStrategy.train = train  # type: ignore[method-assign]
