"""`fmlora run`: one configuration."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from avalanche_fmlora.cli.common import (
    FLEXIBLE,
    OPTIONS_HELP,
    SHORT,
    Flexible,
    messages,
    read_flags,
    running_options,
    show,
    user_errors,
)


@click.command(
    cls=Flexible,
    context_settings=FLEXIBLE,
    epilog=OPTIONS_HELP,
    options_metavar="[METHOD] [OPTIONS] [--FIELD VALUE]...",
)
@running_options
@click.pass_context
def run(
    context: click.Context,
    config_files: tuple[Path, ...],
    out: Path,
    data_root: Path | None,
    device: str,
    threads: int | None,
) -> None:
    """Run METHOD once (default: fm_lora on the embedded characters) and write its record; a failed run is run again."""
    with user_errors(), messages(logging.INFO):
        from avalanche_fmlora.config import located, make_run, read_all, set_option
        from avalanche_fmlora.executors import available_cores
        from avalanche_fmlora.executors.local import check_device
        from avalanche_fmlora.results.record import check_folder
        from avalanche_fmlora.resuming import known_record
        from avalanche_fmlora.sweep import run_and_write

        options, words = read_all(config_files), list(context.args)
        if words and not words[0].startswith("--"):
            options["method"] = words.pop(0)
        for name, value in read_flags(words):
            set_option(options, SHORT.get(name, name), value)
        config = make_run(options)
        check_device(device)
        record = known_record(config, out / "records", data_root, failed=True)
        if record is not None and record["status"] == "finished":
            click.echo("This run is finished already; its record:", err=True)
        else:
            if record is not None:
                click.echo(f"It failed before ({record['error']}) and is run again.", err=True)
            config = located(config, data_root)
            check_folder(out / "records")
            cores = threads or available_cores()
            record = run_and_write(config, out / "records", device, cores, progress=True, must_start=True)
        show([record], out, "Once that is mended, the same command runs it again.")
