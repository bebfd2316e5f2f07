"""`fmlora compare`: many configurations."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from avalanche_fmlora.cli.common import (
    FLEXIBLE,
    OPTIONS_HELP,
    SHORT,
    Flexible,
    messages,
    read_flags,
    read_list,
    read_pairs,
    read_value,
    running_options,
    show,
    user_errors,
)
from avalanche_fmlora.executors import EXECUTORS

if TYPE_CHECKING:
    from avalanche_fmlora.config import RunConfig
    from avalanche_fmlora.executors import Resources
    from avalanche_fmlora.results.record import Record


FAILED = (
    "Failed runs keep their error until the same command is given with --retry-failed. "
    "The record of one that is not wanted any more can be deleted."
)


@click.command(
    cls=Flexible,
    context_settings=FLEXIBLE,
    epilog=OPTIONS_HELP + "An option of one method only: --fm_lora.rank 16.",
    options_metavar="[OPTIONS] [--FIELD VALUE]...",
)
@click.option("--methods", help="Names with commas between; all if not given.")
@click.option("--benchmarks", help="Names or YAML files with commas between.")
@click.option("--class-orders", help="Seeds of the class or domain order, as 0,1,2 [default: 0].")
@click.option("--seeds", help="Seeds of initial values and batches, as 0,1,2 [default: 0].")
@click.option("--grid", multiple=True, metavar="FIELD=V,V,…", help="Values to try, as fm_lora.rank=8,16; repeatable.")
@click.option("--retry-failed", is_flag=True, help="Run those again whose record says that they failed.")
@click.option("--dry-run", is_flag=True, help="Show what would run and about how long it would take; run nothing.")
@click.option(
    "--executor",
    type=click.Choice(EXECUTORS),
    help="Where to run: in this process, in processes, on Ray, on SLURM [default: processes if --jobs is above 1].",
)
@click.option("--jobs", type=click.IntRange(1), help="Runs at once [default: one a core; one on a GPU].")
@click.option("--cpus-per-run", type=click.IntRange(1), help="CPU cores that ray or slurm reserve a run [default: 1].")
@click.option("--gpus-per-run", type=click.FloatRange(0), help="GPUs they reserve [default: 1 with --device cuda].")
@click.option("--slurm", multiple=True, metavar="NAME=VALUE", help="Option of submitit: timeout_min=240; repeatable.")
@running_options
@click.pass_context
def compare(
    context: click.Context,
    config_files: tuple[Path, ...],
    out: Path,
    data_root: Path | None,
    device: str,
    retry_failed: bool,
    dry_run: bool,
    executor: str | None,
    **flags: Any,
) -> None:
    """Run several methods on the same data and write records and runs, matrix, ranks, summary and paired as CSV.

    Without arguments: all methods on the embedded characters. What is finished in --out is not run again, so the same
    command goes on after an interruption. A failed run stays failed, with its error, until --retry-failed.
    """
    with user_errors(), messages(logging.WARNING):
        from avalanche_fmlora.executors import available_cores, make_executor
        from avalanche_fmlora.sweep import sweep

        configs = _configs(config_files, context.args, flags)
        resources = _resources(flags, device, executor)
        name = executor or ("processes" if resources.jobs != 1 else "local")
        chosen = make_executor(name, resources, out / "records")
        if dry_run:
            from avalanche_fmlora.planning import plan, plan_line, plan_totals

            at_once = resources.jobs or {"local": 1, "processes": available_cores()}.get(name)
            runs = plan(
                configs,
                out / "records",
                retry_failed=retry_failed,
                device=device,
                threads=chosen.threads(len(configs)),
                data_root=data_root,
                report=lambda run: click.echo(plan_line(run)),
            )
            click.echo("\n" + plan_totals(runs, at_once))
            return
        click.echo(f"{len(configs)} runs into {out}", err=True)
        with reporter(len(configs)) as report:
            records = sweep(
                configs,
                out / "records",
                executor=chosen,
                device=device,
                data_root=data_root,
                retry_failed=retry_failed,
                report=report,
            )
        show(records, out, FAILED)


def _configs(files: tuple[Path, ...], arguments: Sequence[str], flags: dict[str, Any]) -> list[RunConfig]:
    """The runs that files and flags ask for; flags go before files."""
    from avalanche_fmlora.config import read_all
    from avalanche_fmlora.grid import expand

    options = read_all(files)
    fields = [(SHORT.get(name, name), value) for name, value in read_flags(arguments)]
    for flag, axis in (("benchmarks",) * 2, ("methods",) * 2, ("class_orders", "class_order_seeds"), ("seeds",) * 2):
        if flags[flag] is not None:
            fields.append((axis, read_list(flags[flag])))
    grid = {name: read_list(text) for name, text in read_pairs("--grid", flags["grid"]).items()}
    if isinstance(options.get("grid", {}), dict):
        grid = {SHORT.get(name, name): values for name, values in {**options.pop("grid", {}), **grid}.items()}
        options["grid"] = grid
    return expand(options, fields)


def _resources(flags: dict[str, Any], device: str, executor: str | None) -> Resources:
    """One run at once on a GPU, unless another number is asked for: how many fit in its memory is not known here."""
    from avalanche_fmlora.executors import Resources, default_gpus

    gpus = default_gpus(executor, device) if flags["gpus_per_run"] is None else flags["gpus_per_run"]
    if gpus and device == "cpu":
        raise ValueError("--gpus-per-run reserves GPUs that --device cpu does not use: add --device cuda.")
    slurm = {name: read_value(text) for name, text in read_pairs("--slurm", flags["slurm"]).items()}
    jobs = flags["jobs"] or (None if device == "cpu" or gpus else 1)
    return Resources(jobs, flags["threads"], flags["cpus_per_run"], gpus, slurm)


@contextmanager
def reporter(total: int) -> Iterator[Callable[[int, int, Record, bool], None]]:
    """A bar over the runs on a terminal, a line a run off it."""
    from tqdm import tqdm

    from avalanche_fmlora.comparison import one_line

    with tqdm(total=total, unit="run", disable=None) as bar:

        def report(done: int, of: int, record: Record, found: bool) -> None:
            line = f"[{done}/{of}] {one_line(record, found)}"
            if bar.disable:
                click.echo(line, err=True)
            else:
                bar.write(line, file=sys.stderr)
                bar.update(done - bar.n)

        yield report
