"""What keeps the core in place while an experience trains: distillation by the free teacher, stability term."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from torch import Tensor

from avalanche_fmlora.modules import functional
from avalanche_fmlora.modules.feature_cache import KnownFeatures
from avalanche_fmlora.plugins._passes import training_images

_LOG = logging.getLogger(__name__)


class CoreRegularizationPlugin(SupervisedPlugin):
    """Adds to the loss what holds on to the past; needs no stored sample and no copy of the model.

    Args:
        distillation: weight of the squared change of the cosines to past rows on the current images. The teacher is the
            model without M Nᵀ. Silent while bases train or nothing is past.
        teacher: `known`: it speaks on images whose features the pass before the experience has given, and costs no pass
            of its own; where inputs change from epoch to epoch (random crops) it is silent. `every_step`: it reads each
            batch, one more forward pass without autograd.
        stability: λ_core of ‖C_t − C_{t−1}‖², summed over the adapted maps.
    """

    def __init__(
        self,
        *,
        distillation: float = 0.0,
        teacher: Literal["known", "every_step"] = "known",
        stability: float = 0.0,
    ) -> None:
        super().__init__()
        self.distillation = distillation
        self.teacher = teacher
        self.stability = stability
        self._rows: Tensor | None = None
        self._known: KnownFeatures | None = None
        self._found: Tensor | None = None

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Take the rows of the past: without classes of this experience, or all if every class recurs."""
        head, lora = strategy.model.head, strategy.model.lora
        known = head.counts > 0
        past = known.clone()
        past[head.active] = False
        chosen = past if bool(past.any()) else known
        teaches = self.distillation > 0 and lora.trains_core and not lora.trains_bases and bool(chosen.any())
        self._rows = F.normalize(head.rows[chosen], dim=-1) if teaches else None
        if teaches and self.teacher == "known":
            features, _ = strategy.features_at_start()
            self._known = KnownFeatures((x for x, _ in training_images(strategy)), features)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the terms."""
        model = strategy.model
        if self.stability > 0 and model.lora.trains_core:
            strategy.loss += self.stability * model.lora.stability()
        if self._rows is None:
            return
        if self.teacher == "known":
            assert self._known is not None
            teacher, known = self._known.find(strategy.mb_x)
            found = known.any()
            self._found = found if self._found is None else self._found | found
        else:
            teacher, known = strategy.features_before(strategy.mb_x), None
        term = functional.row_distillation(strategy.mb_features, teacher, self._rows, known)
        strategy.loss += self.distillation * term

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """A teacher that has known none of the epoch's images is sent away."""
        if self._found is not None and not bool(self._found):
            _LOG.warning(
                "Distillation is off in this experience: the free teacher knows none of its images, which differ from "
                "those of the evaluation transform (random crops, say). teacher='every_step' reads each batch itself, "
                "one more forward pass a step; distillation=0 says that none is wanted."
            )
            self._rows = self._known = None
        self._found = None

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The teacher is gone."""
        self._rows = self._known = self._found = None
