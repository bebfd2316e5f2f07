"""The grid of a comparison: benchmarks × class orders × seeds × points of a grid × methods, all else shared."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from avalanche_fmlora.config import PARTS, RunConfig, instead_of, make_run, merged, read_yaml, set_option
from avalanche_fmlora.results.record import run_id
from avalanche_fmlora.strategies.registry import method as method_class
from avalanche_fmlora.strategies.registry import methods as all_methods

_AXES = ("benchmarks", "methods", "class_order_seeds", "seeds", "grid")
SINGLE = {"method": "methods", "seed": "seeds", "class_order_seed": "class_order_seeds"}
_OWN_AXIS = {**SINGLE, "label": "methods"}


def expand(options: dict[str, Any], flags: Sequence[tuple[str, Any]] = ()) -> list[RunConfig]:
    """Every run of a comparison, each once.

    Args:
        options: fields of a run that all share, and the axes, each of which may be left out (`seed`, `class_order_seed`
            and `method` among the fields are axes of one value):
            `benchmarks`: a list of names, of fields of `benchmark`, of options with a `benchmark` among them, or of
            YAML files with such options; they go before the shared ones, axes too.
            `methods`: names, or mappings with `method` and its options; all if left out.
            `class_order_seeds`, `seeds`: lists; [0] if left out.
            `grid`: field -> list of values, every combination of which is run; fields as in `flags`.
        flags: further (field, value) pairs that go before all, axes too. ``fm_lora.rank`` is for one method; a bare
            option of methods, as ``precision``, is for each that has it.

    Raises:
        ValueError: for an unknown field, an option that no method has, an axis that is no list of values, or that is
            given both as one value and as a list, a flag for a field that `grid` varies, or a `grid` of which two
            points are the same runs.
        FileNotFoundError: for a YAML file that is not there.
    """
    axes = _as_axes({name: value for name, value in flags if name in (*_AXES, *SINGLE)})
    fields = [(name, value) for name, value in flags if name not in (*_AXES, *SINGLE)]
    shared = {**_as_axes(options), **axes}
    if "benchmarks" in shared and any(name in ("benchmark", "benchmark.name") for name, _ in fields):
        raise ValueError("Expected `benchmark` or `benchmarks` but got both: leave one of them out.")
    unique: dict[tuple[str, str | None], RunConfig] = {}  # one run under two labels stays, for `by_id` to say so
    for benchmark in _list(shared, "benchmarks", [{}]):
        own = _as_axes(_benchmark(benchmark))
        merged_options = merged({k: v for k, v in shared.items() if k != "benchmarks"}, own)
        for config in _of_one_benchmark({**merged_options, **axes}, fields):
            unique.setdefault((run_id(config.identity()), config.label), config)
    return list(unique.values())


def _as_axes(options: dict[str, Any]) -> dict[str, Any]:
    """`seed: 3` is `seeds: [3]`, and so on."""
    made = dict(options)
    for single, axis in SINGLE.items():
        if single not in made:
            continue
        if axis in made:
            raise ValueError(f"Expected `{single}` or `{axis}` but got both: leave one of them out.")
        made[axis] = [made.pop(single)]
    return made


def _of_one_benchmark(options: dict[str, Any], fields: list[tuple[str, Any]]) -> Iterator[RunConfig]:
    orders, seeds = _list(options, "class_order_seeds", [0]), _list(options, "seeds", [0])
    points = list(_points(options.get("grid", {})))
    varied = {_place(name): name for name in options.get("grid", {})}
    for name, _ in fields:
        if other := varied.get(_place(name)) or varied.get(_place(name)[1:]):
            raise ValueError(f"`{name}` is given as one value and varied by `grid` (`{other}`): leave one of them out.")
    seen: dict[tuple[Any, ...], Any] = {}
    for order, seed, point in itertools.product(orders, seeds, points):
        shared = {k: copy.deepcopy(v) for k, v in options.items() if k not in _AXES}
        entries = [_entry(e) for e in _list(options, "methods", list(all_methods()))]
        for entry in entries:
            method_class(entry["method"])
        parts_first = sorted([*fields, *point], key=lambda field: field[0].count("."))
        for name, value in parts_first:
            _apply(name, value, shared, entries)
        runs = [
            make_run({**shared, **_joined(shared, entry), "class_order_seed": order, "seed": seed}) for entry in entries
        ]
        same = seen.setdefault((order, seed, *(run_id(run.identity()) for run in runs)), point)
        if same is not point:
            raise ValueError(
                f"`grid` has two points that are the same runs, {dict(same)} and {dict(point)}: leave one out."
            )
        yield from runs


def _place(name: str) -> tuple[str, ...]:
    """What a field sets: its path, in which an option of all methods has no method before it."""
    keys = name.replace("-", "_").split(".")
    return tuple(keys[1:] if keys[0] == "method_options" and keys[1:] else keys)


def _points(grid: Any) -> Iterator[tuple[tuple[str, Any], ...]]:
    if not isinstance(grid, dict):
        raise ValueError(f"Expected `grid` to be a mapping of fields to lists of values but got {grid!r}.")
    for name in grid:
        if name in _OWN_AXIS:
            raise ValueError(f"`{name}` is no field of `grid`: write `{_OWN_AXIS[name]}` beside it.")
    return itertools.product(*([(name, value) for value in _list(grid, name, [])] for name in grid))


def _list(options: dict[str, Any], name: str, default: list[Any]) -> list[Any]:
    value = options.get(name, default)
    value = list(value) if isinstance(value, tuple) else value
    if not isinstance(value, list) or not value:
        raise ValueError(f"Expected `{name}` to be a list with at least one entry but got {value!r}.")
    return value


def _benchmark(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        return read_yaml(Path(entry)) if entry.endswith((".yaml", ".yml")) else {"benchmark": {"name": entry}}
    if isinstance(entry, dict):
        return entry if not entry or "benchmark" in entry else {"benchmark": entry}
    raise ValueError(
        "Expected each of `benchmarks` to be a name, a YAML file, or a mapping of the fields of `benchmark`, "
        f"but got {entry!r}."
    )


def _entry(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"method": entry, "method_options": {}}
    if isinstance(entry, dict) and isinstance(entry.get("method"), str):
        rest = {k: v for k, v in entry.items() if k not in ("method", "label")}
        label = {"label": entry["label"]} if "label" in entry else {}
        return {"method": entry["method"], **label, "method_options": rest}
    raise ValueError(
        f"Expected each of `methods` to be a name, or a mapping with `method` and its options, but got {entry!r}."
    )


def _joined(shared: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    options = shared.get("method_options") or {}
    if not isinstance(options, dict):
        raise ValueError(f"Expected `method_options` to be a mapping of options to values but got {options!r}.")
    return {**entry, "method_options": merged(options, entry["method_options"])}


def _apply(name: str, value: Any, shared: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    first, _, rest = name.replace("-", "_").partition(".")
    if first == "method_options" and rest:
        for entry in entries:
            set_option(entry, name, value)
        return
    if first in RunConfig.model_fields:
        set_option(shared, name, value)
        return
    if part := PARTS.get(name):
        raise ValueError(
            f"`{name}` belongs to `{part}`: write {part}={{{name!r}: {value!r}}}, or `{part}.{name}` as a flag. A "
            "method's own option of that name goes into its entry of `methods`."
        )
    named = [e for e in entries if e["method"] == first]
    takers = named if rest and named else [e for e in entries if first in _fields(e["method"])]
    if not takers:
        hint = instead_of(first, *(entry["method"] for entry in entries))
        raise ValueError(f"No method of this comparison has an option `{name}`: {hint}")
    for entry in takers:
        set_option(entry, f"method_options.{rest if named and rest else name}", value)


def _fields(name: str) -> list[str]:
    return list(method_class(name).config_class.model_fields)
