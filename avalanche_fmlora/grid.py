"""The grid of a comparison: methods × class orders × seeds, all else shared."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any

from avalanche_fmlora.config import RunConfig, make_run, set_option
from avalanche_fmlora.strategies.registry import method as method_class
from avalanche_fmlora.strategies.registry import methods as all_methods

_AXES = ("methods", "class_order_seeds", "seeds")


def expand(options: dict[str, Any], flags: Sequence[tuple[str, Any]] = ()) -> list[RunConfig]:
    """Every run of a comparison.

    Args:
        options: fields of a run that all share, and `methods` (names, or mappings with `method` and its options; left
            out, the `method` of the fields, or all), `class_order_seeds` and `seeds` (lists; [0] if left out).
        flags: further (field, value) pairs. ``fm_lora.rank`` is for one method; a bare option of methods, as
            ``precision``, is for each that has it.

    Raises:
        ValueError: for an unknown field, or an option that no method has.
    """
    shared = {k: copy.deepcopy(v) for k, v in options.items() if k not in _AXES}
    entries = [_entry(e) for e in _list(options, "methods", _usual_methods(options))]
    for entry in entries:
        method_class(entry["method"])
    for name, value in flags:
        _apply(name, value, shared, entries)
    orders, seeds = _list(options, "class_order_seeds", [0]), _list(options, "seeds", [0])
    return [
        make_run({**shared, **_joined(shared, entry), "class_order_seed": order, "seed": seed})
        for order in orders
        for seed in seeds
        for entry in entries
    ]


def _usual_methods(options: dict[str, Any]) -> list[str]:
    return [options["method"]] if "method" in options else list(all_methods())


def _list(options: dict[str, Any], name: str, default: list[Any]) -> list[Any]:
    value = options.get(name, default)
    if not isinstance(value, list) or not value:
        raise ValueError(f"Expected `{name}` to be a list with at least one entry but got {value!r}.")
    return value


def _entry(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"method": entry, "method_options": {}}
    if isinstance(entry, dict) and isinstance(entry.get("method"), str):
        rest = {k: v for k, v in entry.items() if k not in ("method", "label")}
        return {"method": entry["method"], "label": entry.get("label"), "method_options": rest}
    raise ValueError(
        f"Expected each of `methods` to be a name, or a mapping with `method` and its options, but got {entry!r}."
    )


def _joined(shared: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "method_options": {**shared.get("method_options", {}), **entry["method_options"]}}


def _apply(name: str, value: Any, shared: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    first, _, rest = name.partition(".")
    if first in RunConfig.model_fields:
        set_option(shared, name, value)
        return
    named = [e for e in entries if e["method"] == first]
    takers = named if rest and named else [e for e in entries if first in _fields(e["method"])]
    if not takers:
        known = sorted({f for e in entries for f in _fields(e["method"])} | set(RunConfig.model_fields))
        near = difflib.get_close_matches(first, known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else "`fmlora list METHOD` shows a method's options."
        raise ValueError(f"No method of this comparison has an option `{name}`: {hint}")
    for entry in takers:
        set_option(entry, f"method_options.{rest if named and rest else name}", value)


def _fields(name: str) -> list[str]:
    return list(method_class(name).config_class.model_fields)
