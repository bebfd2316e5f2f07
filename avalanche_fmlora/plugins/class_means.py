"""Class-mean rows: written around each experience from passes over its own images."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from torch import Tensor

from avalanche_fmlora.modules import adversarial, class_rows
from avalanche_fmlora.plugins._passes import chosen_images, training_features

_LOG = logging.getLogger(__name__)


class ClassMeanPlugin(SupervisedPlugin):
    """Class-mean rows: new classes start as means of their normalised features and are written so again at the end.

    Classes that recur (domain-incremental data) start from the mean of all their samples so far, and their rows keep
    what training makes of them: the loss sees all of them at once, so they are comparable without being written anew.

    Args:
        train_rows: whether the rows train in between (no: nearest class mean).
        transport: move what past experiences have left, rows of classes that are not in this one and means that are
            kept of those that recur, along with the drift of its images' features, where a map fitted on half of them
            explains some of the drift of the other half.
        ridge: anchor of that map, in samples.
        samples: images, besides the experience's own and at most as many as these, that the map is fitted on: those
            nearest to past class means, moved toward them before it trains
            (:func:`~avalanche_fmlora.modules.adversarial.moved_images`), and gone when it ends.
        whitening: shrinkage λ; where given, predictions between experiences are made in the space in which images
            scatter alike in all directions around their class means. Only rows are kept of it.
        covariance: what is known of that scatter. `current`: the current experience's. `secant`: also that of the past,
            as far as its class means and their whitened rows tell
            (:func:`~avalanche_fmlora.modules.class_rows.secant_covariance`). `running`: the mean over all experiences,
            which the head keeps.
        recurring: what predicts a class that recurs: its row as trained (which is no mean, so that no row is whitened
            from the first class on that recurs), the mean over all its samples (those of the past standing in by their
            mean, at unit length where rows train), or one mean for each of its experiences (the nearest counts).

    Attributes:
        gains: share of the drift explained on held-out images, for each experience with something of the past to move.
    """

    def __init__(
        self,
        *,
        train_rows: bool = True,
        transport: bool = False,
        ridge: float = 10.0,
        samples: int = 0,
        whitening: float | None = None,
        covariance: Literal["current", "secant", "running"] = "current",
        recurring: Literal["trained", "mean", "per_experience"] = "trained",
    ) -> None:
        super().__init__()
        self.train_rows = train_rows
        self.transport = transport
        self.ridge = ridge
        self.samples = samples
        self.whitening = whitening
        self.covariance = covariance
        self.recurring = recurring
        self.gains: list[float] = []
        self._before: Tensor | None = None
        self._moved: list[Tensor] = []
        self._told = False

    def on_begin(self, strategy: Any, **kwargs: Any) -> None:
        """One pass, where rows of the past are to follow: features by the model that wrote them."""
        head = strategy.model.head
        classes = [c for c in strategy.training_classes() if c < head.n_classes]
        recur = bool((head.counts[classes] > 0).any())
        if recur and (self.recurring == "per_experience" or (self.recurring == "mean" and self.train_rows)):
            head.keep_means()
        self._before, self._moved = None, []
        if not (self.train_rows and self.transport):
            return
        if len(head.means) or bool(self._absent(head, classes).any()):
            self._before = F.normalize(strategy.features_at_start()[0], dim=-1)
            if self.samples and strategy.model.adapts:
                self._move_images(strategy, self._before)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """First rows of the experience's classes, from features as the experience begins."""
        if self.train_rows:
            features, labels = strategy.features_at_start()
            self._write(strategy.model.head, features, labels, labels.unique())

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """One pass: what the past has left is moved, rows of new classes written, rows for prediction made of them."""
        head = strategy.model.head
        features, labels = training_features(strategy)
        if self._before is not None:
            after = torch.cat([features, *self._features(strategy, self._moved)])
            self._move(head, labels, self._before, F.normalize(after, dim=-1))
        self._before, self._moved = None, []
        pairs = self._pairs(head)
        classes = labels.unique()
        means, counts = class_rows.class_means(features, labels, classes)
        if len(head.means):
            head.add_means(classes, means, counts, separate=self.recurring == "per_experience")
        if self.train_rows:
            recurring = classes[head.counts[classes] > 0]
            head.write(recurring, F.normalize(head.rows[recurring], dim=-1))
            self._write(head, features, labels, classes[head.counts[classes] == 0])
        else:
            self._write(head, features, labels, classes)
        head.counts += torch.bincount(labels, minlength=head.n_classes)
        head.occurrences[classes] += 1
        self._fold(head, features, labels, pairs)

    @torch.no_grad()
    def _features(self, strategy: Any, batches: list[Tensor]) -> list[Tensor]:
        return [strategy.features(images).float() for images in batches]

    def _move_images(self, strategy: Any, features: Tensor) -> None:
        """The experience's images nearest to rows of the past, moved toward them; their features join `_before`."""
        rows = self._past_rows(strategy.model.head)
        targets, index = adversarial.nearest_pairs(rows, features, min(self.samples, len(features)))
        images = chosen_images(strategy, index)
        size = strategy.gradient_mb_size()
        self._moved = [
            adversarial.moved_images(strategy.features, some, rows[t])
            for some, t in zip(images.split(size), targets.split(size), strict=True)
        ]
        self._before = torch.cat([features, *(F.normalize(z, dim=-1) for z in self._features(strategy, self._moved))])

    @staticmethod
    def _past_rows(head: Any) -> Tensor:
        """All rows that stand for images of the past, normalised, [P, D]."""
        means = head.means if len(head.means) else head.rows[None]
        slots = torch.arange(len(means), device=means.device)[:, None]
        return F.normalize(means[slots < head.occurrences].detach(), dim=-1)

    def _pairs(self, head: Any) -> tuple[Tensor, Tensor] | None:
        """Class means [M, D] of the past and their ``Σ⁻¹w`` [M, D], where whitening is to go on from them."""
        if self.covariance != "secant" or self.whitening is None or not len(head.before):
            return None
        past = (head.counts[: head.before.shape[1]] > 0).nonzero().squeeze(1)
        means = head.means if len(head.means) else head.rows[None]
        rows, folded = (x[: len(head.before), past].flatten(0, 1) for x in (means, head.before))
        return rows, class_rows.unfolded_rows(rows, folded)

    def _fold(self, head: Any, features: Tensor, labels: Tensor, pairs: tuple[Tensor, Tensor] | None) -> None:
        """Rows for prediction, where they are other than the head's own."""
        means = head.means if len(head.means) else head.rows[None]
        trained = self.train_rows and self.recurring == "trained" and bool((head.occurrences > 1).any())
        if trained and self.whitening is not None and not self._told:
            self._told = True
            _LOG.warning(
                "A class has come again: its row stays as trained, and no row is whitened any more. For whitened rows "
                "of classes that recur give recurring_rows='per_experience' or 'mean'."
            )
        if self.whitening is not None and not trained:
            covariance = self._covariance(head, features, labels, pairs, self.whitening)
            rows = class_rows.whitened_rows(means.flatten(0, 1), covariance, self.whitening)
            head.fold(rows.view_as(means))
        elif len(head.means):
            head.fold(F.normalize(means, dim=-1))

    def _covariance(
        self, head: Any, features: Tensor, labels: Tensor, pairs: tuple[Tensor, Tensor] | None, shrinkage: float
    ) -> Tensor:
        """What is known of the scatter within classes, trace normalised, float64 [D, D]."""
        current = class_rows.within_class_covariance(features, labels)
        if self.covariance == "running":
            return class_rows.trace_normalized(head.take_covariance(current, len(labels)))
        current = class_rows.trace_normalized(current)
        if pairs is None:
            return current
        ridge = shrinkage * torch.eye(len(current), dtype=current.dtype, device=current.device)
        past = class_rows.secant_covariance(current + ridge, *pairs) - ridge
        return past + (current - past) * (len(labels) / float(head.counts.sum()))

    @staticmethod
    def _absent(head: Any, classes: Tensor | list[int]) -> Tensor:
        absent: Tensor = head.counts > 0
        absent[classes] = False
        return absent

    def _move(self, head: Any, labels: Tensor, before: Tensor, after: Tensor) -> None:
        gain = float(class_rows.transport_gain(before, after, self.ridge))
        self.gains.append(gain)
        if gain <= 0:
            return
        absent = self._absent(head, labels).nonzero().squeeze(1)
        transport = class_rows.ridge_transport(before, after, self.ridge)
        if len(head.before):
            moved = class_rows.transport_solved(head.before.flatten(0, 1), transport)
            head.before = moved.view_as(head.before).to(head.before)
        head.write(absent, class_rows.transport_rows(head.rows[absent], transport))
        if len(head.means):  # those of this experience's images are not among them yet
            past = (head.counts > 0).nonzero().squeeze(1)
            means = head.means[:, past]
            head.means[:, past] = class_rows.transport_rows(means, transport) * means.norm(dim=-1, keepdim=True)

    def _write(self, head: Any, features: Tensor, labels: Tensor, classes: Tensor) -> None:
        """Rows of `classes`: means of all samples so far, those of the past standing in as rows · n."""
        if not len(classes):
            return
        means, n = class_rows.class_means(features, labels, classes)
        past = head.counts[classes][:, None]
        combined = (past * head.rows[classes] + n[:, None] * means) / (past + n[:, None])
        # Rows that never train keep their length, so that they stay the exact means of all samples, however split.
        head.write(classes, F.normalize(combined, dim=-1) if self.train_rows else combined)
