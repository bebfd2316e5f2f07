"""Result records -> tables, as pure functions: the same records give the same bytes in any order.

``*_rows`` give plain rows and need the standard library only, so that ``fmlora table`` answers at once; ``*_frame``
give the same as pandas. Accuracies are fractions, drawn in per cent by :func:`render` alone.

Runs are averaged only within one protocol (equal benchmark, backbone and training configuration, data and weights), one
method, one set of method options and one label. Failed runs are listed in the runs and never averaged.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

from avalanche_fmlora.results.record import Cost, Metrics, Record, order_key, run_id, write_atomically

if TYPE_CHECKING:
    import pandas as pd

Row: TypeAlias = dict[str, Any]
Format: TypeAlias = Literal["csv", "markdown", "latex"]

METRICS = tuple(Metrics.__annotations__)
_COSTS = tuple(Cost.__annotations__)
_PARAMETERS = ("trainable_parameters", "stored_parameters", "head_parameters")
_RUN = ("id", "benchmark", "protocol_id", "method", "label", "seed", "class_order_seed")
_MEANS = (*_PARAMETERS, "train_s", "eval_s", "peak_memory_bytes")

_TIMES = ("started_at", "finished_at")
_CHOSEN = ("experience", "name", "rank", "ranks_per_layer", "complexity", "similarity")
_STATISTICS = tuple(f"{metric}_{part}" for metric in METRICS for part in ("mean", "std", "n"))

RUN_COLUMNS = (*_RUN, "status", "error", "n_experiences", *METRICS, "rank", *_PARAMETERS, *_COSTS, *_TIMES)
MATRIX_COLUMNS = (*_RUN, "trained_on", "evaluated_on", "accuracy")
RANK_COLUMNS = (*_RUN, *_CHOSEN, *_PARAMETERS, "train_s", "eval_s")
SUMMARY_COLUMNS = (
    *("benchmark", "protocol", "protocol_id", "method", "label", "n"),
    *_STATISTICS,
    *(f"{name}_mean" for name in _MEANS),
    "note",
)

_INTEGERS = {"seed", "class_order_seed", "n_experiences", "rank", "trained_on", "evaluated_on", "experience", "n"}
_INTEGERS |= {*_PARAMETERS, "peak_memory_bytes", *(f"{metric}_n" for metric in METRICS)}
_TEXTS = {"id", "benchmark", "protocol", "protocol_id", "method", "label", "status", "error", "name", "ranks_per_layer"}
_TEXTS |= {"started_at", "finished_at", "note"}


class _Run(NamedTuple):
    """A record with what names its row among all records; `key` is equal for runs that may be averaged."""

    record: Record
    key: tuple[str, str, str, str, str]
    protocol: str
    protocol_id: str
    label: str | None

    @property
    def pair(self) -> tuple[int | None, int]:
        return self.record["config"]["class_order_seed"], self.record["config"]["seed"]

    @property
    def finished(self) -> bool:
        return self.record["status"] == "finished"

    def columns(self) -> Row:
        config = self.record["config"]
        values = (self.record["id"], benchmark_name(self.record), self.protocol_id, config["method"], self.label)
        return dict(zip(_RUN, (*values, config["seed"], config["class_order_seed"]), strict=True))


def runs_rows(records: Iterable[Record]) -> list[Row]:
    """A row a run, failed ones too: metrics, rank and parameters after the last experience, costs.

    ``protocol_id`` is equal for runs that may be compared; ``label`` is the label of the run and the method options in
    which it differs from other runs of its method on its benchmark.
    """
    return [_run_row(run) for run in _runs(records)]


def matrix_rows(records: Iterable[Record]) -> list[Row]:
    """Accuracy matrices of finished runs in long form: a row for each known entry, experiences counted from 0."""
    return [
        run.columns() | {"trained_on": t, "evaluated_on": i, "accuracy": accuracy}
        for run in _runs(records)
        if run.finished
        for t, row in enumerate(run.record["accuracy_matrix"])
        for i, accuracy in enumerate(row)
        if accuracy is not None
    ]


def ranks_rows(records: Iterable[Record]) -> list[Row]:
    """A row for each experience of each finished run; ``ranks_per_layer`` is a JSON list."""
    rows = []
    for run in _runs(records):
        for experience in run.record["experiences"] if run.finished else ():
            per_layer = experience["ranks_per_layer"]
            row = {**run.columns(), **experience}
            row["ranks_per_layer"] = None if per_layer is None else json.dumps(per_layer)
            rows.append({column: row[column] for column in RANK_COLUMNS})
    return rows


def summary_rows(records: Iterable[Record]) -> list[Row]:
    """A row for each benchmark, protocol, method and label: mean, standard deviation (n - 1) and n of each metric.

    ``protocol`` names the fields in which several protocols of one benchmark differ; ``note`` names the class orders
    (and seeds) that other methods of the same protocol have and this one lacks. Where all runs failed, n is 0.
    """
    runs = _runs(records)
    groups: dict[tuple[str, ...], list[_Run]] = {}
    for run in runs:
        groups.setdefault(run.key, []).append(run)
    rows = []
    for group in groups.values():
        finished, first = [run for run in group if run.finished], group[0]
        flat = [_run_row(run) for run in finished]
        row: Row = {"protocol": first.protocol or None, "n": len(finished)}
        for metric in METRICS:
            row |= {f"{metric}_{part}": value for part, value in _statistics([r[metric] for r in flat]).items()}
        row |= {f"{name}_mean": _statistics([r[name] for r in flat])["mean"] for name in _MEANS}
        row["note"] = _note(group, {run.pair for run in runs if run.protocol_id == first.protocol_id})
        rows.append({column: (first.columns() | row)[column] for column in SUMMARY_COLUMNS})
    names = ("benchmark", "protocol", "method", "label")
    return sorted(rows, key=lambda row: [_natural(row[name] or "") for name in names])


def runs_frame(records: Iterable[Record]) -> pd.DataFrame:
    """:func:`runs_rows` as pandas."""
    return _frame(runs_rows(records), RUN_COLUMNS)


def matrix_frame(records: Iterable[Record]) -> pd.DataFrame:
    """:func:`matrix_rows` as pandas."""
    return _frame(matrix_rows(records), MATRIX_COLUMNS)


def ranks_frame(records: Iterable[Record]) -> pd.DataFrame:
    """:func:`ranks_rows` as pandas."""
    return _frame(ranks_rows(records), RANK_COLUMNS)


def summary_frame(records: Iterable[Record]) -> pd.DataFrame:
    """:func:`summary_rows` as pandas."""
    return _frame(summary_rows(records), SUMMARY_COLUMNS)


def write_csvs(records: Iterable[Record], folder: str | Path) -> dict[str, Path]:
    """Write ``runs.csv``, ``matrix.csv``, ``ranks.csv`` and ``summary.csv``, each atomically; missing values are empty.

    Returns:
        The path of each, under ``"runs"``, ``"matrix"``, ``"ranks"`` and ``"summary"``.
    """
    records = list(records)
    tables = {
        "runs": (RUN_COLUMNS, runs_rows(records)),
        "matrix": (MATRIX_COLUMNS, matrix_rows(records)),
        "ranks": (RANK_COLUMNS, ranks_rows(records)),
        "summary": (SUMMARY_COLUMNS, summary_rows(records)),
    }
    return {
        name: write_atomically(Path(folder) / f"{name}.csv", _csv([columns, *(row.values() for row in rows)]))
        for name, (columns, rows) in tables.items()
    }


def render(summary: Sequence[Mapping[str, Any]] | pd.DataFrame, format: Format = "markdown", digits: int = 1) -> str:
    """Draw a summary as a table to quote: per cent, ``mean ± std (n)``; LaTeX needs ``booktabs``.

    The columns of pooled accuracy, protocol, label and note appear where they say something.

    Args:
        summary: of :func:`summary_rows` or :func:`summary_frame`.
        format: ``"markdown"`` (aligned, for a terminal too), ``"latex"`` or ``"csv"``.
        digits: after the decimal point of per cent.

    Raises:
        ValueError: if the format is unknown.
    """
    if format not in get_args(Format):
        raise ValueError(f"Expected `format` to be one of {list(get_args(Format))} but got {format!r}.")
    rows = _plain_rows(summary)
    columns: dict[str, list[str]] = {}
    for header, name in (("benchmark",) * 2, ("protocol",) * 2, ("method",) * 2, ("label",) * 2):
        columns[header] = [_escape(row[name] or "", format) for row in rows]
    metrics = ("FAA", "pooled", "AAA", "forgetting", "BWT", "learning acc.")
    for header, name in zip(metrics, METRICS, strict=True):
        columns[_escape(f"{header} [%]", format)] = [_per_cent(row, name, format, digits) for row in rows]
    for header, name in (("stored params", "stored_parameters_mean"), ("train [s]", "train_s_mean")):
        columns[header] = [_number(row[name], format, int(header == "train [s]")) for row in rows]
    columns["note"] = [_escape(row["note"] or "", format) for row in rows]
    faa, pooled = (columns[_escape(f"{header} [%]", format)] for header in metrics[:2])
    if faa == pooled:
        del columns[_escape("pooled [%]", format)]
    for header in ("protocol", "label", "note"):
        if not any(columns[header]):
            del columns[header]
    lines = [list(columns), *(list(line) for line in zip(*columns.values(), strict=True))]
    return {"csv": _csv, "markdown": _markdown, "latex": _latex}[format](lines)


def benchmark_name(record: Record) -> str:
    """What to call the data in a table: the name of the user's folder or archive, where there is one."""
    benchmark = record["config"]["benchmark"]
    path = benchmark.get("path")
    return PurePath(path).stem if path else str(benchmark["name"])


