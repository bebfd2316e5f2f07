"""What a reader of a table should know: mixed protocols, versions and hardware, missing and failed runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from avalanche_fmlora.results.grouping import Pair, Run, groups_of, runs_of
from avalanche_fmlora.results.paired import pair_key
from avalanche_fmlora.results.record import file_name
from avalanche_fmlora.results.schema import Record

_VERSIONS = ("avalanche_fmlora", "torch", "torchvision", "timm", "avalanche", "python")
_HARDWARE = ("processor", "device", "threads")


def remarks(records: Iterable[Record]) -> list[str]:
    """A sentence for each thing that keeps runs from being compared, with the files and how to mend it.

    Runs of several protocols are in rows of their own, never averaged; other versions and other hardware are only told.
    """
    records = list(records)
    protocols: dict[tuple[str, str], list[Run]] = {}
    for run in runs_of(records):
        protocols.setdefault((run.benchmark, run.protocol_id), []).append(run)
    notes = _mixed(protocols)
    for runs in protocols.values():
        notes += _differing(runs)
    notes += repeated_orders(records)
    notes += _twice(records)
    wanted = {key: {run.pair for run in runs if run.finished} for key, runs in protocols.items()}
    for group in groups_of(records):
        notes += _missing(group, wanted[group[0].benchmark, group[0].protocol_id])
    failed = [run for run in runs_of(records) if not run.finished]
    if failed:
        notes.append(
            f"Failed, and in no mean: {_files(failed)}. `fmlora table --csv-to FOLDER` writes their errors into "
            "runs.csv; the same `fmlora compare` with --retry-failed runs them again."
        )
    return notes


def repeated_orders(records: Iterable[Record]) -> list[str]:
    """A sentence for each number of a class order that draws the order of a lower one, as happens with few domains."""
    twins = {
        (run.benchmark, run.record["config"]["class_order_seed"], run.order): None
        for run in runs_of(records)
        if run.repeats
    }
    return [
        f"{benchmark}: class order {number} is {'that given' if first is None else f'class order {first}'} again, so "
        "runs of both count once. Few domains have few orders: give `--class-orders` another number in its place."
        for benchmark, number, first in twins
    ]


def _twice(records: Iterable[Record]) -> list[str]:
    """Finished runs of one order and seed whose records differ in nothing but what earlier versions did not name."""
    counted: dict[tuple[object, ...], Run] = {}
    notes = []
    for run in runs_of(records):
        if not run.finished or run.repeats:
            continue
        first = counted.setdefault((run.key, run.pair), run)
        if first is not run:
            notes.append(
                f"{run.benchmark}: {file_name(run.record)} is the run of {file_name(first.record)}, made by another "
                "version, and is in no mean beside it: delete the one that is not to count."
            )
    return notes


def _mixed(protocols: dict[tuple[str, str], list[Run]]) -> list[str]:
    notes = []
    for name in sorted({benchmark for benchmark, _ in protocols}):
        own = [runs for (benchmark, _), runs in protocols.items() if benchmark == name]
        if len(own) > 1:
            parts = "; ".join(f"{runs[0].protocol or 'without these'} ({_files(runs)})" for runs in own)
            notes.append(
                f"The records of {name} follow {len(own)} protocols, whose runs are neither averaged nor compared with "
                f"each other: {parts}. Keep each in a folder of its own, or give runs that train otherwise on purpose "
                "a `label`."
            )
    return notes


def _differing(runs: Sequence[Run]) -> list[str]:
    notes = []
    finished = [run for run in runs if run.finished]
    for fields, effect in ((_VERSIONS, "results may differ slightly"), (_HARDWARE, "times do not compare")):
        for field in fields:
            by_value: dict[str, list[Run]] = {}
            for run in finished:
                environment: dict[str, object] = dict(run.record["environment"])
                by_value.setdefault(str(environment[field]), []).append(run)
            if len(by_value) > 1:
                parts = "; ".join(f"{value} ({_files(same)})" for value, same in sorted(by_value.items()))
                notes.append(f"{runs[0].benchmark}: several values of {field}, so {effect}: {parts}.")
    return notes


def _missing(group: Sequence[Run], wanted: Set[Pair]) -> list[str]:
    first = group[0]
    own = {run.pair for run in group if run.finished}
    missing = sorted(wanted - own, key=pair_key)
    if not own or not missing:  # with no run that finished there is no mean
        return []
    seeds_of: dict[int | None, list[int | None]] = {}
    for order, seed in missing:
        seeds_of.setdefault(order, []).append(seed)
    orders_of: dict[str, list[int | None]] = {}  # orders that lack the same seeds: one command for them
    for order, seeds in seeds_of.items():
        orders_of.setdefault(_flags(seeds), []).append(order)
    method = first.record["config"]["method"]
    retry = " --retry-failed" if any(run.pair in missing for run in group) else ""
    lacks = "; ".join(f"class order {_flags(orders)} (seed {seeds})" for seeds, orders in orders_of.items())
    commands = " and ".join(
        f"`fmlora compare --methods {method} --class-orders {_flags(orders)} --seeds {seeds}{retry}`"
        for seeds, orders in orders_of.items()
    )
    return [
        f"{first.benchmark}: {first.name} lacks {lacks}, which other methods have, so its mean is over other runs than "
        f"theirs; paired differences use the common ones. Run {commands} with the same configuration and --out."
    ]


def _flags(values: Iterable[int | None]) -> str:
    """As the command line takes them."""
    return ",".join("null" if value is None else str(value) for value in values)


def _files(runs: Sequence[Run]) -> str:
    names = [file_name(run.record) for run in runs]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
