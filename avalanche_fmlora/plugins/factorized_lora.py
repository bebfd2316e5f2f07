"""What keeps the core in place while an experience trains: distillation by the free teacher, stability term."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from avalanche.core import SupervisedPlugin

from avalanche_fmlora.modules import functional
from avalanche_fmlora.modules.feature_cache import FeatureCache


class CoreRegularizationPlugin(SupervisedPlugin):
    """Adds to the loss what holds on to the past; needs no stored sample and no copy of the model.

    Args:
        distillation: weight of the squared change of the cosines to past rows on the current images. The teacher is the
            model without M Nᵀ: one more forward pass, without autograd, of images whose input it has not seen in the
            experience yet. Silent while bases train or nothing is past.
        stability: λ_core of ‖C_t − C_{t−1}‖², summed over the adapted maps.
    """

    def __init__(self, *, distillation: float = 0.0, stability: float = 0.0) -> None:
        super().__init__()
        self.distillation = distillation
        self.stability = stability
        self._rows: Any = None
        self._cache = FeatureCache()

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Take the rows of the past: without classes of this experience, or all if every class recurs."""
        head, lora = strategy.model.head, strategy.model.lora
        known = head.counts > 0
        past = known.clone()
        past[head.active] = False
        chosen = past if bool(past.any()) else known
        teaches = self.distillation > 0 and lora.trains_core and not lora.trains_bases and bool(chosen.any())
        self._rows = F.normalize(head.rows[chosen], dim=-1) if teaches else None
        self._cache.clear()

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the terms."""
        model = strategy.model
        if self.stability > 0 and model.lora.trains_core:
            strategy.loss += self.stability * model.lora.stability()
        if self._rows is not None:
            teacher = self._cache.lookup(strategy.mb_x, strategy.features_before)
            strategy.loss += self.distillation * functional.row_distillation(model.last_features, teacher, self._rows)

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Inputs that repeat are known from now on."""
        self._cache.end_epoch()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The teacher is gone."""
        self._rows = None
        self._cache.clear()
