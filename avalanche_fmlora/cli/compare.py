"""`fmlora compare`: many configurations."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from avalanche_fmlora.cli.common import (
    FLEXIBLE,
    OPTIONS_HELP,
    SHORT,
    one_line,
    prepare,
    read_flags,
    read_value,
    running_options,
    show,
    user_errors,
)

if TYPE_CHECKING:
    from avalanche_fmlora.results.record import Record


@click.command(
    context_settings=FLEXIBLE,
    epilog=OPTIONS_HELP + "An option of one method only: --fm_lora.rank 16.",
    options_metavar="[OPTIONS] [--FIELD VALUE]...",
)
@click.option("--methods", help="Names with commas between; all if not given.")
@click.option("--class-orders", help="Seeds of the class or domain order, as 0,1,2 [default: 0].")
@click.option("--seeds", help="Seeds of initial values and batches, as 0,1,2 [default: 0].")
@click.option("--jobs", type=click.IntRange(1), help="Runs at once [default: one a core].")
@running_options
@click.pass_context
def compare(
    context: click.Context,
    methods: str | None,
    class_orders: str | None,
    seeds: str | None,
    jobs: int | None,
    config_files: tuple[Path, ...],
    out: Path,
    data_root: Path | None,
    device: str,
    threads: int | None,
) -> None:
    """Run several methods on the same data and write records, runs.csv, matrix.csv, ranks.csv and summary.csv.

    Without arguments: all methods on the embedded characters. What is finished in --out is not run again, so the same
    command goes on after an interruption.
    """
    with user_errors():
        prepare(logging.WARNING)
        from avalanche_fmlora.config import read_all
        from avalanche_fmlora.experiment import available_threads
        from avalanche_fmlora.grid import expand
        from avalanche_fmlora.sweep import sweep

        options = read_all(config_files)
        for name, text in (("methods", methods), ("class_order_seeds", class_orders), ("seeds", seeds)):
            if text is not None:
                options[name] = [read_value(part) for part in text.split(",")]
        configs = expand(options, [(SHORT.get(name, name), value) for name, value in read_flags(context.args)])
        click.echo(f"{len(configs)} runs into {out}", err=True)
        with reporter(len(configs)) as report:
            records = sweep(
                configs,
                out / "records",
                jobs=jobs or available_threads(),
                device=device,
                threads=threads,
                data_root=data_root,
                report=report,
            )
        show(records, out)


@contextmanager
def reporter(total: int) -> Iterator[Callable[[int, int, Record], None]]:
    """A bar over the runs on a terminal, a line a run off it."""
    from tqdm import tqdm

    with tqdm(total=total, unit="run", disable=None) as bar:

        def report(done: int, of: int, record: Record) -> None:
            line = f"[{done}/{of}] {one_line(record)}"
            if bar.disable:
                click.echo(line, err=True)
            else:
                bar.write(line, file=sys.stderr)
                bar.update(done - bar.n)

        yield report
