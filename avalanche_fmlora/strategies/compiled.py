"""`torch.compile` for models whose parts grow from experience to experience."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor

from avalanche_fmlora.modules.network import ContinualNetwork


class CompiledFeatures:
    """A model's `features`, compiled anew for another model, and for one that has grown.

    torch gives up on a function that it has had to compile for too many shapes, and counts them by the function's code,
    which all strategies would share: each function that is compiled here has a code of its own.
    """

    def __init__(self) -> None:
        self._model: ContinualNetwork | None = None
        self._call: Callable[[Tensor], Tensor] | None = None
        self._shapes: dict[str, torch.Size] = {}

    def of(self, model: ContinualNetwork) -> Callable[[Tensor], Tensor]:
        """What computes the features of this model, compiled at its first pass."""
        if self._call is None or self._model is not model:
            self._model, self._call = model, torch.compile(_features_of(model))
        return self._call

    def begin(self, model: ContinualNetwork) -> None:
        """Before an experience, when no part is open: start anew if a tensor has another shape than the last time."""
        before = self._shapes
        self._shapes = {name: x.shape for name, x in model.state_dict().items() if not name.startswith("head.")}
        if any(shape != before.get(name, shape) for name, shape in self._shapes.items()):
            self._call = None


def _features_of(model: ContinualNetwork) -> Callable[[Tensor], Tensor]:
    """`model.features` as a function with its own code. Up to torch 2.6, `compile` loses the owner of a method."""

    def features(images: Tensor) -> Tensor:
        return model.features(images)

    return FunctionType(features.__code__.replace(), features.__globals__, "features", None, features.__closure__)
