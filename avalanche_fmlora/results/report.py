"""Records -> one HTML page that needs nothing else: tables, figures, configurations, machines, failures."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from avalanche_fmlora.results.figures import as_bytes, draw
from avalanche_fmlora.results.grouping import Run, apart_of, flat, groups_of, protocols_of, runs_of
from avalanche_fmlora.results.paired import paired_rows
from avalanche_fmlora.results.record import file_name
from avalanche_fmlora.results.remarks import remarks
from avalanche_fmlora.results.render import Table, number, paired_table, summary_table
from avalanche_fmlora.results.rows import summary_rows
from avalanche_fmlora.results.schema import Record, order_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = {
    "accuracy": "Accuracy over all experiences seen so far; the band is one standard deviation over runs.",
    "matrix": "Accuracy on each experience (across) after training on each (down), mean over runs.",
    "forgetting": "Forgetting over the experiences, and at the end with its standard deviation.",
    "rank": "Rank chosen for each experience, and against the complexity and similarity it was chosen by.",
    "params": "Final average accuracy against the parameters stored besides backbone and head.",
    "trained": "Final average accuracy against the parameters trained an experience within the rank, without the head.",
    "cost": "Final average accuracy against training time, on the machines below.",
}


class Picture(NamedTuple):
    """A figure as a data address, with what it shows."""

    source: str
    caption: str


class Section(NamedTuple):
    """What the page says of one benchmark and protocol."""

    name: str
    protocol: str
    facts: list[tuple[str, str]]
    summary: Table
    paired: Table | None
    reference: str
    pictures: list[Picture]
    configurations: list[tuple[str, int, str]]


def report_page(records: Sequence[Record], title: str, reference: str | None = None) -> str:
    """A page of all records: the same records give the same page.

    Args:
        records: runs of any benchmarks and protocols, failed ones too.
        title: of the page.
        reference: what paired differences are from, as in ``paired_rows``.

    Raises:
        ValueError: if there is no record, or if no method is called `reference`.
    """
    import jinja2

    if not records:
        raise ValueError("Expected at least one record for a report but got none.")
    if reference is not None:
        paired_rows(records, reference)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("avalanche_fmlora.results", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    ordered = sorted(records, key=order_key)
    failed = [(run, file_name(run.record)) for run in runs_of(ordered) if not run.finished]
    return environment.get_template("report.html.j2").render(
        title=title,
        counts=_counts(ordered),
        remarks=remarks(ordered),
        sections=[_section(*key, own, reference) for key, own in protocols_of(ordered).items()],
        runs=[_run_cells(run) for run in runs_of(ordered)],
        machines=_machines(ordered),
        failed=failed,
    )


def _section(name: str, identity: str, protocol: str, records: list[Record], reference: str | None) -> Section:
    names = {group[0].name for group in groups_of(records)}
    try:
        paired = paired_rows(records, reference)
    except ValueError:  # the reference is a method of another protocol
        paired = paired_rows(records)
    kinds = [kind for kind in CAPTIONS if len(names) > 1 or kind not in ("params", "trained", "cost")]
    return Section(
        name,
        f"{protocol} ({identity})" if protocol else "",
        _facts(records),
        _without(summary_table(summary_rows(records)), "benchmark", "protocol"),
        _without(paired_table(paired), "benchmark", "protocol", "reference") if paired else None,
        paired[0]["reference"] if paired else "",
        [_picture(kind, figure) for kind, figure in draw(records, kinds).items() if not isinstance(figure, str)],
        [_configuration(group) for group in groups_of(records)],
    )


def _without(table: Table, *names: str) -> Table:
    """Leave out columns that say the same in every row of a section."""
    kept = [k for k, name in enumerate(table.header) if name not in names]
    return Table([table.header[k] for k in kept], [[row[k] for k in kept] for row in table.rows], table.blocks)


def _counts(records: Sequence[Record]) -> list[tuple[str, str]]:
    finished = [r for r in records if r["status"] == "finished"]
    times = sorted(time for r in finished for time in (r["started_at"], r["finished_at"]) if time)
    counts = [("runs", f"{len(records)}, of which {len(finished)} finished, {len(records) - len(finished)} failed")]
    counts += [("methods", ", ".join(dict.fromkeys(r["config"]["method"] for r in records)))]
    if times:
        first, last = (time.replace("T", " ").replace("+00:00", "") for time in (times[0], times[-1]))
        counts += [("made", f"{first} to {last} UTC")]
    seconds = sum((r["cost"]["train_s"] or 0) + (r["cost"]["eval_s"] or 0) for r in finished)
    return [*counts, ("time of all runs", f"{seconds / 3600:.2f} h")]


def _facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Data, backbone and training of a protocol."""
    record = next((r for r in records if r["status"] == "finished"), records[0])
    data, backbone, config = record["benchmark"], record["backbone"], record["config"]
    rows: list[tuple[str, Any]] = [
        ("kind", data["kind"]),
        ("experiences", len(data["experience_names"]) or None),
        ("classes", len(data["class_names"]) or None),
        ("images", f"{sum(data['n_train']):,} train, {sum(data['n_test']):,} test" if data["n_test"] else None),
        ("split", data["split_hash"]),
        ("backbone", backbone["tag"]),
        ("sha256 of its weights", backbone["sha256"]),
        ("input", f"{data['image_size']} px, mean {data['mean']}, std {data['std']}" if data["image_size"] else None),
        ("training", ", ".join(f"{key} {value}" for key, value in config["training"].items())),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _configuration(group: Sequence[Run]) -> tuple[str, int, str]:
    """Name, number of runs, and what a run of this row is made with, but for its seeds."""
    config = {key: value for key, value in group[0].record["config"].items() if key not in ("seed", "class_order_seed")}
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in flat(config).items()]
    return group[0].name, len(group), "\n".join(lines)


def _picture(name: str, figure: Figure | str) -> Picture:
    assert not isinstance(figure, str)
    data = base64.b64encode(as_bytes(figure, "svg")).decode()
    return Picture(f"data:image/svg+xml;base64,{data}", CAPTIONS[name])


def _run_cells(run: Run) -> list[str]:
    record = run.record
    config, metrics = record["config"], record["metrics"]
    stored = record["experiences"][-1]["stored_parameters"] if record["experiences"] else None
    accuracies = [metrics["final_average_accuracy"], metrics["average_anytime_accuracy"], metrics["forgetting"]]
    cells = [run.benchmark, run.name + (f" ({apart})" if (apart := apart_of([run])) else ""), record["status"]]
    cells += [str(config["class_order_seed"]), str(config["seed"])]
    cells += [number(None if value is None else 100 * value, 1) for value in accuracies]
    cells += [number(stored), number(record["cost"]["train_s"], 1)]
    memory = record["cost"]["peak_memory_bytes"]
    return [*cells, number(None if memory is None else memory / 1e6), record["id"]]


def _machines(records: Sequence[Record]) -> list[tuple[list[tuple[str, str]], int]]:
    """Each environment with the number of its runs."""
    counts: dict[str, int] = {}
    for record in records:
        text = json.dumps(record["environment"])
        counts[text] = counts.get(text, 0) + 1
    return [
        ([(key, str(value)) for key, value in json.loads(text).items() if value is not None], n)
        for text, n in counts.items()
    ]
