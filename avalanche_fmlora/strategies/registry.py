"""Methods by name: each is one file of this folder, or of a package that names it as an entry point.

Either way its class is found through `register`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import pkgutil
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from avalanche_fmlora.strategies.base import ContinualStrategy

ENTRY_POINTS = "avalanche_fmlora.methods"
_LOG = logging.getLogger(__name__)
_METHODS: dict[str, type[ContinualStrategy]] = {}
StrategyT = TypeVar("StrategyT", bound="type[ContinualStrategy]")


def register(strategy: StrategyT) -> StrategyT:
    """Class decorator: make a strategy known by its `method` name.

    Raises:
        ValueError: if another class has that name, or it has no `method` or `summary` of its own.
    """
    for name, example in (("method", "my_method"), ("summary", "what it does, in one line")):
        if not getattr(strategy, name, None):
            raise ValueError(
                f'Expected {strategy.__name__} to have a `{name}`: write {name}: ClassVar[str] = "{example}" into it.'
            )
    known = _METHODS.get(strategy.method)
    ours, theirs = ((c.__module__, c.__qualname__) if c else None for c in (strategy, known))
    if known is not None and ours != theirs:
        raise ValueError(
            f"Expected a new method name but {strategy.method!r} is that of {known.__module__}.{known.__qualname__}: "
            "choose another."
        )
    _METHODS[strategy.method] = strategy
    return strategy


def methods() -> dict[str, type[ContinualStrategy]]:
    """All registered methods by name, in alphabetical order, those of other installed packages among them."""
    package = importlib.import_module("avalanche_fmlora.strategies")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"avalanche_fmlora.strategies.{module.name}")
    _load_entry_points()
    return dict(sorted(_METHODS.items()))


@functools.cache
def _load_entry_points() -> None:
    """Import the modules that installed packages name, once; one that can't be imported is only told of."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            _LOG.warning(
                "The methods of %s can't be imported (%s: %s), so there are none of them: mend or uninstall it.",
                entry.value, type(error).__name__, error,
            )  # fmt: skip


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
