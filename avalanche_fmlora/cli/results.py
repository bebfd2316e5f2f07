"""`fmlora table`, `plot`: what the records say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from avalanche_fmlora.cli.common import user_errors

if TYPE_CHECKING:
    from avalanche_fmlora.results.record import Record


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"))
@click.option(
    "--format", "style", type=click.Choice(["markdown", "csv", "latex"]), default="markdown", show_default=True
)
@click.option(
    "--csv-to", type=click.Path(path_type=Path), help="Also write runs, matrix, ranks and summary as CSV here."
)
def table(folder: Path, style: Any, csv_to: Path | None) -> None:
    """Print the table of the records in FOLDER (default: runs)."""
    with user_errors():
        from avalanche_fmlora.results.table import render, summary_rows, write_csvs

        records = read_folder(folder)
        if csv_to is not None:
            write_csvs(records, csv_to)
        click.echo(render(summary_rows(records), style).rstrip("\n"))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"))
@click.option(
    "--to", "path", type=click.Path(path_type=Path), help="File, .png or .svg [default: FOLDER/accuracy.png]."
)
def plot(folder: Path, path: Path | None) -> None:
    """Draw accuracy over experiences from the records in FOLDER (default: runs)."""
    with user_errors():
        from avalanche_fmlora.results.figures import accuracy_over_experiences, save

        click.echo(save(accuracy_over_experiences(read_folder(folder)), path or folder / "accuracy.png"))


def read_folder(folder: Path) -> list[Record]:
    from avalanche_fmlora.results.record import read_records

    inner = folder / "records"
    return read_records(inner if inner.is_dir() else folder)
