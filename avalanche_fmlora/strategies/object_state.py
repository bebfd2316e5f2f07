"""What Python objects remember between experiences, as plain values: plugins, metrics, caches, random generators.

Values are put back into objects that the same program has built anew, so a file never says which class to make.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from avalanche.evaluation import Metric
from torch import Tensor, nn

_LOG = logging.getLogger(__name__)
_OBJECT, _GENERATOR = "__object__", "__generator__"
_LEFT_OUT: Any = object()


def object_state(
    owner: Any, names: Iterable[str] | None = None, *, tensors: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Values of an object's attributes, and the names of those that have none that could be kept.

    Kept are numbers, strings, None, tensors, containers of them, random generators, and likewise what metrics and
    objects of this package hold. Functions, modules, foreign objects are not.

    Args:
        owner: the object.
        names: of the attributes; None means all.
        tensors: whether tensors count as values. Without them a mapping is kept whole or not at all.
    """
    values = {n: _plain(vars(owner)[n], tensors, (id(owner),)) for n in (vars(owner) if names is None else names)}
    kept = {name: value for name, value in values.items() if value is not _LEFT_OUT}
    return kept, [name for name in values if name not in kept]


def load_object_state(owner: Any, state: Mapping[str, Any]) -> None:
    """Put back what :func:`object_state` gave, into an object that was built in the same way."""
    for name, value in state.items():
        restored = _restored(getattr(owner, name, None), value)
        if restored is not _LEFT_OUT:
            setattr(owner, name, restored)


def plain(value: Any) -> Any:
    """A value as :func:`object_state` keeps it; a container without what can't be kept."""
    return _plain(value, True, ())


def is_ours(value: Any) -> bool:
    """Whether an object has attributes, is no module, and its class is of this package."""
    ours = type(value).__module__.partition(".")[0] == __name__.partition(".")[0]
    return ours and hasattr(value, "__dict__") and not isinstance(value, nn.Module)


def _plain(value: Any, tensors: bool, above: tuple[int, ...]) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone() if tensors else _LEFT_OUT
    if isinstance(value, torch.Generator):
        return {_GENERATOR: value.get_state()}
    if id(value) in above:
        return _LEFT_OUT
    above = (*above, id(value))
    if isinstance(value, Mapping):
        items = {k: _plain(v, tensors, above) for k, v in value.items() if isinstance(k, str | int | float | tuple)}
        kept = {k: v for k, v in items.items() if v is not _LEFT_OUT}
        return kept if tensors or len(kept) == len(value) else _LEFT_OUT
    if type(value) in (list, tuple, set):
        parts = [_plain(v, tensors, above) for v in value]
        return _LEFT_OUT if any(p is _LEFT_OUT for p in parts) else type(value)(parts)
    if Metric in type(value).__mro__ or is_ours(value):
        inner = {name: _plain(v, tensors, above) for name, v in vars(value).items()}
        return {_OBJECT: {name: v for name, v in inner.items() if v is not _LEFT_OUT}}
    return _LEFT_OUT


def _restored(current: Any, saved: Any) -> Any:
    """The saved value, inside of the current one where that is an object or a dict."""
    if isinstance(saved, Mapping) and _GENERATOR in saved:
        if not isinstance(current, torch.Generator):
            return _LEFT_OUT
        current.set_state(saved[_GENERATOR])
        return current
    if isinstance(saved, Mapping) and _OBJECT in saved:
        if not hasattr(current, "__dict__"):
            return _LEFT_OUT
        if Metric in type(current).__mro__ and not _fits(current, saved):
            _LOG.warning(
                "The metric %s makes objects as it goes, which a checkpoint can't make: it starts anew.", current
            )
            return current
        load_object_state(current, saved[_OBJECT])
        return current
    if isinstance(saved, Mapping):
        return _restored_mapping(current if isinstance(current, dict) else {}, saved)
    if isinstance(saved, list | tuple):
        old = current if isinstance(current, list | tuple) and len(current) == len(saved) else [None] * len(saved)
        parts = [_restored(c, s) for c, s in zip(old, saved, strict=True)]
        return _LEFT_OUT if any(p is _LEFT_OUT for p in parts) else type(saved)(parts)
    if isinstance(saved, Tensor) and isinstance(current, Tensor):
        return saved.to(current.device)
    return saved


def _fits(current: Any, saved: Any) -> bool:
    """Whether each saved object has one to go into: half of a metric is worse than a new one."""
    if isinstance(saved, Mapping) and _OBJECT in saved:
        if not hasattr(current, "__dict__"):
            return False
        return all(_fits(getattr(current, name, None), value) for name, value in saved[_OBJECT].items())
    if isinstance(saved, Mapping) and _GENERATOR not in saved:
        held = current if isinstance(current, dict) else {}
        makes = held.default_factory if isinstance(held, defaultdict) else None
        return all(_fits(held[k] if k in held else makes() if makes else None, v) for k, v in saved.items())
    if isinstance(saved, list | tuple):
        old = current if isinstance(current, list | tuple) and len(current) == len(saved) else [None] * len(saved)
        return all(_fits(c, s) for c, s in zip(old, saved, strict=True))
    return True


def _restored_mapping(current: dict[Any, Any], saved: Mapping[Any, Any]) -> dict[Any, Any]:
    for key in [k for k in current if k not in saved]:
        del current[key]
    for key, value in saved.items():
        made = current[key] if key in current or isinstance(current, defaultdict) else None
        restored = _restored(made, value)
        if restored is not _LEFT_OUT:
            current[key] = restored
    return current
