"""Paired differences between methods, with 95 % t-intervals, and what follows from them: who is best.

Two methods are compared on the class orders and seeds that both have. Differences are averaged over the seeds of an
order, since its runs share their data; the interval is over orders, or over seeds where there is one order only. Each
interval is for itself: none is widened for the number of comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from avalanche_fmlora.results.grouping import Pair, Row, Run, apart_of, groups_of, row_order
from avalanche_fmlora.results.schema import Metrics, Record

METRICS = tuple(Metrics.__annotations__)
LOWER_IS_BETTER = frozenset({"forgetting"})
DEFAULT_REFERENCE = "fm_lora"
PAIRED_COLUMNS = (
    *("benchmark", "protocol", "protocol_id", "reference", "method", "label", "apart", "metric"),
    *("difference_mean", "difference_std", "n", "low", "high", "excludes_zero", "note"),
)


class Interval(NamedTuple):
    """Mean and standard deviation (n - 1) of differences, and the 95 % interval of the mean; None where undefined."""

    mean: float | None
    std: float | None
    n: int
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def statistics(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and n of the known values."""
    known = [value for value in values if value is not None]
    n = len(known)
    mean = math.fsum(known) / n if n else None
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (n - 1)) if mean is not None and n > 1 else None
    return {"mean": mean, "std": std, "n": n}


def t_interval(differences: Sequence[float]) -> Interval:
    """The 95 % interval of Student's t for the mean of independent differences.

    >>> t_interval([0.1, 0.2, 0.3]).n
    3
    """
    # Equal results of different sums differ in the last bits, which must not count as a difference.
    found = statistics([round(value, 12) for value in differences])
    mean, std, n = found["mean"], found["std"], found["n"]
    if mean is None or std is None:
        return Interval(mean, std, n, None, None)
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)
    return Interval(mean, std, n, mean - half, mean + half)


def compare(reference: Sequence[Run], other: Sequence[Run], metric: str) -> Interval:
    """``reference - other`` on the class orders and seeds that both have."""
    ours, theirs = known(reference, metric), known(other, metric)
    by_order: dict[int | None, list[float]] = {}
    for order, seed in sorted(ours.keys() & theirs.keys(), key=pair_key):
        by_order.setdefault(order, []).append(ours[order, seed] - theirs[order, seed])
    if len(by_order) == 1:
        return t_interval(next(iter(by_order.values())))
    return t_interval([math.fsum(values) / len(values) for values in by_order.values()])


def best(groups: Sequence[Sequence[Run]], metric: str) -> Sequence[Run] | None:
    """Of groups of one protocol, the one that is better than every other, each paired interval excluding zero.

    Groups that don't compete (joint training, stored statistics) are left aside.
    """
    sign = -1 if metric in LOWER_IS_BETTER else 1
    competing = [group for group in groups if apart_of(group) is None and known(group, metric)]
    if len(competing) < 2:
        return None
    first = max(competing, key=lambda group: sign * (statistics(known(group, metric).values())["mean"] or 0.0))
    for group in competing:
        if group is first:
            continue
        interval = compare(first, group, metric)
        if not interval.excludes_zero or sign * (interval.mean or 0.0) < 0:
            return None
    return first


def paired_rows(records: Iterable[Record], reference: str | None = None) -> list[Row]:
    """A row for each protocol, other method and metric: ``reference - method``, positive where the reference is higher.

    Args:
        records: runs, failed ones too.
        reference: method, label, or both as in ``"fm_lora rank=4"``; by default ``fm_lora`` (without a label, if
            there), else the competing method of the highest final average accuracy.

    Raises:
        ValueError: if no method, or more than one of a protocol, is called so, or none of its runs is finished.
    """
    protocols: dict[str, list[list[Run]]] = {}
    for group in groups_of(records):
        protocols.setdefault(group[0].protocol_id, []).append(group)
    if reference is not None:
        _check_name(reference, [group for groups in protocols.values() for group in groups])
    rows = []
    for groups in protocols.values():
        chosen = _reference(groups, reference)
        if chosen is None:
            continue
        for group in groups:
            if group is not chosen and any(run.finished for run in group):
                rows += [_row(chosen, group, metric) for metric in METRICS]
    return sorted(rows, key=row_order)


def known(group: Sequence[Run], metric: str) -> dict[Pair, float]:
    """A metric by class order and seed, of the finished runs that have it."""
    values = {run.pair: run.record["metrics"][metric] for run in group if run.finished}  # type: ignore[literal-required]
    return {pair: value for pair, value in values.items() if value is not None}


def pair_key(pair: Pair) -> tuple[int, int]:
    """Sorts class orders and seeds, the data's own order first."""
    return (-1 if pair[0] is None else pair[0], pair[1])


def _row(chosen: Sequence[Run], group: Sequence[Run], metric: str) -> Row:
    interval, first = compare(chosen, group, metric), group[0]
    row: Row = {"benchmark": first.benchmark, "protocol": first.protocol or None, "protocol_id": first.protocol_id}
    row |= {"reference": chosen[0].name, "method": first.record["config"]["method"], "label": first.label}
    row |= {"apart": apart_of(group), "metric": metric, "difference_mean": interval.mean}
    row |= {"difference_std": interval.std, "n": interval.n, "low": interval.low, "high": interval.high}
    row |= {"excludes_zero": interval.excludes_zero if interval.low is not None else None}
    row["note"] = _note(chosen, group)
    return {column: row[column] for column in PAIRED_COLUMNS}


def _note(chosen: Sequence[Run], group: Sequence[Run]) -> str | None:
    """Which class orders and seeds only one of both has."""
    ours, theirs = ({run.pair for run in runs if run.finished} for runs in (chosen, group))
    if ours == theirs:
        return None
    common = _orders(ours & theirs) or "none"
    return f"on common class orders and seeds only: {common}; left out: {_orders(ours ^ theirs)}"


def _orders(pairs: set[Pair]) -> str:
    seeds = {seed for _, seed in pairs}
    several = seeds != {0}
    return ", ".join(f"{o}" + (f" (seed {s})" if several else "") for o, s in sorted(pairs, key=pair_key))


def _called(group: Sequence[Run], name: str) -> bool:
    run = group[0]
    return name in (run.name, run.record["config"]["method"], run.label, run.record["config"]["label"])


def _check_name(name: str, groups: Sequence[Sequence[Run]]) -> None:
    there = sorted({group[0].name for group in groups if any(run.finished for run in group)})
    called = [group for group in groups if _called(group, name)]
    if not called:
        raise ValueError(f"Expected the reference to be one of {there} but got {name!r}.")
    if not any(run.finished for group in called for run in group):
        raise ValueError(f"No run of {name!r} is finished: mend and rerun it, or compare with one of {there}.")


def _reference(groups: Sequence[Sequence[Run]], name: str | None) -> Sequence[Run] | None:
    done = [group for group in groups if any(run.finished for run in group)]
    if name is None:
        competing = [group for group in done if apart_of(group) is None]
        ours = [group for group in competing if group[0].record["config"]["method"] == DEFAULT_REFERENCE]
        metric = METRICS[0]
        mean = {id(group): statistics(known(group, metric).values())["mean"] or 0.0 for group in competing}
        plain = [group for group in ours if group[0].label is None]  # not the variant that came out best
        return max(plain or ours or competing, key=lambda group: mean[id(group)], default=None)
    exact = [group for group in done if group[0].name == name]
    found = exact or [group for group in done if _called(group, name)]
    if len(found) > 1:
        raise ValueError(
            f"Expected one method called {name!r} but {sorted(group[0].name for group in found)} are: name one of them."
        )
    return found[0] if found else None
