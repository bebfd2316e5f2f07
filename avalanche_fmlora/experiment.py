"""One configuration -> one run -> one record."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from avalanche_fmlora.backbones import Backbone, shared_backbone
from avalanche_fmlora.config import RunConfig, find_data
from avalanche_fmlora.metrics import experience_accuracies, summarize
from avalanche_fmlora.plugins.progress import ProgressPlugin
from avalanche_fmlora.results.record import Cost, Metrics, Record, blank_record, environment
from avalanche_fmlora.results.record import Experience as ExperienceRow
from avalanche_fmlora.resuming import RunCheckpoints
from avalanche_fmlora.strategies.base import ContinualStrategy
from avalanche_fmlora.strategies.registry import method as method_class

logger = logging.getLogger(__name__)


class CannotStart(ValueError):
    """The backbone, data or strategy of a configuration can't be built: nothing has been trained."""


def make_backbone(config: RunConfig, data_root: Path | None = None) -> Backbone:
    """The backbone of a configuration, a model of the caller's own; its file is read once a process."""
    backbone = config.backbone
    if backbone.weights is not None:
        backbone = backbone.model_copy(update={"weights": find_data(backbone.weights, data_root)})
    return shared_backbone(backbone)


def make_benchmark(config: RunConfig, backbone: Backbone, data_root: Path | None = None) -> Any:
    """The Avalanche benchmark of a configuration, at the backbone's image size, mean and std."""
    data = config.benchmark.located(lambda path: find_data(path, data_root))
    common: dict[str, Any] = {
        "class_order_seed": config.class_order_seed,
        "image_size": backbone.image_size,
        "mean": backbone.mean,
        "std": backbone.std,
    }
    return data.builder()(**data.arguments(), **common)


def run(
    config: RunConfig,
    *,
    device: str = "cpu",
    threads: int = 1,
    data_root: Path | None = None,
    progress: bool = False,
    checkpoint_dir: Path | None = None,
) -> Record:
    """Train and evaluate once.

    Args:
        config: what determines the result.
        device: where to compute.
        threads: CPU threads of torch.
        data_root: folder of relative data paths.
        progress: show a bar for each experience, on a terminal.
        checkpoint_dir: folder of this run's checkpoints and nothing else. If it holds some, the run goes on after the
            last experience that it finished, and ends with the same record as one that was never stopped.

    Returns:
        A finished record; nothing but checkpoints is written.

    Raises:
        CannotStart: if backbone, data or strategy can't be built as configured.
    """
    torch.set_num_threads(threads)
    started = _now()
    record = blank_record(config.identity())
    record["environment"] = environment(device, threads)
    try:
        backbone = make_backbone(config, data_root)
        benchmark = make_benchmark(config, backbone, data_root)
        torch.manual_seed(config.seed)
        strategy = make_strategy(config, backbone, device, len(benchmark.train_stream))
    except (ValueError, OSError) as error:
        raise CannotStart(str(error)) from error
    if progress:
        strategy.plugins.append(ProgressPlugin())
    logger.info("%s on %s, class order %s", config.method, benchmark.info.name, config.class_order_seed)
    with _peak_memory(device) as peak, _forward_passes(strategy.model.vit) as passes:
        loop = _Loop(strategy, benchmark, passes, config.training.num_workers)
        checkpoints = None
        if checkpoint_dir is not None:
            checkpoints = RunCheckpoints(
                checkpoint_dir,
                config.identity(),
                data=benchmark.info.split_hash,
                backbone=backbone.sha256,
                environment=record["environment"],
                started_at=started,
            )
            checkpoints.resume(loop)
            started = checkpoints.started_at
        for _ in loop.joint() if strategy.joint else loop.continual():
            if checkpoints is not None:
                checkpoints.save(loop, _peak_bytes(device))
    record["benchmark"] = dataclasses.asdict(benchmark.info)  # type: ignore[typeddict-item]
    record["backbone"] = {
        "tag": backbone.tag,
        "sha256": backbone.sha256,
        "image_size": backbone.image_size,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
    }
    record["accuracy_matrix"] = loop.matrix
    record["metrics"] = cast(Metrics, summarize(loop.matrix, benchmark.info.n_test))
    record["experiences"] = cast(list[ExperienceRow], loop.experiences)
    gmacs = _gmacs(strategy, backbone.image_size)
    peak_bytes = max(peak[0], checkpoints.peak_memory_bytes if checkpoints is not None else 0)
    record["cost"] = cast(Cost, {**loop.cost(), "peak_memory_bytes": peak_bytes, "gmacs_per_image": gmacs})
    record["status"], record["error"] = "finished", None
    record["started_at"], record["finished_at"] = started, _now()
    return record


def make_strategy(config: RunConfig, backbone: Backbone, device: str, n_experiences: int) -> ContinualStrategy:
    """The strategy; methods that plan for a number of experiences get it from the data unless it is set."""
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin

    cls = method_class(config.method)
    options = config.resolved_method().planned_for(n_experiences)
    return cls(
        model=backbone.model,
        config=options,
        train_mb_size=config.training.batch_size,
        train_epochs=config.training.epochs,
        eval_mb_size=config.training.eval_batch_size,
        device=device,
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
    )


