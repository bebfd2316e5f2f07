"""What a comparison would run and about how long it would take, before anything is run."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from avalanche.core import SupervisedPlugin

from avalanche_fmlora.config import RunConfig, by_id
from avalanche_fmlora.data.base import ImageSet, class_incremental
from avalanche_fmlora.executors.local import check_device
from avalanche_fmlora.experiment import make_backbone, make_benchmark, make_strategy
from avalanche_fmlora.resuming import checkpoint_folder, known_record
from avalanche_fmlora.strategies.registry import method as method_class

logger = logging.getLogger(__name__)

State = Literal["finished", "failed", "goes on", "new"]
_BATCHES = 3
"""Batches of random images that a rehearsal trains on."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds that a method takes for an image: in each epoch, once an experience around its epochs, and at test."""

    epoch_s: float
    around_s: float
    test_s: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Images of each experience."""

    train: Sequence[int]
    test: Sequence[int]


@dataclasses.dataclass
class Planned:
    """One run of a comparison.

    Attributes:
        config: the run.
        state: `finished`, `failed` (and kept so unless asked for again), `goes on` (after some experiences), or `new`.
        finished_experiences: how many an interrupted run has behind it.
        seconds: what is left of it, or None where data or weights are not there yet to tell.
        error: of a failed run, or why there is no estimate.
    """

    config: RunConfig
    state: State
    finished_experiences: int = 0
    seconds: float | None = None
    error: str | None = None


def plan(
    configs: Sequence[RunConfig],
    folder: Path,
    *,
    retry_failed: bool = False,
    device: str = "cpu",
    threads: int = 1,
    data_root: Path | None = None,
    report: Callable[[Planned], None] | None = None,
) -> list[Planned]:
    """What :func:`~avalanche_fmlora.sweep.sweep` with the same arguments would do; no record is written.

    Data are read as the runs will read them: images that are not decoded yet are decoded into the cache, and pretrained
    weights that are not there are fetched. Data sets are not downloaded.

    Durations are measured: each method trains for a moment on random images of the run's size, with its batches, on
    this machine. Rates and weights do not change a duration, so settings that differ in these share a measurement.

    Args:
        configs: the runs; the same one twice counts once.
        folder: of the records.
        retry_failed: as in a sweep.
        device: where to compute.
        threads: CPU threads a run.
        data_root: folder of relative data paths.
        report: called with each run as soon as it is measured, which takes a while for each new setting.

    Raises:
        ValueError: if this machine lacks the device, a record is torn, edited or of other weights or images of the
            same name, or two runs of different files would have one record.
    """
    check_device(device)
    torch.set_num_threads(threads)
    known: dict[str, Any] = {}
    listings: dict[Path, str] = {}
    planned: list[Planned] = []

    def add(run: Planned) -> None:
        planned.append(run)
        if report is not None:
            report(run)

    for key, config in by_id(configs).items():
        record = known_record(config, folder, data_root, failed=not retry_failed, listings=listings)
        if record is not None:
            done: State = "finished" if record["status"] == "finished" else "failed"
            add(Planned(config, done, seconds=0.0, error=record["error"]))
            continue
        behind = max(checkpoint_folder(folder, config.identity()).files(), default=0)
        run = Planned(config, "goes on" if behind else "new", behind)
        try:
            sizes = _once(known, _data_key(config), functools.partial(_sizes, config, data_root))
            rehearsal = functools.partial(rehearse, config, len(sizes.train), device, data_root)
            speed = _once(known, _speed_key(config), rehearsal)
            run.seconds = seconds_left(config, speed, sizes, behind)
        except (ValueError, OSError, RuntimeError) as error:
            logger.debug("%s: %s", key, error)
            run.error = str(error)
        add(run)
    return planned


def plan_totals(runs: Sequence[Planned], at_once: int | None = 1) -> str:
    """How many are to run and how long that would take.

    Args:
        runs: of :func:`plan`.
        at_once: runs at once, or None where a cluster decides.
    """
    to_run = [r for r in runs if r.state in ("new", "goes on")]
    counts = [
        f"{sum(r.state == s for r in runs)} {s}" for s in ("finished", "failed") if any(r.state == s for r in runs)
    ]
    lines = [", ".join([f"{len(runs)} runs", *counts, f"{len(to_run)} to run"]) + "."]
    if any(r.state == "failed" for r in runs):
        lines.append("Failed runs stay failed unless --retry-failed is given.")
    seconds = [r.seconds for r in to_run if r.seconds is not None]
    if seconds:
        total = f"About {duration(sum(seconds))} of computing"
        if at_once is not None and at_once > 1:
            total += f", {duration(max(sum(seconds) / at_once, *seconds))} with {at_once} runs at once"
        lines.append(f"{total}, by the speed of this machine now, on random images.")
    if len(seconds) < len(to_run):
        lines.append(f"No estimate for {len(to_run) - len(seconds)} runs: see above.")
    return "\n".join(lines)


def plan_line(run: Planned) -> str:
    """One run, what is there of it, and about how long the rest takes."""
    config = run.config
    name = f"{config.label or config.method} on {config.benchmark.name}"
    benchmark = config.benchmark.model_dump(exclude_defaults=True, exclude={"name", "path", "download"})
    options = benchmark | config.training.model_dump(exclude_defaults=True) | config.method_options
    own = ", ".join(f"{k}={v}" for k, v in options.items())
    name += f" ({own})" if own else ""
    where = f"{name}, class order {config.class_order_seed}, seed {config.seed}"
    if run.state in ("finished", "failed"):
        return f"{where}: {run.state}" + (f": {run.error}" if run.error else "")
    state = f"goes on after {run.finished_experiences} experiences" if run.finished_experiences else "new"
    time_left = f"about {duration(run.seconds)}" if run.seconds is not None else f"no estimate: {run.error}"
    return f"{where}: {state}, {time_left}"


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(12.3), duration(200), duration(7500)
    ('12 s', '3 min', '2 h 5 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def seconds_left(config: RunConfig, speed: Speed, sizes: Sizes, finished: int = 0) -> float:
    """Seconds of a run after its first `finished` experiences; test images are those of all experiences so far.

    >>> config = RunConfig(method="seq_lora", training={"epochs": 2})
    >>> seconds_left(config, Speed(0.1, 0.01, 0.02), Sizes([10, 10], [5, 5]))
    4.5
    >>> seconds_left(config, Speed(0.1, 0.01, 0.02), Sizes([10, 10], [5, 5]), finished=1)
    2.3
    """
    epochs = getattr(config.resolved_method(), "epochs", None) or config.training.epochs
    joint = method_class(config.method).joint
    tests = [sum(sizes.test)] if joint else [sum(sizes.test[: t + 1]) for t in range(len(sizes.test))]
    trains = [sum(sizes.train)] if joint else sizes.train
    each = (n * (epochs * speed.epoch_s + speed.around_s) for n in trains[finished:])
    return round(sum(each) + sum(tests[finished:]) * speed.test_s, 6)


def rehearse(config: RunConfig, n_experiences: int, device: str, data_root: Path | None = None) -> Speed:
    """Train and test a method for a moment on random images, as a run of this configuration would."""
    backbone = make_backbone(config, data_root)
    strategy = make_strategy(config, backbone, device, n_experiences)
    clock = _Clock(device)
    strategy.plugins.append(clock)
    again = config.benchmark.augment == "none"  # else no image comes back as it was, and no query of it is kept
    strategy.train_epochs = min(2 if again else 1, strategy.train_epochs)
    count = config.training.batch_size * _BATCHES
    stream = _noise(count, backbone.image_size, 1 if strategy.joint or n_experiences == 1 else 2)
    for experience in stream:  # the last one counts: in the first there may be other things to train
        clock.epochs.clear()
        start = clock.now()
        strategy.train([experience] if strategy.joint else experience, num_workers=0)
        train_s = clock.now() - start
    epochs_s = sum(clock.epochs)
    test = torch.utils.data.Subset(experience.dataset.eval(), range(min(count, config.training.eval_batch_size)))
    start = clock.now()
    with torch.no_grad():
        strategy.model.eval()
        for images, _ in strategy.batches(test):
            strategy.model(images)
    test_s = (clock.now() - start) / len(test)
    epoch_s = min(clock.epochs, default=0.0) / count
    return Speed(epoch_s, max(0.0, train_s - epochs_s) / count, test_s)


class _Clock(SupervisedPlugin):
    """Seconds of each epoch."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.epochs: list[float] = []
        self._start = 0.0

    def now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self._start = self.now()

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.epochs.append(self.now() - self._start)


