"""Which runs belong together: equal protocol, method, method options and label. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple, TypeAlias

from avalanche_fmlora.results.schema import Record, order_key, run_id

Row: TypeAlias = dict[str, Any]
Pair: TypeAlias = tuple["int | None", int]

_NO_SUCH_PART = "no such part"
JOINT = "all data at once (upper bound)"
STATISTICS = "stores statistics of past data"
BLOCKS = (None, STATISTICS, JOINT)
"""What is beside what in a table, from top to bottom: those that compete first."""


class Run(NamedTuple):
    """A record with what names its row among all records; `key` is equal for runs that may be averaged.

    `order` is the class order's number; where several numbers of one protocol draw the same order, the lowest of them.
    """

    record: Record
    key: tuple[str, str, str, str, str]
    protocol: str
    protocol_id: str
    label: str | None
    order: int | None

    @property
    def pair(self) -> Pair:
        """Class order and seed."""
        return self.order, self.record["config"]["seed"]

    @property
    def repeats(self) -> bool:
        """Whether a lower number draws the same order, as happens where there are few domains."""
        return self.order != self.record["config"]["class_order_seed"]

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return self.record["status"] == "finished"

    @property
    def benchmark(self) -> str:
        """What to call the data."""
        return benchmark_name(self.record)

    @property
    def name(self) -> str:
        """Method and label, or the label alone if it begins with the method's name and says more."""
        method = self.record["config"]["method"]
        label = self.label or ""
        return label if label.startswith(method) and label != method else f"{method} {label}".rstrip()

    @property
    def apart(self) -> str | None:
        """Why this run doesn't compete with the others, if it doesn't."""
        trained = [row["name"] for row in self.record["experiences"]]
        if trained == ["all"] != self.record["benchmark"]["experience_names"]:
            return JOINT
        stored = any(row.get("stored_statistics") for row in self.record["experiences"])
        return STATISTICS if stored else None


def benchmark_name(record: Record) -> str:
    """What to call the data in a table: the user's own images by their folder, a part of a data set as such."""
    benchmark = record["config"]["benchmark"]
    name = str(benchmark["name"])
    if name == "image_folder" and benchmark.get("path"):
        return re.sub(r"\.zip$", "", PurePath(benchmark["path"]).name, flags=re.IGNORECASE)
    return f"{name} (subset)" if benchmark.get("subset") else name


BEFORE: Row = {
    "pooling": "model",
    "recurring_rows": "trained",
    "transport_samples": 0,
    "whitening": None,
    "whitening_covariance": "current",
}
"""Options that records of earlier versions do not name, with what all their runs had."""


def runs_of(records: Iterable[Record]) -> list[Run]:
    """Records in their stable order, each with its protocol and label.

    Raises:
        ValueError: if a run is there twice.
    """
    ordered = sorted(records, key=order_key)
    ids = [record["id"] for record in ordered]
    if len(set(ids)) < len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise ValueError(f"Expected each run once but got {twice} more than once: leave the copies out.")
    facts = _joined_facts(ordered)
    options = [_options(record, fact) for record, fact in zip(ordered, facts, strict=True)]
    protocols = _protocols(ordered, facts)
    identities = [identity for _, identity in protocols]
    varying = _telling(ordered, options, [_family(record) for record in ordered])
    trained = _telling(ordered, [_settings(record) for record in ordered], identities)
    first = _first_numbers(ordered, identities)
    runs = []
    for k, (record, own, (text, identity), order) in enumerate(zip(ordered, options, protocols, first, strict=True)):
        config = record["config"]
        key = (benchmark_name(record), identity, config["method"], config["label"] or "", _canonical(own))
        shown = varying[k] | set(filter(_is_training, trained[k]))
        label = " ".join(filter(None, (config["label"], _shown(own, shown))))
        runs.append(Run(record, key, text, identity, label or None, order))
    return runs


def groups_of(records: Iterable[Record]) -> list[list[Run]]:
    """Runs that may be averaged, together; failed ones too. Of several of one order and seed a finished one counts."""
    groups: dict[tuple[str, ...], dict[Pair, Run]] = {}
    for run in runs_of(records):
        group = groups.setdefault(run.key, {})
        if run.pair not in group or (run.finished and not group[run.pair].finished):
            group[run.pair] = run
    return [list(group.values()) for group in groups.values()]


