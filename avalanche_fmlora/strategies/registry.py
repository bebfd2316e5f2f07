"""Methods by name. A method is one file of this folder: its class is found through `register`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from avalanche_fmlora.strategies.base import ContinualStrategy

_METHODS: dict[str, type[ContinualStrategy]] = {}
StrategyT = TypeVar("StrategyT", bound="type[ContinualStrategy]")


def register(strategy: StrategyT) -> StrategyT:
    """Class decorator: make a strategy known by its `method` name.

    Raises:
        ValueError: if another class has that name.
    """
    known = _METHODS.get(strategy.method)
    if known is not None and known.__qualname__ != strategy.__qualname__:
        raise ValueError(f"Expected a new method name but {strategy.method!r} is {known.__qualname__}: choose another.")
    _METHODS[strategy.method] = strategy
    return strategy


def methods() -> dict[str, type[ContinualStrategy]]:
    """All registered methods by name, in alphabetical order."""
    package = importlib.import_module("avalanche_fmlora.strategies")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"avalanche_fmlora.strategies.{module.name}")
    return dict(sorted(_METHODS.items()))


def method(name: str) -> type[ContinualStrategy]:
    """The strategy class of a method.

    Raises:
        ValueError: for an unknown name, with the nearest ones.
    """
    known = methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}."
        raise ValueError(f"There is no method {name!r}: {hint}")
    return known[name]