def _noise(count: int, side: int, n_experiences: int) -> Any:
    """Experiences of two classes and `count` images each."""
    random = np.random.default_rng(0)
    total = count * n_experiences
    pixels = random.integers(0, 256, (total, side, side, 3), dtype=np.uint8)
    data = ImageSet(pixels, np.arange(total) * 2 * n_experiences // total)
    names = [str(i) for i in range(2 * n_experiences)]
    return class_incremental("noise", data, data, names, n_experiences=n_experiences).train_stream


def _sizes(config: RunConfig, data_root: Path | None) -> Sizes:
    there = config.benchmark.model_copy(update={"download": False}) if config.benchmark.download else config.benchmark
    config = config.model_copy(update={"benchmark": there})
    info = make_benchmark(config, make_backbone(config, data_root), data_root).info
    return Sizes(info.n_train, info.n_test)


def _once(known: dict[str, Any], key: str, make: Callable[[], Any]) -> Any:
    """`make()`, once a key; what it raises is raised again."""
    if key not in known:
        try:
            known[key] = make()
        except (ValueError, OSError, RuntimeError) as error:
            known[key] = error
    if isinstance(known[key], Exception):
        raise known[key]
    return known[key]


def _data_key(config: RunConfig) -> str:
    identity = config.identity()
    return json.dumps([identity["benchmark"], identity["backbone"], config.class_order_seed], sort_keys=True)


def _speed_key(config: RunConfig) -> str:
    identity = config.identity()
    benchmark = [identity["benchmark"][field] for field in ("n_experiences", "augment")]
    parts = [identity["backbone"], identity["training"], benchmark, config.method]
    return json.dumps([*parts, _without_rates(identity["method_options"])], sort_keys=True)


def _without_rates(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that can change a duration: no numbers with a fraction (but whether they are zero), no seeds."""
    kept: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            kept[name] = _without_rates(value)
        elif name != "seed":
            kept[name] = value != 0 if isinstance(value, float) else value
    return kept
