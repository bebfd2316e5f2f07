"""`fmlora table`, `plot`, `report`: what the records say."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from avalanche_fmlora.cli.common import user_errors
from avalanche_fmlora.results.figures import KINDS

if TYPE_CHECKING:
    from avalanche_fmlora.results.record import Record


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
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
def table(folder: Path | None, style: Any, csv_to: Path | None, reference: str | None) -> None:
    """Print the table of the records in FOLDER (default: runs): mean ± standard deviation (n).

    In bold: better than every other method, each paired 95 % interval excluding zero; with --paired, each difference
    whose interval excludes zero. What keeps records from being compared is said on standard error.
    """
    with user_errors():
        from avalanche_fmlora.results.remarks import remarks
        from avalanche_fmlora.results.table import paired_rows, render, render_paired, summary_rows, write_csvs

        if folder is None and reference and Path(reference).is_dir():  # `--paired FOLDER`
            folder, reference = Path(reference), ""
        records = read_folder(folder or Path("runs"))
        if csv_to is not None:
            write_csvs(records, csv_to, reference or None)
        if reference is None:
            text = render(summary_rows(records), style)
        else:
            text = render_paired(paired_rows(records, reference or None), style)
        click.echo(text.rstrip("\n"))
        for remark in remarks(records):
            click.echo(f"Note: {remark}", err=True)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"))
@click.option("--kind", type=click.Choice([*KINDS, "all"]), default="accuracy", show_default=True, help="What to draw.")
@click.option("--to", type=click.Path(path_type=Path), help="File, or folder of several [default: FOLDER].")
@click.option(
    "--format", "ending", type=click.Choice(["png", "svg", "pdf"]), help="[default: png, or that of the file]"
)
@click.option("--methods", help="Only these methods or labels, with commas between (one that has a comma in quotes).")
def plot(folder: Path, kind: str, to: Path | None, ending: str | None, methods: str | None) -> None:
    """Draw figures from the records in FOLDER (default: runs), as wide as a column.

    A figure for each benchmark and protocol: KIND.png, or KIND-BENCHMARK.png where there are several benchmarks.
    """
    with user_errors():
        from avalanche_fmlora.results.figures import draw, save

        records = read_folder(folder)
        figures = draw(records, list(KINDS) if kind == "all" else [kind], _only(records, methods))
        skipped = {name: error for name, error in figures.items() if isinstance(error, str)}
        drawn = {name: figure for name, figure in figures.items() if not isinstance(figure, str)}
        if not drawn:
            raise ValueError("; ".join(skipped.values()))
        for name, reason in skipped.items():
            click.echo(f"No {name}: {reason}", err=True)
        suffix = to.suffix.lower() if to is not None else ""
        file = suffix in (".png", ".svg", ".pdf")
        if suffix in (".eps", ".gif", ".jpeg", ".jpg", ".ps", ".tif", ".tiff", ".webp"):
            raise ValueError(f"Expected --to to end in .png, .svg or .pdf, or to name a folder, but got {to}.")
        if file and len(drawn) > 1:
            raise ValueError(f"Expected a folder for {len(drawn)} figures ({', '.join(drawn)}) but got the file {to}.")
        if file and ending not in (None, suffix[1:]):
            raise ValueError(f"Expected --to to end in .{ending} but got {to}: leave --format out, or name a folder.")
        for name, figure in drawn.items():
            click.echo(save(figure, to if file and to else (to or folder) / f"{name}.{ending or 'png'}"))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"))
@click.option("--to", type=click.Path(path_type=Path), help="File [default: FOLDER/report.html].")
@click.option("--title", help="Of the page [default: the folder's name].")
@click.option("--paired", "reference", help="Paired differences from this method [default: fm_lora, else the best].")
def report(folder: Path, to: Path | None, title: str | None, reference: str | None) -> None:
    """Write one HTML page of the records in FOLDER (default: runs): tables, figures, configurations, failures.

    The page needs no other file and no network, and prints.
    """
    with user_errors():
        from avalanche_fmlora.results.record import write_atomically
        from avalanche_fmlora.results.report import report_page

        page = report_page(read_folder(folder), title or folder.resolve().name, reference)
        click.echo(write_atomically(to or folder / "report.html", page))


def _only(records: list[Record], methods: str | None) -> set[str] | None:
    """Ids of the records of those that are named by method, label, or both as in tables (``fm_lora rank=8``)."""
    from avalanche_fmlora.results.grouping import runs_of

    if methods is None:
        return None
    wanted = {name.strip() for name in next(csv.reader([methods], skipinitialspace=True))}
    names = [
        (r.record, {r.record["config"]["method"], r.record["config"]["label"], r.label, r.name})
        for r in runs_of(records)
    ]
    there = {name for _, own in names for name in own if name}
    if wanted - there:
        raise ValueError(f"Expected --methods to be among {sorted(there)} but got {sorted(wanted - there)}.")
    return {record["id"] for record, own in names if own & wanted}


def read_folder(folder: Path) -> list[Record]:
    from avalanche_fmlora.results.record import read_records

    inner = folder / "records"
    return read_records(inner if inner.is_dir() else folder)