def _runs(records: Iterable[Record]) -> list[_Run]:
    """Records in their stable order, each with its protocol and label."""
    ordered = sorted(records, key=order_key)
    ids = [record["id"] for record in ordered]
    if len(set(ids)) < len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise ValueError(f"Expected each run once but got {twice} more than once: leave the copies out.")
    protocols = _protocols(ordered)
    families: dict[tuple[str, str, str | None], list[Row]] = {}
    for record in ordered:
        families.setdefault(_family(record), []).append(_flat(record["config"]["method_options"]))
    varying = {family: _varying(options) for family, options in families.items()}
    runs = []
    for record, (text, identity) in zip(ordered, protocols, strict=True):
        config = record["config"]
        options = _shown(_flat(config["method_options"]), varying[_family(record)])
        key = (benchmark_name(record), identity, config["method"], config["label"] or "")
        label = " ".join(filter(None, (config["label"], options)))
        runs.append(_Run(record, (*key, _canonical(config["method_options"])), text, identity, label or None))
    return runs


def _run_row(run: _Run) -> Row:
    record, experiences = run.record, run.record["experiences"]
    last: Mapping[str, object] = experiences[-1] if experiences else {}
    facts: Row = {**record["metrics"], **record["cost"], **{name: last.get(name) for name in ("rank", *_PARAMETERS)}}
    facts |= {**record, **run.columns(), "n_experiences": len(record["benchmark"]["experience_names"])}
    return {column: facts[column] for column in RUN_COLUMNS}


