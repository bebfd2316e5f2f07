"""A comparison in one call, for notebooks and scripts: what `fmlora compare` runs, given as keywords."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from avalanche_fmlora.config import RunConfig
from avalanche_fmlora.executors import Executor, quiet_imports
from avalanche_fmlora.grid import SINGLE, expand
from avalanche_fmlora.results.record import Record, file_name
from avalanche_fmlora.sweep import sweep

logger = logging.getLogger(__name__)


def compare(
    methods: Sequence[str | Mapping[str, Any]] | None = None,
    *,
    class_order_seeds: Sequence[int | None] = (0,),
    seeds: Sequence[int] = (0,),
    out: str | Path = "runs",
    executor: Executor | str | None = None,
    jobs: int = 1,
    retry_failed: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    data_root: str | Path | None = None,
    report: Callable[[str], object] | None = None,
    **fields: Any,
) -> list[Record]:
    """Run several methods on the same data. What is finished in `out` is not run again.

    Tables and figures are made of the result: :func:`avalanche_fmlora.results.table.summary_frame` or
    :func:`avalanche_fmlora.results.figures.accuracy_over_experiences`, say.

    Args:
        methods: names, or mappings with `method`, its options and perhaps a `label` for tables, as
            ``{"method": "fm_lora", "rank": 16}``; None is all methods.
        class_order_seeds: of the class or domain order; every method runs on each.
        seeds: of initial values and batches; every method runs with each.
        out: folder; records are kept in its ``records``.
        executor: see :func:`~avalanche_fmlora.sweep.sweep`.
        jobs: runs at once, each in a process of its own if more than one. A method that is registered in a notebook is
            known to this process only: it needs 1.
        retry_failed: run those again whose record says that they failed.
        device: where to compute.
        threads: CPU threads a run; None shares the cores out.
        data_root: folder of relative data paths.
        report: called with a line of text after each run, ``print`` say.
        fields: what all runs share: parts of the configuration, as in a YAML file
            (``benchmark={"name": "split_glyphs", "n_experiences": 5}``, ``training={"epochs": 3}``), options of
            methods, for each method that has them (``precision="bf16"``), and the axes `benchmarks` and `grid` of
            :func:`~avalanche_fmlora.grid.expand` (``grid={"fm_lora.rank": [8, 16]}``).

    Returns:
        One record a run, in order; one that broke down has status ``failed``, and its error is logged.

    Raises:
        ValueError: for an unknown method, field or option.
        FileNotFoundError: if data or weights are not there.
    """
    for single, axis in SINGLE.items():
        if single in fields:
            raise ValueError(f"Expected `{axis}`, a list, but got `{single}`: write {axis}=[{fields[single]!r}].")
    for axis, values in (("methods", methods), ("class_order_seeds", class_order_seeds), ("seeds", seeds)):
        if isinstance(values, str | int | Mapping):
            raise ValueError(f"Expected `{axis}` to be a list but got {values!r}: write {axis}=[{values!r}].")
    options: dict[str, Any] = {k: v for k, v in fields.items() if k in RunConfig.model_fields}
    options |= {"class_order_seeds": list(class_order_seeds), "seeds": list(seeds)}
    if methods is not None:
        options["methods"] = [m if isinstance(m, str) else dict(m) for m in methods]
    of_methods = [(name, value) for name, value in fields.items() if name not in options]

    def tell(done: int, of: int, record: Record, found: bool) -> None:
        line = f"[{done}/{of}] {one_line(record, found)}"
        if record["status"] != "finished":
            logger.warning(line)
        if report is not None:
            report(line)

    with warnings.catch_warnings():
        quiet_imports()
        return sweep(
            expand(options, of_methods),
            Path(out) / "records",
            executor=executor,
            jobs=jobs,
            retry_failed=retry_failed,
            device=device,
            threads=threads,
            data_root=None if data_root is None else Path(data_root),
            report=tell,
        )


def one_line(record: Record, found: bool = False) -> str:
    """What became of a run: method, class order, seed, and its final average accuracy or its error.

    Args:
        record: of the run.
        found: whether it was there before, and nothing has been run now.
    """
    config = record["config"]
    method = config["method"] if not config["label"] else f"{config['method']} ({config['label']})"
    order = config["class_order_seed"]
    name = f"{method}, class order {'as given' if order is None else order}"
    if config["seed"]:
        name += f", seed {config['seed']}"
    if record["status"] != "finished":
        return f"{name}: failed{' before' if found else ''}: {record['error']}"
    accuracy, train_s = record["metrics"]["final_average_accuracy"], record["cost"]["train_s"]
    line = f"{name}: final average accuracy {100 * (accuracy or 0):.1f} %, {train_s or 0:.0f} s of training"
    return f"{line} (recorded before in {file_name(record)})" if found else line
