"""The command line: `fmlora run`, `compare`, `table`, `list`. Each command imports the heavy packages it needs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from avalanche_fmlora import __version__

if TYPE_CHECKING:
    from avalanche_fmlora.results.record import Record

_SHORT = {
    "benchmark": "benchmark.name",
    "path": "benchmark.path",
    "n_experiences": "benchmark.n_experiences",
    "backbone": "backbone.name",
    "weights": "backbone.weights",
    "image_size": "backbone.image_size",
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "eval_batch_size": "training.eval_batch_size",
}
_OPTIONS_HELP = """
Every field of the configuration is a flag: --benchmark, --path, --n-experiences, --backbone, --weights, --image-size,
--epochs, --batch-size, --seed, --class-order-seed, in general --training.epochs 3 or --backbone.model-args
'{depth: 11}', and the method's own options as --rank 16 (see `fmlora list METHOD`). Values are YAML: null, [0, 1].
"""
_FLEXIBLE = {"ignore_unknown_options": True, "allow_extra_args": True}
CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def _shared(command: CommandT) -> CommandT:
    """Flags of the commands that run something."""
    for decorate in (
        click.option(
            "--config",
            "config_files",
            type=click.Path(path_type=Path),
            multiple=True,
            help="YAML file; a further one goes before it, flags before all.",
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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fmlora")
def main() -> None:
    """Continual learning of pretrained vision transformers: FM-LoRA and its rivals in a fair comparison."""


@main.command(context_settings=_FLEXIBLE, epilog=_OPTIONS_HELP, options_metavar="[METHOD] [OPTIONS] [--FIELD VALUE]...")
@_shared
@click.pass_context
def run(
    context: click.Context,
    config_files: tuple[Path, ...],
    out: Path,
    data_root: Path | None,
    device: str,
    threads: int | None,
) -> None:
    """Run METHOD once (default: fm_lora on the embedded characters) and write its record."""
    with _user_errors():
        _prepare(logging.INFO)
        from avalanche_fmlora.config import check_data, make_run, read_all, set_option
        from avalanche_fmlora.experiment import available_threads
        from avalanche_fmlora.results.record import find_record
        from avalanche_fmlora.sweep import run_and_write

        options, words = read_all(config_files), list(context.args)
        if words and not words[0].startswith("--"):
            options["method"] = words.pop(0)
        for name, value in _flags(words):
            set_option(options, _SHORT.get(name, name), value)
        config = make_run(options)
        check_data(config, data_root)
        record = find_record(out / "records", config.identity())
        if record is None:
            record = run_and_write(config, out / "records", device, threads or available_threads(), data_root, True)
        else:
            click.echo("This run is finished already; its record:", err=True)
        _show([record], out)


@main.command(
    context_settings=_FLEXIBLE,
    epilog=_OPTIONS_HELP + "An option of one method only: --fm_lora.rank 16.",
    options_metavar="[OPTIONS] [--FIELD VALUE]...",
)
@click.option("--methods", help="Names with commas between; all if not given.")
@click.option("--class-orders", help="Seeds of the class or domain order, as 0,1,2 [default: 0].")
@click.option("--seeds", help="Seeds of initial values and batches, as 0,1,2 [default: 0].")
@click.option("--jobs", type=click.IntRange(1), help="Runs at once [default: one a core].")
@_shared
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
    with _user_errors():
        _prepare(logging.WARNING)
        from avalanche_fmlora.config import read_all
        from avalanche_fmlora.experiment import available_threads
        from avalanche_fmlora.grid import expand
        from avalanche_fmlora.sweep import sweep

        options = read_all(config_files)
        for name, text in (("methods", methods), ("class_order_seeds", class_orders), ("seeds", seeds)):
            if text is not None:
                options[name] = [_value(part) for part in text.split(",")]
        configs = expand(options, [(_SHORT.get(name, name), value) for name, value in _flags(context.args)])
        click.echo(f"{len(configs)} runs into {out}", err=True)
        with _reporter(len(configs)) as report:
            records = sweep(
                configs,
                out / "records",
                jobs=jobs or available_threads(),
                device=device,
                threads=threads,
                data_root=data_root,
                report=report,
            )
        _show(records, out)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"))
@click.option(
    "--format", "style", type=click.Choice(["markdown", "csv", "latex"]), default="markdown", show_default=True
)
@click.option(
    "--csv-to", type=click.Path(path_type=Path), help="Also write runs, matrix, ranks and summary as CSV here."
)
def table(folder: Path, style: Any, csv_to: Path | None) -> None:
    """Print the table of the records in FOLDER (default: runs)."""
    with _user_errors():
        from avalanche_fmlora.results.table import render, summary_rows, write_csvs

        records = _read(folder)
        if csv_to is not None:
            write_csvs(records, csv_to)
        click.echo(render(summary_rows(records), style).rstrip("\n"))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"))
@click.option(
    "--to", "path", type=click.Path(path_type=Path), help="File, .png or .svg [default: FOLDER/accuracy.png]."
)
def plot(folder: Path, path: Path | None) -> None:
    """Draw accuracy over experiences from the records in FOLDER (default: runs)."""
    with _user_errors():
        from avalanche_fmlora.results.figures import accuracy_over_experiences, save

        click.echo(save(accuracy_over_experiences(_read(folder)), path or folder / "accuracy.png"))


@main.command("list")
@click.argument("method", required=False)
def list_(method: str | None) -> None:
    """List methods, or the options of METHOD."""
    with _user_errors():
        _prepare(logging.WARNING)
        from avalanche_fmlora.strategies.registry import method as method_class
        from avalanche_fmlora.strategies.registry import methods

        if method is None:
            for name, strategy in methods().items():
                click.echo(f"{name:14} {strategy.summary} ({strategy.paper})")
            return
        for name, field in method_class(method).config_class.model_fields.items():
            click.echo(f"{name} = {field.default!r}\n    {field.description}")


def _read(folder: Path) -> list[Record]:
    from avalanche_fmlora.results.record import read_records

    inner = folder / "records"
    return read_records(inner if inner.is_dir() else folder)


def _flags(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """``--name value`` and ``--name=value`` pairs.

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
                raise ValueError(f"--{name} needs a value: --{name} VALUE.")
            text = following
        flags.append((name.replace("-", "_"), _value(text)))
    return flags