def _family(record: Record) -> tuple[str, str, str | None]:
    """Runs of one family are told apart by their method options."""
    config = record["config"]
    return benchmark_name(record), config["method"], config["label"]


def _protocols(records: Sequence[Record]) -> list[tuple[str, str]]:
    """For each record the fields in which its protocol differs from others of its benchmark, and the protocol's id."""
    settings = [_settings(record) for record in records]
    found = [settings[k] | _found(record) for k, record in enumerate(records)]
    # A run that failed early knows nothing of data and weights: it belongs where its settings belong.
    finished = [k for k, record in enumerate(records) if record["status"] == "finished"]
    measured = {_canonical(settings[k]): found[k] for k in reversed(finished)}
    facts = [
        fact if record["status"] == "finished" else measured.get(_canonical(own), own)
        for record, own, fact in zip(records, settings, found, strict=True)
    ]
    names = [benchmark_name(record) for record in records]
    varying: dict[str, set[str]] = {}
    for name in set(names):
        same = [k for k, other in enumerate(names) if other == name]
        enough = len({_canonical(settings[k]) for k in same}) == len({_canonical(facts[k]) for k in same})
        varying[name] = _varying([(settings if enough else facts)[k] for k in same])
    return [(_shown(fact, varying[name]), run_id(fact)[:8]) for fact, name in zip(facts, names, strict=True)]


def _settings(record: Record) -> Row:
    """What the configuration says of the protocol, flat: ``{"training.epochs": 5, ...}``."""
    own = ("method", "method_options", "seed", "class_order_seed", "label")
    return _flat({key: value for key, value in record["config"].items() if key not in own})


def _found(record: Record) -> Row:
    """What the run found: data and weights."""
    benchmark: Mapping[str, object] = record["benchmark"]
    data = {key: benchmark[key] for key in ("kind", "image_size", "split_hash", "mean", "std")}
    data["n_experiences"] = len(record["benchmark"]["experience_names"])
    return _flat({"data": data, "weights": record["backbone"]})


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Row:
    flat: Row = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _varying(rows: Sequence[Row]) -> set[str]:
    """The keys that aren't there with the same value in every row."""
    keys = {key for row in rows for key in row}
    return {key for key in keys if len({_canonical(row[key]) if key in row else None for row in rows}) > 1}


def _shown(row: Row, keys: set[str]) -> str:
    """``key=value key=value`` for those of `keys` that the row has; hashes cut short."""
    texts = {key: row[key] if isinstance(row[key], str) else _canonical(row[key]) for key in sorted(keys & row.keys())}
    return " ".join(f"{key}={text[:12] if re.fullmatch('[0-9a-f]{64}', text) else text}" for key, text in texts.items())


