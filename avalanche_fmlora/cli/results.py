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
    "--csv-to", type=click.Path(path_type=Path), help="Also write runs, matrix, ranks, summary and paired as CSV here."
)
@click.option(
    "--paired",
    "reference",
    is_flag=False,
    flag_value="",
    metavar="[REFERENCE]",
    help="Print paired differences from a method (or label) instead [default: fm_lora, else the best].",
)
def table(folder: Path, style: Any, csv_to: Path | None, reference: str | None) -> None:
    """Print the table of the records in FOLDER (default: runs): mean ± standard deviation (n).

    In bold: better than every other method, each paired 95 % interval excluding zero. What keeps records from being
    compared is said on standard error.
    """
    with user_errors():
        from avalanche_fmlora.results.remarks import remarks
        from avalanche_fmlora.results.table import paired_rows, render, render_paired, summary_rows, write_csvs

        records = read_folder(folder)
        if csv_to is not None:
            write_csvs(records, csv_to)
        if reference is None:
            text = render(summary_rows(records), style)
        else:
            text = render_paired(paired_rows(records, reference or None), style)
        click.echo(text.rstrip("\n"))
        for remark in remarks(records):
            click.echo(f"Note: {remark}", err=True)


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
