"""What happens around every experience: absorbed updates, learning-rate schedule."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import LwFPlugin

from avalanche_fmlora.modules.network import ContinualNetwork

_LOG = logging.getLogger(__name__)


class ExperiencePlugin(SupervisedPlugin):
    """Closes each experience before any plugin of the user sees its end: absorbs the update, closes the head.

    It stands behind the plugins that decide on the update and in front of the user's own. LwF's copy of the model, with
    which one in training is compared, gets the rows that train, not those for prediction.
    """

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Let teachers see the rows that the student trains."""
        for plugin in strategy.plugins:
            teacher = plugin.lwf.prev_model if isinstance(plugin, LwFPlugin) else None
            if isinstance(teacher, ContinualNetwork):
                teacher.head.unfold()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Absorb with the strategy's step; trained rows join the past."""
        strategy.model.end(strategy.core_step())
        strategy.model.head.close()


class SchedulePlugin(SupervisedPlugin):
    """Course of all rates within an experience, from each group's own rate.

    Args:
        kind: `cosine`, a half-cosine over the iterations that ends at zero, or `coda`, cos(99πe/200(E−1)) in epoch e of
            E (CODA-Prompt, arXiv 2211.13218: the last epoch's rate is 1.6 % of the first's).
    """

    def __init__(self, kind: Literal["cosine", "coda"] = "cosine") -> None:
        super().__init__()
        self.kind = kind
        self._rates: list[float] | None = None
        self._set: list[float] = []
        self._warned = False
        self._iterations = 0
        self._iteration = 0

    def on_begin(self, strategy: Any, **kwargs: Any) -> None:
        """Start anew. After an experience that was broken off, rates are as before it but those set since then."""
        groups = strategy.optimizer.param_groups
        if self._rates is not None and len(groups) == len(self._rates):
            for group, rate, left in zip(groups, self._rates, self._set, strict=True):
                if group["lr"] == left:
                    group["lr"] = rate
        self._rates = None
        self._iteration = 0

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Set the rate of this iteration. At the first, other plugins have had their say on rates and data loader."""
        if strategy.has_scheduler():
            return
        groups = strategy.optimizer.param_groups
        if self._rates is None:
            self._iterations = strategy.train_epochs * len(strategy.dataloader)
            self._rates = [group["lr"] for group in groups]
        elif not self._warned and self._set != [group["lr"] for group in groups]:
            self._warned = True
            _LOG.warning(
                "Learning rates were changed between two iterations, and lr_schedule=%r sets them anew in each: build "
                "the strategy with lr_schedule='constant' to change them yourself.",
                self.kind,
            )
        if self.kind == "coda":
            epoch, epochs = strategy.clock.train_exp_epochs, strategy.train_epochs
            factor = math.cos(99 * math.pi * epoch / (200 * max(1, epochs - 1)))
        else:
            factor = 0.5 * (1 + math.cos(math.pi * self._iteration / max(1, self._iterations)))
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._set = [group["lr"] for group in groups]
        self._iteration += 1

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Give the groups their own rates back."""
        if self._rates is not None:
            for group, rate in zip(strategy.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
        self._rates = None
