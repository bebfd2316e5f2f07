"""Rows -> tables to quote, as Markdown, LaTeX (with ``booktabs``), CSV, or cells for another page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

from avalanche_fmlora.results.paired import METRICS

if TYPE_CHECKING:
    import pandas as pd

Format: TypeAlias = Literal["csv", "markdown", "latex"]
Rows: TypeAlias = "Sequence[Mapping[str, Any]] | pd.DataFrame"

HEADERS = dict(zip(METRICS, ("FAA", "pooled", "AAA", "forgetting", "BWT", "learning acc."), strict=True))
_TEXTS = ("benchmark", "protocol", "apart", "reference", "method", "label", "note")


class Cell(NamedTuple):
    """What a cell shows: `main`, in bold or not, and `tail` after it."""

    main: str
    tail: str = ""
    bold: bool = False


class Table(NamedTuple):
    """Header and rows of equal length; `blocks` names for each row the block that it is in, None the first one."""

    header: list[str]
    rows: list[list[Cell]]
    blocks: list[str | None]


def render(summary: Rows, format: Format = "markdown", digits: int = 1) -> str:
    """Draw a summary as a table to quote: per cent, ``mean ± std (n)``, the best in bold.

    Bold is what is better than every other method of the block, each paired 95 % interval excluding zero. Methods that
    don't compete follow in a block of their own. The columns of pooled accuracy, protocol, label, stored statistics and
    note appear where they say something.

    Args:
        summary: of ``summary_rows`` or ``summary_frame``.
        format: ``"markdown"`` (aligned, for a terminal too), ``"latex"`` or ``"csv"`` (no bold).
        digits: after the decimal point of per cent.

    Raises:
        ValueError: if the format is unknown.
    """
    return draw(summary_table(summary, digits), format)


def render_paired(paired: Rows, format: Format = "markdown", digits: int = 1) -> str:
    """Draw paired differences: a row a method, ``mean [low, high] (n)`` in points of per cent, reference minus method.

    Bold is what excludes zero.

    Args:
        paired: of ``paired_rows`` or ``paired_frame``.
        format: as in :func:`render`.
        digits: after the decimal point.

    Raises:
        ValueError: if the format is unknown.
    """
    return draw(paired_table(paired, digits), format)


def draw(table: Table, format: Format) -> str:
    """A table as text.

    Raises:
        ValueError: if the format is unknown.
    """
    if format not in get_args(Format):
        raise ValueError(f"Expected `format` to be one of {list(get_args(Format))} but got {format!r}.")
    return {"csv": _csv, "markdown": _markdown, "latex": _latex}[format](table)


def summary_table(summary: Rows, digits: int = 1) -> Table:
    """The cells of :func:`render`."""
    rows = _plain_rows(summary)
    columns: dict[str, list[Cell]] = {}
    for name in ("benchmark", "protocol", "method", "label"):
        columns[name] = [Cell(row[name] or "") for row in rows]
    for metric, header in HEADERS.items():
        columns[f"{header} [%]"] = [per_cent(row, metric, digits) for row in rows]
    for header, name in (("stored params", "stored_parameters_mean"), ("stored stats", "stored_statistics_mean")):
        columns[header] = [Cell(number(row[name])) for row in rows]
    columns["train [s]"] = [Cell(number(row["train_s_mean"], 1)) for row in rows]
    columns["note"] = [Cell(row["note"] or "") for row in rows]
    if [c.main for c in columns["FAA [%]"]] == [c.main for c in columns["pooled [%]"]]:
        del columns["pooled [%]"]
    if not any(row["stored_statistics_mean"] for row in rows):
        del columns["stored stats"]
    return _table(columns, [row["apart"] for row in rows], ("protocol", "label", "note"))


def paired_table(paired: Rows, digits: int = 1) -> Table:
    """The cells of :func:`render_paired`."""
    plain = _plain_rows(paired)
    names = ("benchmark", "protocol", "reference", "method", "label", "apart", "note")
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in plain:
        groups.setdefault(tuple(row[name] for name in names), {})[row["metric"]] = row
    columns: dict[str, list[Cell]] = {}
    for k, name in enumerate(names[:5]):
        columns[name] = [Cell(group[k] or "") for group in groups]
    for metric, header in HEADERS.items():
        columns[f"Δ {header} [points]"] = [difference(rows[metric], digits) for rows in groups.values()]
    columns["note"] = [Cell(group[-1] or "") for group in groups]
    if [c[:2] for c in columns["Δ FAA [points]"]] == [c[:2] for c in columns["Δ pooled [points]"]]:
        del columns["Δ pooled [points]"]
    return _table(columns, [group[5] for group in groups], ("protocol", "label", "note"))


def number(value: float | None, digits: int = 0) -> str:
    """A number with thousands separated; a dash for None; never -0.0."""
    return "–" if value is None else f"{round(value, digits) + 0.0:,.{digits}f}"


def csv_text(lines: Iterable[Iterable[object]]) -> str:
    """Lines as CSV, None empty."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def _table(columns: dict[str, list[Cell]], blocks: list[str | None], optional: Sequence[str]) -> Table:
    for header in optional:
        if not any(cell.main for cell in columns[header]):
            del columns[header]
    return Table(list(columns), [list(row) for row in zip(*columns.values(), strict=True)], blocks)