def _value(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _prepare(level: int) -> None:
    """Plain messages on standard error; silence about what other packages' imports have to say."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("avalanche_fmlora").setLevel(level)
    from avalanche_fmlora.sweep import quiet_imports

    quiet_imports()


@contextmanager
def _user_errors() -> Iterator[None]:
    """What the user can mend is a message, not a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo("\nInterrupted: finished runs are kept, the same command goes on from there.", err=True)
        sys.exit(130)


@contextmanager
def _reporter(total: int) -> Iterator[Callable[[int, int, Record], None]]:
    """A bar over the runs on a terminal, a line a run off it."""
    from tqdm import tqdm

    with tqdm(total=total, unit="run", disable=None) as bar:

        def report(done: int, of: int, record: Record) -> None:
            line = f"[{done}/{of}] {_one_line(record)}"
            if bar.disable:
                click.echo(line, err=True)
            else:
                bar.write(line, file=sys.stderr)
                bar.update(done - bar.n)

        yield report


def _one_line(record: Record) -> str:
    name = f"{record['config']['method']}, class order {record['config']['class_order_seed']}"
    if record["status"] != "finished":
        return f"{name}: failed: {record['error']}"
    accuracy, train_s = record["metrics"]["final_average_accuracy"], record["cost"]["train_s"]
    return f"{name}: final average accuracy {100 * (accuracy or 0):.1f} %, {train_s or 0:.0f} s of training"


def _show(records: Sequence[Record], out: Path) -> None:
    """CSVs of all records in the folder, the table of these ones; exit status 1 if one failed."""
    from avalanche_fmlora.results.record import read_records
    from avalanche_fmlora.results.table import render, summary_rows, write_csvs

    paths = write_csvs(read_records(out / "records"), out)
    click.echo(render(summary_rows(records)).rstrip("\n"))
    click.echo(f"\nRecords: {out / 'records'}\nTables:  " + ", ".join(str(p) for p in paths.values()))
    failed = [r for r in records if r["status"] != "finished"]
    for record in failed:
        click.echo(f"Failed: {_one_line(record)}", err=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
