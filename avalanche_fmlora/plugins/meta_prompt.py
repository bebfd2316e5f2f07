"""DMP: one prompt for all experiences that is free in the first and changes slowly afterwards."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor


class MetaPromptPlugin(SupervisedPlugin):
    """Dynamic meta-prompt for a strategy whose model has a shared prompt (arXiv 2504.08823; update rule ours).

    After the first experience the prompt's rate is a share of what it was, an anchor holds it, and before the last
    quarter of the epochs a Reptile step P ← P_{t−1} + ε(P − P_{t−1}) is taken, so that the head fits the final P.

    Args:
        rate_share: of the prompt's learning rate after the first experience.
        anchor_weight: λ_prompt of ‖P − P_{t−1}‖² in the loss.
        epsilon: of the Reptile step; None means 1/t in experience t (counted from 1).
        fit_share: share of the epochs, at the end, in which the prompt rests.

    Attributes:
        drift: after each experience, how far the prompt has come from where the experience found it, ‖P − P_{t−1}‖.
    """

    def __init__(
        self,
        *,
        rate_share: float = 0.1,
        anchor_weight: float = 0.01,
        epsilon: float | None = None,
        fit_share: float = 0.25,
    ) -> None:
        super().__init__()
        self.rate_share = rate_share
        self.anchor_weight = anchor_weight
        self.epsilon = epsilon
        self.fit_share = fit_share
        self.drift: list[float] = []
        self._experience = 0
        self._stepped = True
        self._rested: Tensor | None = None

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Take the slow rate from the second experience on."""
        if getattr(strategy.model, "prompt", None) is None:
            raise ValueError(
                "MetaPromptPlugin expects a strategy whose model has a shared prompt (`model.prompt`): "
                "give FMLoRAStrategy a `prompt_length` above 0, or leave the plugin out."
            )
        self._experience = int(strategy.model.prompt.experience)
        self._stepped, self._rested = self._experience == 1, None
        if not self._stepped:
            strategy.scale_rate("prompt", self.rate_share)

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Reptile step before the last epochs."""
        if strategy.clock.train_exp_epochs >= (1 - self.fit_share) * strategy.train_epochs:
            self._slow_step(strategy)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """λ_prompt · ‖P − P_{t−1}‖², from the second experience on."""
        if self._experience > 1 and self.anchor_weight:
            strategy.loss += self.anchor_weight * strategy.model.prompt.drift()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Take the step now if training ended before it, or went back to before it; log ‖P − P_{t−1}‖."""
        if self._rested is not None and not torch.equal(self._rested, strategy.model.prompt.prompt):
            self._stepped = False  # early stopping has brought back the state of an earlier epoch
        self._slow_step(strategy)
        self._rested = None
        strategy.model.prompt.prompt.requires_grad_(True)  # it lasts: plugins that weigh parameters see it
        self.drift.append(float(strategy.model.prompt.drift().detach().sqrt()))

    def _slow_step(self, strategy: Any) -> None:
        if self._stepped:
            return
        strategy.model.prompt.slow_step(1 / self._experience if self.epsilon is None else self.epsilon)
        strategy.model.prompt.prompt.requires_grad_(False)  # it rests; the next experience trains it again
        self._stepped, self._rested = True, strategy.model.prompt.prompt.detach().clone()