class _Loop:
    """Trains over the stream, evaluates on what has been seen, collects the rows of the record."""

    def __init__(self, strategy: ContinualStrategy, benchmark: Any, passes: list[int], num_workers: int) -> None:
        self.strategy = strategy
        self.num_workers = num_workers
        self.benchmark = benchmark
        self.passes = passes
        self.matrix: list[list[float | None]] = []
        self.experiences: list[dict[str, Any]] = []
        self.trained_images = self.tested_images = 0
        self.train_passes = self.test_passes = 0
        self.data_wait_s = 0.0

    def state(self) -> dict[str, Any]:
        """Rows and sums so far."""
        return {k: v for k, v in vars(self).items() if k not in ("strategy", "benchmark", "passes", "num_workers")}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from rows and sums."""
        vars(self).update(state)

    def continual(self) -> Iterator[int]:
        """R[t, i] for i ≤ t; each experience that is done, from the first that is not yet."""
        for t in range(len(self.experiences), len(self.benchmark.train_stream)):
            experience = self.benchmark.train_stream[t]
            train_s = self._train(experience, len(experience.dataset))
            self._evaluate(t, train_s, range(t + 1))
            yield t

    def joint(self) -> Iterator[int]:
        """Only the last row of R is known."""
        if self.experiences:
            return
        count = len(self.benchmark.train_stream)
        total = sum(len(e.dataset) for e in self.benchmark.train_stream)
        train_s = self._train(self.benchmark.train_stream, total)
        self.matrix = [[None] * count for _ in range(count - 1)]
        self._evaluate(count - 1, train_s, range(count))
        yield count - 1

    def _train(self, experiences: Any, images: int) -> float:
        start, before, waited = time.perf_counter(), self.passes[0], self.strategy.data_wait_s
        self.strategy.train(experiences, num_workers=self.num_workers)
        self.data_wait_s = self.strategy.data_wait_s - waited
        self.trained_images += images * max(1, self.strategy.train_epochs)
        self.train_passes += self.passes[0] - before
        return time.perf_counter() - start

    def _evaluate(self, t: int, train_s: float, seen: range) -> None:
        start, before = time.perf_counter(), self.passes[0]
        stream = [self.benchmark.test_stream[i] for i in seen]
        results = self.strategy.eval(stream, num_workers=self.num_workers)
        row: list[float | None] = [None] * len(self.benchmark.test_stream)
        for i, accuracy in experience_accuracies(results).items():
            if i in seen:
                row[i] = accuracy
        self.matrix.append(row)
        self.tested_images += sum(len(e.dataset) for e in stream)
        self.test_passes += self.passes[0] - before
        known = [a for a in row if a is not None]
        eval_s = time.perf_counter() - start
        self.experiences.append(self._experience_row(t, train_s, eval_s))
        logger.info("  experience %d: accuracy %.3f (%.0f s)", t, sum(known) / len(known), train_s + eval_s)

    def _experience_row(self, t: int, train_s: float, eval_s: float) -> dict[str, Any]:
        model = self.strategy.model
        chosen = _latest_rank(self.strategy.plugins)
        trainable = self.strategy.resources[-1]["trainable_parameters"]
        return {
            "experience": t,
            "name": self.benchmark.info.experience_names[t] if not self.strategy.joint else "all",
            "rank": chosen.get("rank", model.lora.rank if model.lora is not None else None),
            "ranks_per_layer": chosen.get("ranks_per_layer"),
            "complexity": chosen.get("complexity"),
            "similarity": chosen.get("similarity"),
            "trainable_parameters": trainable,
            "trained_parameters": trainable - chosen.get("masked_parameters", 0),
            "stored_parameters": model.stored_parameters(),
            "stored_statistics": model.stored_statistics(),
            "head_parameters": model.head.stored_parameters(),
            "train_s": train_s,
            "eval_s": eval_s,
            "data_wait_s": self.data_wait_s,
        }

    def cost(self) -> dict[str, float]:
        """Seconds, and forward passes of an image, in training (passes between epochs counted) and at test."""
        train_s = sum(e["train_s"] for e in self.experiences)
        return {
            "train_s": train_s,
            "eval_s": sum(e["eval_s"] for e in self.experiences),
            "train_images_per_s": self.trained_images / train_s,
            "data_wait_share": sum(e["data_wait_s"] for e in self.experiences) / train_s,
            "test_forward_passes": self.test_passes / self.tested_images,
            "train_forward_passes": self.train_passes / self.trained_images,
        }


def _latest_rank(plugins: Iterable[Any]) -> dict[str, Any]:
    """The latest line of the rank selector's `history`; others' plugins may have a history of something else."""
    for plugin in plugins:
        history = getattr(plugin, "history", None)
        if isinstance(history, list) and history and isinstance(history[-1], dict) and "rank" in history[-1]:
            return history[-1]
    return {}


@contextmanager
def _forward_passes(vit: Any) -> Iterator[list[int]]:
    """Counts images through the patch embedding."""
    count = [0]
    handle = vit.patch_embed.register_forward_hook(
        lambda module, args, out: count.__setitem__(0, count[0] + len(args[0]))
    )
    try:
        yield count
    finally:
        handle.remove()


@contextmanager
def _peak_memory(device: str) -> Iterator[list[int]]:
    """Peak memory in bytes: of the device's tensors on CUDA, else of the whole process."""
    peak = [0]
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:  # Linux: start counting anew, so that runs in one process do not inherit each other's peak
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            logger.debug("The peak of this process's memory can't be reset here.")
    yield peak
    peak[0] = _peak_bytes(device)


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@torch.no_grad()
def _gmacs(strategy: ContinualStrategy, image_size: int) -> float:
    """Multiply-accumulates of one test image, merged where the method can merge, in 1e9.

    Attention is computed by its plain matrix products here: the counter misses the fused kernel of some CPUs.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    strategy.model.eval()
    strategy.merge()
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            strategy.model(torch.zeros(1, 3, image_size, image_size, device=strategy.device))
    finally:
        strategy.unmerge()
    return float(counter.get_total_flops()) / 2e9


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
