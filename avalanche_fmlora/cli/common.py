"""What the commands share: flags of runs, messages, errors as one line, the table at the end."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from avalanche_fmlora.results.record import Record

SHORT = {
    "benchmark": "benchmark.name",
    "path": "benchmark.path",
    "download": "benchmark.download",
    "domain_order": "benchmark.domain_order",
    "n_experiences": "benchmark.n_experiences",
    "backbone": "backbone.name",
    "weights": "backbone.weights",
    "image_size": "backbone.image_size",
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "eval_batch_size": "training.eval_batch_size",
}
TEXTS = {"label", "path", "split_file", "weights"}
"""Fields whose value is text, whatever it looks like."""
OPTIONS_HELP = """
Every field of the configuration is a flag: --benchmark, --path, --download, --n-experiences, --backbone, --weights,
--image-size, --epochs, --batch-size, --seed, --class-order-seed, in general --training.epochs 3 or
--backbone.model-args '{depth: 11}', and the method's own options as --rank 16 (see `fmlora list METHOD`). Values are
YAML: null, [0, 1].
"""
FLEXIBLE: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True}


class Flexible(click.Command):
    """A command that takes any ``--field value``; ``-epochs`` is no field, and no ``-e -p -o -c -h`` either."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse words that lack a dash."""
        for word in args:
            if re.match(r"-[A-Za-z][\w.-]", word):
                raise click.UsageError(f"Expected two dashes before a field: write -{word} in place of {word}.", ctx)
        return super().parse_args(ctx, args)


CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def running_options(command: CommandT) -> CommandT:
    """Flags of the commands that run something."""
    for decorate in (
        click.option(
            "--config",
            "config_files",
            type=click.Path(path_type=Path),
            multiple=True,
            help="YAML file, repeatable: a later one overrides an earlier one, flags override all.",
        ),
        click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder."),
        click.option("--data-root", type=click.Path(path_type=Path), help="Folder of relative data paths."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …"),
        click.option(
            "--threads", type=click.IntRange(1), help="CPU threads a run; all cores are shared out if not given."
        ),
    ):
        command = decorate(command)
    return command


def read_flags(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """``--name value`` and ``--name=value`` pairs; values are YAML, save those of paths and labels.

    Raises:
        ValueError: for a word that is no flag, or a flag without its value.
    """
    flags: list[tuple[str, Any]] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"Expected `--option value` but got {word!r}.")
        name, separator, text = word[2:].partition("=")
        if not separator:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise ValueError(f"--{name} needs a value: --{name} VALUE, or --{name} true for what is switched on.")
            text = following
        field = name.replace("-", "_")
        plain = field.rpartition(".")[2] in TEXTS and text != "null"
        flags.append((field, text if plain else read_value(text)))
    return flags


def read_value(text: str) -> Any:
    import yaml

    from avalanche_fmlora.strict import load_yaml

    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def read_list(text: str) -> list[Any]:
    """``8,16`` as values; ``[[0, 1], [2]]`` where the values themselves are lists.

    Raises:
        ValueError: for a place with nothing in it, as an empty shell variable leaves one.
    """
    value = read_value(text) if text.startswith("[") else None
    if isinstance(value, list):
        return value
    parts = text.split(",")
    if not all(part.strip() for part in parts):
        raise ValueError(f"Expected values with commas between but got {text!r}: write null where none is meant.")
    return [read_value(part) for part in parts]


def read_pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """``name=text`` words of a flag that can be given several times.

    Raises:
        ValueError: for a word without ``=``, or a name that comes twice.
    """
    pairs: dict[str, str] = {}
    for name, _, value in (text.partition("=") for text in texts):
        if not name or not value:
            raise ValueError(f"Expected {flag} NAME=VALUE but got {name or '='}: write {name or 'NAME'}=VALUE.")
        if name.replace("-", "_") in pairs:
            raise ValueError(f"{flag} {name} is given twice: write it once, a list of values with commas between.")
        pairs[name.replace("-", "_")] = value
    return pairs


@contextmanager
def messages(level: int) -> Iterator[None]:
    """This package's messages, plain, on standard error while a command runs; silence about what other packages'
    imports have to say. Loggers and warning filters are as before after it: a command may be a call among others.
    """
    from avalanche_fmlora.executors import quiet_imports

    root, package = logging.getLogger(), logging.getLogger("avalanche_fmlora")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    alone = not root.handlers  # a program with handlers of its own shows what it likes
    before = package.level
    package.setLevel(level)
    if alone:
        root.addHandler(handler)
    try:
        with warnings.catch_warnings():
            quiet_imports()
            yield
    finally:
        package.setLevel(before)
        if alone:
            root.removeHandler(handler)


@contextmanager
def user_errors() -> Iterator[None]:
    """What the user can mend is a message, not a traceback."""
    try:
        yield
    except BrokenPipeError:  # `| head` has read enough
        raise
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo("\nInterrupted: finished runs are kept, the same command goes on from there.", err=True)
        sys.exit(130)


def show(records: Sequence[Record], out: Path, mend: str) -> None:
    """CSVs of all records in the folder, the table of these ones; if one failed, how to `mend` it and exit status 1."""
    from avalanche_fmlora.comparison import one_line
    from avalanche_fmlora.results.record import file_name, read_records
    from avalanche_fmlora.results.remarks import repeated_orders
    from avalanche_fmlora.results.table import render, summary_rows, write_csvs

    paths = write_csvs(read_records(out / "records"), out)
    click.echo(render(summary_rows(records)).rstrip("\n"))
    for remark in repeated_orders(records):
        click.echo(f"Note: {remark}", err=True)
    click.echo(f"\nRecords: {out / 'records'}\nTables:  " + ", ".join(str(p) for p in paths.values()))
    failed = [r for r in records if r["status"] != "finished"]
    for record in failed:
        click.echo(f"Failed: {one_line(record)} (record {file_name(record)})", err=True)
    if failed:
        click.echo(mend, err=True)
        sys.exit(1)
