"""The shape of a result record: its keys, its name, what makes one whole. Nothing but the standard library.

A record is a dictionary of the shape :class:`Record`; every key is always there, with None where nothing is known.
:func:`blank_record` makes one to be filled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict, cast

SCHEMA = 1


class Config(TypedDict):
    """What determines a run. ``benchmark`` has at least ``name``; the other parts are the caller's own."""

    method: str
    method_options: dict[str, Any]
    benchmark: dict[str, Any]
    backbone: dict[str, Any]
    training: dict[str, Any]
    seed: int
    class_order_seed: int | None
    label: str | None


class Benchmark(TypedDict):
    """The fields of ``avalanche_fmlora.data.base.BenchmarkInfo``."""

    name: str
    kind: str | None
    experience_names: list[str]
    class_names: list[str]
    class_order: list[int]
    class_order_seed: int | None
    image_size: int | None
    split_hash: str | None
    mean: list[float] | None
    std: list[float] | None
    n_train: list[int]
    n_test: list[int]
    extra: dict[str, Any]


class Backbone(TypedDict):
    """Which weights were used: full timm tag or file name, sha256 of the file, input size [pixels], normalisation."""

    tag: str | None
    sha256: str | None
    image_size: int | None
    mean: list[float] | None
    std: list[float] | None


class Metrics(TypedDict):
    """What ``avalanche_fmlora.metrics.summarize`` returns: fractions, None where undefined."""

    final_average_accuracy: float | None
    pooled_final_accuracy: float | None
    average_anytime_accuracy: float | None
    forgetting: float | None
    backward_transfer: float | None
    learning_accuracy: float | None


class Experience(TypedDict):
    """One experience: what was chosen and what it cost; parameters as counted after it, seconds on it.

    ``trained_parameters`` are those of ``trainable_parameters`` within the chosen rank, ``stored_statistics`` numbers
    kept of past data for training only, ``data_wait_s`` the part of ``train_s`` spent waiting for batches; None in
    records from before they were counted.
    """

    experience: int
    name: str
    rank: int | None
    ranks_per_layer: list[int] | None
    complexity: float | None
    similarity: float | None
    trainable_parameters: int
    trained_parameters: int | None
    stored_parameters: int
    stored_statistics: int | None
    head_parameters: int
    train_s: float
    eval_s: float
    data_wait_s: float | None


class Cost(TypedDict):
    """Cost of the whole run; forward passes and multiply-accumulates (in units of 1e9) are for one image.

    ``data_wait_share`` is the fraction of ``train_s`` spent waiting for batches; on a GPU, whose work goes on
    meanwhile, an upper bound of its idling. None in records from before it was measured.
    """

    train_s: float | None
    eval_s: float | None
    peak_memory_bytes: int | None
    train_images_per_s: float | None
    data_wait_share: float | None
    test_forward_passes: float | None
    train_forward_passes: float | None
    gmacs_per_image: float | None


class Environment(TypedDict):
    """Versions of the packages (None if not installed) and hardware."""

    python: str | None
    torch: str | None
    torchvision: str | None
    timm: str | None
    avalanche: str | None
    avalanche_fmlora: str | None
    platform: str | None
    processor: str | None
    cores: int | None
    threads: int | None
    device: str | None


class Seeds(TypedDict):
    """`seed` draws initial values and batches, `class_order_seed` the order of classes or domains."""

    seed: int
    class_order_seed: int | None


class Record(TypedDict):
    """One run. ``accuracy_matrix`` is R of ``avalanche_fmlora.metrics``, fractions; times are ISO 8601 in UTC."""

    schema: int
    id: str
    status: str
    error: str | None
    config: Config
    benchmark: Benchmark
    backbone: Backbone
    accuracy_matrix: list[list[float | None]]
    metrics: Metrics
    experiences: list[Experience]
    cost: Cost
    environment: Environment
    seeds: Seeds
    started_at: str | None
    finished_at: str | None


_SECTIONS: dict[str, type] = {
    "config": Config,
    "benchmark": Benchmark,
    "backbone": Backbone,
    "metrics": Metrics,
    "cost": Cost,
    "environment": Environment,
    "seeds": Seeds,
}


def run_id(config: Mapping[str, Any]) -> str:
    """Name of a configuration: the first 16 hexadecimal digits of the sha256 of its canonical JSON.

    Keys are sorted and floats written so that they read back bit for bit; 1 and 1.0 differ, lists and tuples do not.
    ``label`` is left out, since it only names rows; whatever else can't change the result (device, threads, cache
    folders) is for the caller to leave out.

    Raises:
        ValueError: if the configuration can't be written as JSON or holds NaN or infinity.

    >>> run_id({"method": "ncm", "seed": 0}) == run_id({"seed": 0, "method": "ncm", "label": "mine"})
    True
    >>> len(run_id({"method": "ncm", "seed": 0}))
    16
    """
    return sha256_of({key: value for key, value in config.items() if key != "label"}, "the configuration")[:16]


