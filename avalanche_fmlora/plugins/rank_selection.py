"""DRS: choose the rank of each experience's update from its complexity and its similarity to the past."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from torch import Tensor

from avalanche_fmlora.modules import class_rows, functional
from avalanche_fmlora.modules.factorized_lora import FactorizedLoRA
from avalanche_fmlora.modules.rank_selector import RankSelector
from avalanche_fmlora.plugins._passes import spread, training_features, training_images
from avalanche_fmlora.plugins.lifecycle import ExperiencePlugin


class RankSelectionPlugin(SupervisedPlugin):
    """Dynamic rank selector for a strategy whose model has low-rank updates (arXiv 2504.08823; equations ours).

    Before the experience it measures complexity H and similarity; while the first share of the iterations runs it draws
    ranks by straight-through Gumbel-Softmax with a falling temperature; then the likeliest rank is kept. Complexities
    count relative to the first experience's. In an experience that learns the bases themselves there is no update to
    bound: measures are logged, the rank is R.

    Args:
        candidates: ranks to choose from; None means {R/8, R/4, R/2, R}.
        sigma: width of the prior around the target rank, as a share of R.
        kl_weight: λ_rank of KL(π ‖ prior) in the loss.
        tau_start: temperature at the first iteration.
        tau_end: temperature when the choice is made.
        search_share: share of an experience's iterations after which the rank is fixed.
        per_layer: one choice for each adapted map instead of one for all.
        max_samples: of the experience's images used for the measures.
        seed: of the Gumbel noise.

    Attributes:
        history: one dict an experience: experience, complexity, similarity, target, rank (the mean over layers,
            rounded, if they differ), ranks_per_layer, masked_parameters (of the update, what ranks leave out).
    """

    def __init__(
        self,
        *,
        candidates: tuple[int, ...] | None = None,
        sigma: float = 0.25,
        kl_weight: float = 0.1,
        tau_start: float = 5.0,
        tau_end: float = 0.5,
        search_share: float = 0.4,
        per_layer: bool = False,
        max_samples: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.candidates = candidates
        self.sigma = sigma
        self.kl_weight = kl_weight
        self.tau_start = tau_start
        self.tau_end = tau_end
        self.search_share = search_share
        self.per_layer = per_layer
        self.max_samples = max_samples
        self.seed = seed
        self.history: list[dict[str, Any]] = []
        self._searching = False
        self._iteration = 0
        self._search_iterations = 0

    def attach(self, strategy: Any) -> None:
        """Put the selector into the model, if there is none yet; training does so by itself.

        Raises:
            ValueError: if the model has no low-rank updates in shared bases, or the plugin would come after their end.
        """
        lora = getattr(strategy.model, "lora", None)
        if not isinstance(lora, FactorizedLoRA):
            raise ValueError(
                "RankSelectionPlugin expects a strategy whose model has low-rank updates in shared bases, as "
                "FMLoRAStrategy: leave the plugin out, or use such a strategy."
            )
        closing = [isinstance(plugin, ExperiencePlugin) for plugin in strategy.plugins]
        if self in strategy.plugins and True in closing[: strategy.plugins.index(self)]:
            raise ValueError(
                "RankSelectionPlugin decides on an update before it is closed, so it can't stand in `plugins`: give it "
                "as FMLoRAStrategy(rank_selection=RankSelectionPlugin(…))."
            )
        if strategy.model.selector is None:
            groups = len(lora.layers) if self.per_layer else 1
            selector = RankSelector(lora.rank, self.candidates, self.sigma, groups, self.seed)
            strategy.model.selector = selector.to(strategy.device)

    def on_begin(self, strategy: Any, **kwargs: Any) -> None:
        """Data and experience are set, the model has not grown: measure, and set the prior."""
        self.attach(strategy)
        lora = strategy.model.lora
        if strategy.config.classifier in ("imprinted", "class_mean"):  # all are encoded in any case
            features, labels = strategy.features_at_start()
            chosen = spread(len(features), self.max_samples)
            features, labels = features[chosen], labels[chosen]
        else:
            features, labels = training_features(strategy, self.max_samples)
        complexity = float(functional.complexity(features, labels))
        similarity = self._similarity(strategy, features, labels) if int(lora.experiences) else 0.0
        if not int(lora.experiences) or lora.first_complexity < 0:  # the first may have been broken off before
            lora.first_complexity.fill_(complexity)
        relative = functional.relative_complexity(complexity, float(lora.first_complexity))
        target = strategy.model.selector.begin(relative, similarity)
        if self.history and "rank" not in self.history[-1]:
            self.history.pop()  # of an experience that was broken off
        self.history.append(
            {
                "experience": int(lora.experiences),
                "complexity": complexity,
                "similarity": similarity,
                "target": target,
            }
        )

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Start to search, if the experience trains a core."""
        self._iteration = 0
        self._searching = strategy.model.lora.trains_core

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Draw a rank, or fix it when the search is over."""
        if not self._searching:
            return
        if self._iteration == 0:  # only now has every plugin had its say on the data loader
            self._search_iterations = int(self.search_share * strategy.train_epochs * len(strategy.dataloader))
        if self._iteration >= self._search_iterations:
            self._decide(strategy)
            return
        progress = self._iteration / self._search_iterations
        tau = self.tau_start * (self.tau_end / self.tau_start) ** progress
        strategy.model.lora.set_mask(strategy.model.selector.sample(tau))
        self._iteration += 1

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """λ_rank · KL(π ‖ prior)."""
        if self._searching:
            strategy.loss += self.kl_weight * strategy.model.selector.kl()

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Let go of the draw's graph, so that a plugin's own backward pass before the next draw is possible."""
        if self._searching:
            for layer in strategy.model.lora.layers:
                layer.mask = layer.mask.detach()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Fix the rank if training ended early; log it."""
        if self._searching:
            self._decide(strategy)
        lora = strategy.model.lora
        masks = [layer.mask for layer in lora.layers]
        ranks = [lora.rank if m is None else int(m.sum()) for m in masks]
        self.history[-1]["rank"] = round(sum(ranks) / len(ranks))
        self.history[-1]["ranks_per_layer"] = ranks
        self.history[-1]["masked_parameters"] = lora.masked_parameters()

    def _decide(self, strategy: Any) -> None:
        _, masks = strategy.model.selector.choose()
        strategy.model.lora.set_mask(masks)
        self._searching = False

    def _similarity(self, strategy: Any, features: Tensor, labels: Tensor) -> float:
        """Cosine of the descent direction at the start and the core so far; class means stand in for the head."""
        classes = labels.unique()
        means, _ = class_rows.class_means(features, labels, classes)
        rows, slot = F.normalize(means, dim=-1), {int(c): i for i, c in enumerate(classes)}
        lora = strategy.model.lora
        cores = [layer.core for layer in lora.layers]
        for layer in lora.layers:
            layer.core = layer.core.detach().requires_grad_(True)
        try:
            with torch.enable_grad():
                for images, y in training_images(strategy, self.max_samples, strategy.gradient_mb_size()):
                    target = torch.tensor([slot[int(c)] for c in y], device=y.device)
                    cosines = F.normalize(strategy.features(images).float(), dim=-1) @ rows.T
                    F.cross_entropy(strategy.model.head.scale * cosines, target, reduction="sum").backward()
            gradients = [torch.zeros_like(c) if (g := layer.core.grad) is None else g
                         for layer, c in zip(lora.layers, cores, strict=True)]  # fmt: skip
        finally:
            for layer, core in zip(lora.layers, cores, strict=True):
                layer.core = core
        return float(functional.core_similarity(gradients, cores))