def _statistics(values: Sequence[float | None]) -> dict[str, float | int | None]:
    known = [value for value in values if value is not None]
    n = len(known)
    mean = math.fsum(known) / n if n else None
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (n - 1)) if mean is not None and n > 1 else None
    return {"mean": mean, "std": std, "n": n}


def _note(group: Sequence[_Run], wanted: set[tuple[int | None, int]]) -> str | None:
    """Which pairs of (class order, seed) of `wanted` the finished runs of `group` lack, and which of these failed."""
    have = {run.pair for run in group if run.finished}
    failed = {run.pair for run in group if not run.finished}
    orders: list[str] = []
    seeds: list[str] = []
    by_order = {order: sorted(s for o, s in wanted - have if o == order) for order, _ in wanted - have}
    for order in sorted(by_order, key=lambda o: -1 if o is None else o):
        mark = " (failed)" if all((order, seed) in failed for seed in by_order[order]) else ""
        if any(o == order for o, _ in have):
            seeds.append(f"{', '.join(map(str, by_order[order]))} of class order {order}{mark}")
        else:
            orders.append(f"{order}{mark}")
    notes = [f"missing class orders: {', '.join(orders)}"] if orders else []
    notes += [f"missing seeds: {', '.join(seeds)}"] if seeds else []
    return "; ".join(notes) or None


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Sorts ``rank=4`` before ``rank=16``."""
    parts = re.split(r"(\d+)", text)
    return [(0, float(part), "") if part.isdigit() else (1, 0.0, part) for part in parts]


def _frame(rows: Sequence[Row], columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    dtypes = {c: "Int64" if c in _INTEGERS else "object" if c in _TEXTS else "float64" for c in columns}
    frame: pd.DataFrame = pd.DataFrame(rows, columns=list(columns), dtype=object).astype(dtypes)
    return frame


def _plain_rows(summary: Sequence[Mapping[str, Any]] | pd.DataFrame) -> list[Mapping[str, Any]]:
    if isinstance(summary, Sequence):
        return list(summary)
    plain = summary.astype(object).where(summary.notna(), None)
    return [{str(key): value for key, value in row.items()} for row in plain.to_dict("records")]


def _per_cent(row: Mapping[str, Any], metric: str, format: Format, digits: int) -> str:
    """``45.1 ± 0.3 (5)``, or ``45.1 ± – (1)``: one run has no deviation."""
    mean, std = row[f"{metric}_mean"], row[f"{metric}_std"]
    if mean is None:
        return _number(None, format)
    drawn = _number(100 * mean, format, digits)
    deviation = None if std is None else _number(100 * std, format, digits)
    n = row[f"{metric}_n"]
    if format == "latex":
        return f"${drawn}$ ({n})" if deviation is None else rf"${drawn} \pm {deviation}$ ({n})"
    return f"{drawn} ± {deviation or '–'} ({n})"


def _number(value: float | None, format: Format, digits: int = 0) -> str:
    """A number with thousands separated (not in CSV); missing: empty in CSV, a dash elsewhere; never -0.0."""
    if value is None:
        return {"csv": "", "markdown": "–", "latex": "--"}[format]
    return f"{round(value, digits) + 0.0:{'' if format == 'csv' else ','}.{digits}f}"


def _escape(text: str, format: Format) -> str:
    text = " ".join(text.split())
    if format == "markdown":
        return text.replace("|", "\\|")
    if format == "latex":
        named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
        return re.sub(r"[\\~^&%$#_{}]", lambda match: named.get(match[0], "\\" + match[0]), text)
    return text


def _csv(lines: Iterable[Iterable[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def _left(header: str) -> bool:
    return header in ("benchmark", "protocol", "method", "label", "note")


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    header = lines[0]
    widths = [max(3, *(len(line[k]) for line in lines)) for k in range(len(header))]
    rules = ["-" * w if _left(name) else "-" * (w - 1) + ":" for name, w in zip(header, widths, strict=True)]
    cells = [
        [c.ljust(w) if _left(name) else c.rjust(w) for c, name, w in zip(line, header, widths, strict=True)]
        for line in lines
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in [cells[0], rules, *cells[1:]])


def _latex(lines: Sequence[Sequence[str]]) -> str:
    columns = "".join("l" if _left(name) else "r" for name in lines[0])
    header, *body = (" & ".join(line) + r" \\" for line in lines)
    parts = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*parts, r"\end{tabular}"]) + "\n"
