"""Opening and closing an experience: absorbed updates, class-mean rows, learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from torch import Tensor

from avalanche_fmlora.modules import functional
from avalanche_fmlora.plugins._passes import training_features


class ExperiencePlugin(SupervisedPlugin):
    """Closes each experience before any plugin of the user sees its end: absorbs the update, closes the head.

    It stands behind the plugins that decide on the update and in front of the user's own.
    """

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Absorb with the strategy's step; trained rows join the past."""
        strategy.model.end(strategy.core_step())
        strategy.model.head.close()


class ClassMeanPlugin(SupervisedPlugin):
    """Class-mean rows: new classes start as means of their normalised features and are written so again at the end.

    Classes that recur (domain-incremental data) start from the mean of all their samples so far and keep what training
    makes of them: the loss sees all of them at once, so their rows are comparable without being written anew.

    Args:
        train_rows: whether the rows train in between (no: nearest class mean).
        transport: move rows of classes that are not in the experience along with the drift of its images' features,
            where a map fitted on half of them explains some of the drift of the other half.
        ridge: anchor of that map, in samples.
        whitening: shrinkage λ; where given, predictions between experiences are made in the space in which the current
            experience's images scatter alike in all directions around their class means. Only rows are kept of it.
        running: whiten by the covariance of all experiences so far instead, which the head keeps.

    Attributes:
        gains: share of the drift explained on held-out images, for each experience with classes of the past to move.
    """

    def __init__(
        self,
        *,
        train_rows: bool = True,
        transport: bool = False,
        ridge: float = 10.0,
        whitening: float | None = None,
        running: bool = False,
    ) -> None:
        super().__init__()
        self.train_rows = train_rows
        self.transport = transport
        self.ridge = ridge
        self.whitening = whitening
        self.running = running
        self.gains: list[float] = []
        self._before: Tensor | None = None

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """One pass: features before the experience; they set the first rows of its classes."""
        head = strategy.model.head
        if not self.train_rows:
            return
        features, labels = training_features(strategy)
        self._before = features if self.transport and bool(self._absent(head, labels).any()) else None
        self._write(head, features, labels, labels.unique())

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """One pass: rows of absent classes are moved, rows of new ones written."""
        head = strategy.model.head
        features, labels = training_features(strategy)
        if self._before is not None:
            self._move(head, labels, F.normalize(self._before, dim=-1), F.normalize(features, dim=-1))
        classes = labels.unique()
        if self.train_rows:
            recurring = classes[head.counts[classes] > 0]
            head.write(recurring, F.normalize(head.rows[recurring], dim=-1))
            self._write(head, features, labels, classes[head.counts[classes] == 0])
        else:
            self._write(head, features, labels, classes)
        head.counts += torch.bincount(labels, minlength=head.n_classes)
        if self.whitening is not None:
            covariance = functional.within_class_covariance(features, labels)
            if self.running:
                covariance = head.take_covariance(covariance, len(labels))
            head.fold(functional.whitened_rows(head.rows, covariance, self.whitening))
        self._before = None

    @staticmethod
    def _absent(head: Any, labels: Tensor) -> Tensor:
        absent: Tensor = head.counts > 0
        absent[labels] = False
        return absent

    def _move(self, head: Any, labels: Tensor, before: Tensor, after: Tensor) -> None:
        gain = float(functional.transport_gain(before, after, self.ridge))
        self.gains.append(gain)
        if gain <= 0:
            return
        absent = self._absent(head, labels).nonzero().squeeze(1)
        transport = functional.ridge_transport(before, after, self.ridge)
        head.write(absent, functional.transport_rows(head.rows[absent], transport))

    def _write(self, head: Any, features: Tensor, labels: Tensor, classes: Tensor) -> None:
        """Rows of `classes`: means of all samples so far, those of the past standing in as rows · n."""
        if not len(classes):
            return
        means, n = functional.class_means(features, labels, classes)
        past = head.counts[classes][:, None]
        combined = (past * head.rows[classes] + n[:, None] * means) / (past + n[:, None])
        # Rows that never train keep their length, so that they stay the exact means of all samples, however split.
        head.write(classes, F.normalize(combined, dim=-1) if self.train_rows else combined)


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
        self._iterations = 0
        self._iteration = 0

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Start anew, also after an experience that was broken off."""
        self.after_training_exp(strategy)
        self._iteration = 0

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Set the rate of this iteration. At the first, other plugins have had their say on rates and data loader."""
        if strategy.has_scheduler():
            return
        groups = strategy.optimizer.param_groups
        if self._rates is None:
            self._rates = [group["lr"] for group in groups]
            self._iterations = strategy.train_epochs * len(strategy.dataloader)
        if self.kind == "coda":
            epoch, epochs = strategy.clock.train_exp_epochs, strategy.train_epochs
            factor = math.cos(99 * math.pi * epoch / (200 * max(1, epochs - 1)))
        else:
            factor = 0.5 * (1 + math.cos(math.pi * self._iteration / max(1, self._iterations)))
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._iteration += 1

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Give the groups their own rates back."""
        if self._rates is not None:
            for group, rate in zip(strategy.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
        self._rates = None
