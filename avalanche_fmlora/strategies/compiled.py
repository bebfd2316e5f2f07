"""`torch.compile` for models whose parts grow from experience to experience."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor

from avalanche_fmlora.modules.network import ContinualNetwork


class CompiledFeatures:
    """A model's `features`, compiled.

    torch gives up on a function that it has had to compile for too many shapes, and counts them by the function's code,
    which all strategies would share: each object of this class has a code of its own.

    Args:
        model: the network; compiled at its first pass.
    """

    def __init__(self, model: ContinualNetwork) -> None:
        def features(images: Tensor) -> Tensor:  # up to torch 2.6, `compile` loses the owner of a bound method
            return model.features(images)

        own = FunctionType(features.__code__.replace(), features.__globals__, "features", None, features.__closure__)
        self.model = model
        self.call: Callable[[Tensor], Tensor] = torch.compile(own)
        self._shapes: dict[str, torch.Size] = {}

    def outgrown(self) -> bool:
        """Whether a tensor has grown since this was asked last: before each experience, when no part of it is open."""
        before, self._shapes = self._shapes, _shapes(self.model)
        return any(shape != before.get(name, shape) for name, shape in self._shapes.items())


def _shapes(model: ContinualNetwork) -> dict[str, torch.Size]:
    """Of all that features are computed with, by name."""
    return {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith("head.")}