def _plain_rows(summary: Rows) -> list[Mapping[str, Any]]:
    if isinstance(summary, Sequence):
        return list(summary)
    plain = summary.astype(object).where(summary.notna(), None)
    return [{str(key): value for key, value in row.items()} for row in plain.to_dict("records")]


def per_cent(row: Mapping[str, Any], metric: str, digits: int = 1) -> Cell:
    """A metric of a summary's row: ``45.1 ± 0.3 (5)``, or ``45.1 ± – (1)``: one run has no deviation."""
    mean, std = row[f"{metric}_mean"], row[f"{metric}_std"]
    if mean is None:
        return Cell("–")
    deviation = number(None if std is None else 100 * std, digits)
    bold = metric in (row["best"] or "").split()
    return Cell(f"{number(100 * mean, digits)} ± {deviation}", f" ({row[f'{metric}_n']})", bold)


def difference(row: Mapping[str, Any], digits: int = 1) -> Cell:
    """A paired row: ``+14.5 [12.1, 16.9] (3)``, or ``+14.5 (1)``: one pair has no interval."""
    mean, low, high = (None if row[k] is None else 100 * row[k] for k in ("difference_mean", "low", "high"))
    if mean is None:
        return Cell("–")
    text = f"{round(mean, digits) + 0.0:+.{digits}f}"
    if low is not None:
        text += f" [{number(low, digits)}, {number(high, digits)}]"
    return Cell(text, f" ({row['n']})", bool(row["excludes_zero"]))


def _headings(table: Table) -> list[str | None]:
    """What stands above each row, if anything: a block's name, also where the next benchmark's begins.

    Where those that compete follow another benchmark's that do not, the benchmark itself, and what sets its protocol
    apart, is the heading.
    """
    where = [table.header.index(name) for name in ("benchmark", "protocol") if name in table.header]
    headings: list[str | None] = []
    before: tuple[str | None, list[str]] = (None, [])
    for row, block in zip(table.rows, table.blocks, strict=True):
        data = [row[k].main for k in where]
        changed = block != before[0] or (block is not None and data != before[1])
        headings.append((block or ", ".join(filter(None, data))) if changed else None)
        before = block, data
    return headings


def _csv(table: Table) -> str:
    apart = any(table.blocks)
    lines = [["apart", *table.header] if apart else table.header]
    for row, block in zip(table.rows, table.blocks, strict=True):
        texts = [_csv_text(cell, name in _TEXTS) for name, cell in zip(table.header, row, strict=True)]
        lines.append([block or "", *texts] if apart else texts)
    return csv_text(lines)


def _csv_text(cell: Cell, is_text: bool) -> str:
    """Nothing for a dash, no commas in plain numbers."""
    if cell.main == "–":
        return ""
    plain = not is_text and re.fullmatch(r"-?[\d,]+(\.\d+)?", cell.main)
    return (cell.main.replace(",", "") if plain else cell.main) + cell.tail


def _markdown(table: Table) -> str:
    def text(cell: Cell) -> str:
        main = " ".join(cell.main.split()).replace("|", "\\|")
        return (f"**{main}**" if cell.bold else main) + cell.tail

    cells = [[text(cell) for cell in row] for row in table.rows]
    lines: list[list[str]] = []
    for row, heading in zip(cells, _headings(table), strict=True):
        if heading is not None:
            lines.append([text(Cell(f"*{heading}*")), *[""] * (len(row) - 1)])
        lines.append(row)
    widths = [max(3, *(len(line[k]) for line in (table.header, *lines))) for k in range(len(table.header))]
    left = [name in _TEXTS for name in table.header]
    rules = ["-" * w if is_left else "-" * (w - 1) + ":" for w, is_left in zip(widths, left, strict=True)]
    aligned = [
        [c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(line, widths, left, strict=True)]
        for line in (table.header, *lines)
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in [aligned[0], rules, *aligned[1:]])


def _latex(table: Table) -> str:
    columns = "".join("l" if name in _TEXTS else "r" for name in table.header)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(_latex_text(name) for name in table.header) + r" \\", r"\midrule"]
    for row, heading in zip(table.rows, _headings(table), strict=True):
        if heading is not None:
            lines += [r"\addlinespace", rf"\multicolumn{{{len(row)}}}{{l}}{{\emph{{{_latex_text(heading)}}}}} \\"]
        lines.append(" & ".join(_latex_cell(cell) for cell in row) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_cell(cell: Cell) -> str:
    if not cell.tail:
        return _latex_text(cell.main)
    math = cell.main.replace(" ± –", "").replace("±", r"\pm").replace(" [", r"\;[")
    return (rf"$\mathbf{{{math}}}$" if cell.bold else f"${math}$") + cell.tail


def _latex_text(text: str) -> str:
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
    named["Δ"] = r"$\Delta$"
    words = re.sub(r"[\\~^&%$#_{}–Δ]", lambda match: named.get(match[0], "\\" + match[0]), " ".join(text.split()))
    return re.sub(r"^\[", "{[}", words)  # after `\\`, it would be an optional argument