def protocols_of(records: Iterable[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """Records that may be compared, together, under (benchmark, id of the protocol, what sets it apart)."""
    protocols: dict[tuple[str, str, str], list[Record]] = {}
    for run in runs_of(records):
        protocols.setdefault((run.benchmark, run.protocol_id, run.protocol), []).append(run.record)
    return protocols


def apart_of(group: Sequence[Run]) -> str | None:
    """Why the runs of a group don't compete with other methods, if they don't."""
    return next((run.apart for run in group if run.apart), None)


def row_order(row: Row) -> tuple[list[tuple[int, float, str]] | int, ...]:
    """Sorts the rows of a table: benchmark, protocol, block, method, label."""
    benchmark, protocol, method, label = (
        natural(row[key] or "") for key in ("benchmark", "protocol", "method", "label")
    )
    return benchmark, protocol, BLOCKS.index(row["apart"]), method, label


def flat(mapping: Mapping[str, Any], prefix: str = "") -> Row:
    """Nested mappings as one with dotted keys: ``{"training.epochs": 5}``."""
    row: Row = {}
    for key, value in mapping.items():
        row |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return row


def natural(text: str) -> list[tuple[int, float, str]]:
    """Sorts ``rank=4`` before ``rank=16``."""
    parts = re.split(r"(\d+)", text)
    return [(0, float(part), "") if part.isdecimal() else (1, 0.0, part) for part in parts]


def _first_numbers(records: Sequence[Record], protocols: Sequence[str]) -> list[int | None]:
    """Of each record the lowest number of a class order that, in its protocol, gives the same experiences.

    A run that failed before its data were there knows no order and keeps its own number.
    """
    drawn = []
    for record, protocol in zip(records, protocols, strict=True):
        data, number = record["benchmark"], record["config"]["class_order_seed"]
        known = data["class_order"] and data["experience_names"]
        drawn.append(
            (_canonical([protocol, data["class_order"], data["experience_names"]] if known else number), number)
        )
    numbers: dict[str, list[int | None]] = {}
    for name, number in drawn:
        numbers.setdefault(name, []).append(number)
    return [min(numbers[name], key=lambda o: -1 if o is None else o) for name, _ in drawn]


def _family(record: Record) -> tuple[str, str, str | None]:
    """Runs of one family are told apart by their options."""
    config = record["config"]
    return benchmark_name(record), config["method"], config["label"]


def _options(record: Record, facts: Row) -> Row:
    """Method options, flat, and the training configuration where the protocol leaves it free.

    A seed of the method's own counts only where it is other than the run's: runs of several seeds are averaged.
    """
    own = {**BEFORE, **flat(record["config"]["method_options"])}
    if own.get("seed") == record["config"]["seed"]:
        del own["seed"]
    settings = _settings(record)
    return own | {key: value for key, value in settings.items() if _is_training(key) and facts.get(key) != value}


def _joined_facts(records: Sequence[Record]) -> list[Row]:
    """The protocol of each record; a labelled run takes part in that of the others though it trains otherwise.

    Its label says that the difference is meant: a longer training of one method, say. Where the others train in several
    ways, it is not clear whose part it would be, so it stays by itself.
    """
    facts = _facts(records)
    usual: dict[tuple[str, str], list[Row]] = {}
    for record, fact in zip(records, facts, strict=True):
        ways = usual.setdefault((benchmark_name(record), _canonical(_without_training(fact))), [])
        way = {key: value for key, value in fact.items() if _is_training(key)}
        if record["config"]["label"] is None and way not in ways:
            ways.append(way)
    joined = []
    for record, fact in zip(records, facts, strict=True):
        ways = usual[benchmark_name(record), _canonical(_without_training(fact))]
        free = record["config"]["label"] is not None and len(ways) < 2
        joined.append({**_without_training(fact), **(ways[0] if ways else {})} if free else fact)
    return joined


def _facts(records: Sequence[Record]) -> list[Row]:
    """Settings, data and weights of each record."""
    settings = [_settings(record) for record in records]
    found = [settings[k] | _found(record) for k, record in enumerate(records)]
    # A run that failed early knows nothing of data and weights: it belongs where its settings belong.
    finished = [k for k, record in enumerate(records) if record["status"] == "finished"]
    measured = {_canonical(settings[k]): found[k] for k in reversed(finished)}
    return [
        fact if record["status"] == "finished" else measured.get(_canonical(own), own)
        for record, own, fact in zip(records, settings, found, strict=True)
    ]


def _protocols(records: Sequence[Record], facts: Sequence[Row]) -> list[tuple[str, str]]:
    """For each record the fields in which its protocol differs from others of its benchmark, and the protocol's id.

    The id begins with a letter, so that no reader of a CSV takes it for a number.
    """
    names = [benchmark_name(record) for record in records]
    settings = [{k: v for k, v in fact.items() if not k.startswith(("data.", "weights."))} for fact in facts]
    rows: list[Row] = list(facts)
    for name in set(names):
        same = [k for k, other in enumerate(names) if other == name]
        if len({_canonical(settings[k]) for k in same}) == len({_canonical(facts[k]) for k in same}):
            for k in same:  # the settings tell them apart: data and weights need not be shown
                rows[k] = settings[k]
    varying = _telling(records, rows, names)
    return [(_shown(fact, keys), f"p{run_id(fact)[:8]}") for fact, keys in zip(facts, varying, strict=True)]


def _settings(record: Record) -> Row:
    """What the configuration says of the protocol, flat: ``{"training.epochs": 5, ...}``."""
    own = ("method", "method_options", "seed", "class_order_seed", "label")
    return flat({key: value for key, value in record["config"].items() if key not in own})


def _found(record: Record) -> Row:
    """What the run found: data and weights."""
    benchmark: Mapping[str, object] = record["benchmark"]
    data = {key: benchmark[key] for key in ("kind", "image_size", "split_hash", "mean", "std")}
    data["n_experiences"] = len(record["benchmark"]["experience_names"])
    return flat({"data": data, "weights": record["backbone"]})


def _is_training(key: str) -> bool:
    return key.startswith("training.")


def _without_training(row: Row) -> Row:
    return {key: value for key, value in row.items() if not _is_training(key)}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _varying(rows: Sequence[Row]) -> set[str]:
    """The keys that aren't there with the same value in every row.

    Where a row has nothing in the place of a part (``rank_selection=null``), the part's own keys do not count for it.
    """
    keys = {key for row in rows for key in row}
    return {key for key in keys if len({_value(row, key) for row in rows} - {_NO_SUCH_PART}) > 1}


def _telling(records: Sequence[Record], rows: Sequence[Row], groups: Sequence[Hashable]) -> list[set[str]]:
    """For each row the keys that tell it from the others of its group.

    What sets a failed run apart is shown with that run alone: finished ones are called as if it weren't there.
    """
    members: dict[Hashable, list[int]] = {}
    for k, group in enumerate(groups):
        members.setdefault(group, []).append(k)
    telling: list[set[str]] = [set() for _ in rows]
    for same in members.values():
        finished = [k for k in same if records[k]["status"] == "finished"] or same
        among = _varying([rows[k] for k in finished])
        for k in same:
            telling[k] = among
        if len(finished) == len(same):
            continue
        known, with_failed = {_canonical(rows[k]) for k in finished}, _varying([rows[k] for k in same])
        for k in same:
            if _canonical(rows[k]) not in known:
                telling[k] = with_failed
    return telling


def _value(row: Row, key: str) -> str | None:
    parts = key.split(".")
    if key not in row and any(".".join(parts[:k]) in row for k in range(1, len(parts))):
        return _NO_SUCH_PART
    return _canonical(row[key]) if key in row else None


def _shown(row: Row, keys: set[str]) -> str:
    """``key=value key=value`` for those of `keys` that the row has; hashes cut short."""
    texts = {key: row[key] if isinstance(row[key], str) else _canonical(row[key]) for key in sorted(keys & row.keys())}
    return " ".join(f"{key}={text[:12] if re.fullmatch('[0-9a-f]{64}', text) else text}" for key, text in texts.items())