def blank_record(config: Mapping[str, Any]) -> Record:
    """A record of `config` with every key, None or empty where a run has to fill it in; status ``failed``.

    A run that breaks down early can thus be written at once, with its error and what is known by then.
    """
    empty: dict[str, Any] = {name: dict.fromkeys(keys_of(section)) for name, section in _SECTIONS.items()}
    for key in ("experience_names", "class_names", "class_order", "n_train", "n_test"):
        empty["benchmark"][key] = []
    empty["benchmark"] |= {"name": config["benchmark"]["name"], "extra": {}}
    empty["benchmark"]["class_order_seed"] = config["class_order_seed"]
    empty |= {"schema": SCHEMA, "id": run_id(config), "status": "failed", "error": "did not run", "config": config}
    empty["seeds"] = {"seed": config["seed"], "class_order_seed": config["class_order_seed"]}
    empty |= {"accuracy_matrix": [], "experiences": [], "started_at": None, "finished_at": None}
    return cast("Record", {key: empty[key] for key in keys_of(Record)})


def order_key(record: Record) -> tuple[str, str, int, int, str]:
    """Sorts records by benchmark, method, class order (None first), seed and id."""
    config = record["config"]
    order = config["class_order_seed"]
    return (config["benchmark"]["name"], config["method"], -1 if order is None else order, config["seed"], record["id"])


def keys_of(section: type) -> tuple[str, ...]:
    """The keys of a part of a record, in order."""
    return tuple(section.__annotations__)


def sha256_of(content: Any, what: str) -> str:
    """sha256 of the canonical JSON: sorted keys, no spaces, ASCII, floats by repr."""
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected {what} to hold only what JSON knows but got: {error}. "
            "Use finite numbers, strings, booleans, None, lists and dictionaries with string keys."
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()


def complete(record: dict[str, Any]) -> dict[str, Any]:
    """Add what records of earlier versions lack, as unknown."""
    rows = record.get("experiences")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict):
            row.setdefault("trained_parameters", None)
            row.setdefault("stored_statistics", None)
            row.setdefault("data_wait_s", None)
    cost = record.get("cost")
    if isinstance(cost, dict):
        cost.setdefault("data_wait_share", None)
    return record


def plain(value: Any) -> Any:
    """Mappings, lists, tuples, arrays and numpy numbers as what JSON knows; non-finite floats as None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def check(record: Mapping[str, Any], what: str) -> None:
    """ValueError with all that is wrong with the shape of a record."""
    problems = list(_key_problems(record)) or list(_value_problems(record))
    if problems:
        raise ValueError(
            f"Expected {what} to have the shape of a result record but {'; '.join(problems)}: "
            "start from `blank_record(config)` and fill it in."
        )


def _key_problems(record: Mapping[str, Any]) -> Iterator[str]:
    for key in keys_of(Record):
        if key not in record:
            yield f"`{key}` is missing"
    for key in record:
        if key not in keys_of(Record):
            yield f"`{key}` is unknown"
    parts = [(name, record.get(name), section) for name, section in _SECTIONS.items() if name in record]
    parts += [(f"experiences[{k}]", part, Experience) for k, part in enumerate(record.get("experiences") or ())]
    for name, part, section in parts:
        for key in keys_of(section):
            if not isinstance(part, Mapping) or key not in part:
                yield f"`{name}.{key}` is missing"
    if isinstance(record.get("config"), Mapping) and "name" not in (record["config"].get("benchmark") or ()):
        yield "`config.benchmark.name` is missing"


def _value_problems(record: Mapping[str, Any]) -> Iterator[str]:
    finished = record["status"] == "finished"
    if record["status"] not in ("finished", "failed"):
        yield f"`status` is {record['status']!r}, neither 'finished' nor 'failed'"
    elif finished is not (record["error"] is None):
        yield f"`error` is {record['error']!r} with status {record['status']!r}"
    if record["id"] != run_id(record["config"]):
        yield f"`id` is {record['id']!r}, not the hash of `config`, {run_id(record['config'])!r}"
    matrix, names = record["accuracy_matrix"], record["benchmark"]["experience_names"]
    if any(len(row) != len(matrix) for row in matrix):
        yield f"`accuracy_matrix` is not square but has rows of {sorted({len(row) for row in matrix})} entries"
    if finished and (not matrix or len(matrix) != len(names)):
        yield f"`accuracy_matrix` has {len(matrix)} rows for {len(names)} experiences"
    if any(value is not None and not 0 <= value <= 1 for row in matrix for value in row):
        yield "`accuracy_matrix` holds values that are not fractions in [0, 1]"
    if finished and not record["experiences"]:
        yield "`experiences` is empty"
