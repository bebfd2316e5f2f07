"""Records -> plain rows of runs, accuracies, ranks and means. Standard library only, save for intervals.

Runs are averaged only within one protocol (equal benchmark, backbone and training configuration, data and weights), one
method, one set of method options and one label. Failed runs are listed in the runs and never averaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from avalanche_fmlora.results.grouping import Pair, Row, Run, apart_of, groups_of, row_order, runs_of
from avalanche_fmlora.results.paired import METRICS, best, statistics
from avalanche_fmlora.results.schema import Cost, Record

_COSTS = tuple(Cost.__annotations__)
_PARAMETERS = ("trainable_parameters", "stored_parameters", "stored_statistics", "head_parameters")
_RUN = ("id", "benchmark", "protocol_id", "method", "label", "seed", "class_order_seed")
_MEANS = (*_PARAMETERS, "train_s", "eval_s", "peak_memory_bytes")
_TIMES = ("started_at", "finished_at")
_CHOSEN = ("experience", "name", "rank", "ranks_per_layer", "complexity", "similarity")
_STATISTICS = tuple(f"{metric}_{part}" for metric in METRICS for part in ("mean", "std", "n"))

RUN_COLUMNS = (*_RUN, "status", "error", "n_experiences", *METRICS, "rank", *_PARAMETERS, *_COSTS, *_TIMES)
MATRIX_COLUMNS = (*_RUN, "trained_on", "evaluated_on", "accuracy")
RANK_COLUMNS = (*_RUN, *_CHOSEN, "trained_parameters", *_PARAMETERS, "train_s", "eval_s")
SUMMARY_COLUMNS = (
    *("benchmark", "protocol", "protocol_id", "apart", "method", "label", "n"),
    *_STATISTICS,
    *(f"{name}_mean" for name in _MEANS),
    *("best", "note"),
)
INTEGERS = {"seed", "class_order_seed", "n_experiences", "rank", "trained_on", "evaluated_on", "experience", "n"}
INTEGERS |= {*_PARAMETERS, "trained_parameters", "peak_memory_bytes", *(f"{metric}_n" for metric in METRICS)}
TEXTS = {"id", "benchmark", "protocol", "protocol_id", "method", "label", "status", "error", "name", "ranks_per_layer"}
TEXTS |= {"started_at", "finished_at", "note", "apart", "best", "reference", "metric"}


def runs_rows(records: Iterable[Record]) -> list[Row]:
    """A row a run, failed ones too: metrics, rank and parameters after the last experience, costs.

    ``protocol_id`` is equal for runs that may be compared; ``label`` is the label of the run and the method options in
    which it differs from other runs of its method on its benchmark.
    """
    return [_run_row(run) for run in runs_of(records)]


def matrix_rows(records: Iterable[Record]) -> list[Row]:
    """Accuracy matrices of finished runs in long form: a row for each known entry, experiences counted from 0."""
    return [
        _run_columns(run) | {"trained_on": t, "evaluated_on": i, "accuracy": accuracy}
        for run in runs_of(records)
        if run.finished
        for t, row in enumerate(run.record["accuracy_matrix"])
        for i, accuracy in enumerate(row)
        if accuracy is not None
    ]


def ranks_rows(records: Iterable[Record]) -> list[Row]:
    """A row for each experience of each finished run; ``ranks_per_layer`` is a JSON list."""
    rows = []
    for run in runs_of(records):
        for experience in run.record["experiences"] if run.finished else ():
            per_layer = experience["ranks_per_layer"]
            row: Row = {"trained_parameters": None, "stored_statistics": None, **_run_columns(run), **experience}
            row["ranks_per_layer"] = None if per_layer is None else json.dumps(per_layer)
            rows.append({column: row[column] for column in RANK_COLUMNS})
    return rows


def summary_rows(records: Iterable[Record]) -> list[Row]:
    """A row for each benchmark, protocol, method and label: mean, standard deviation (n - 1) and n of each metric.

    ``protocol`` names the fields in which several protocols of one benchmark differ; ``apart`` says why a method does
    not compete with the others; ``best`` names the metrics in which it is better than every other that does, the 95 %
    interval of each paired difference excluding zero; ``note`` names the class orders (and seeds) that other methods of
    the protocol have and this one lacks. Where all runs failed, n is 0.
    """
    groups = groups_of(records)
    protocols: dict[str, list[list[Run]]] = {}
    for group in groups:
        protocols.setdefault(group[0].protocol_id, []).append(group)
    winners = {(identity, m): best(same, m) for identity, same in protocols.items() for m in METRICS}
    rows = []
    for group in groups:
        identity = group[0].protocol_id
        wanted = {run.pair for same in protocols[identity] for run in same if run.finished or same is group}
        row = _summary_row(group, wanted)
        row["best"] = " ".join(m for m in METRICS if winners[identity, m] is group) or None
        rows.append({column: row[column] for column in SUMMARY_COLUMNS})
    return sorted(rows, key=row_order)


def _summary_row(group: Sequence[Run], wanted: set[Pair]) -> Row:
    first, flat = group[0], [_run_row(run) for run in group if run.finished]
    row: Row = _run_columns(first) | {"protocol": first.protocol or None, "n": len(flat), "apart": apart_of(group)}
    for metric in METRICS:
        row |= {f"{metric}_{part}": value for part, value in statistics([r[metric] for r in flat]).items()}
    row |= {f"{name}_mean": statistics([r[name] for r in flat])["mean"] for name in _MEANS}
    return row | {"note": _note(group, wanted)}


def _run_columns(run: Run) -> Row:
    config = run.record["config"]
    values = (run.record["id"], run.benchmark, run.protocol_id, config["method"], run.label)
    return dict(zip(_RUN, (*values, config["seed"], config["class_order_seed"]), strict=True))


def _run_row(run: Run) -> Row:
    record, experiences = run.record, run.record["experiences"]
    last: Mapping[str, object] = experiences[-1] if experiences else {}
    facts: Row = {**record["metrics"], **record["cost"], **{name: last.get(name) for name in ("rank", *_PARAMETERS)}}
    facts |= {**record, **_run_columns(run), "n_experiences": len(record["benchmark"]["experience_names"])}
    return {column: facts[column] for column in RUN_COLUMNS}


def _note(group: Sequence[Run], wanted: set[Pair]) -> str | None:
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
