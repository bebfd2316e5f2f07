"""The loss of a mini-batch: over the classes that take part in it, by whatever criterion the strategy was given."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn

from avalanche_fmlora.modules import functional
from avalanche_fmlora.modules.network import ContinualNetwork

_IGNORED = -100
"""torch's own `ignore_index`."""


class Loss(SupervisedTemplate):
    """The part of :class:`strategies.base.ContinualStrategy` that computes its loss.

    Attributes:
        mb_features: features [B, D] of the mini-batch, for losses on features; a plugin may use the model in between.
    """

    model: ContinualNetwork
    config: Any
    mb_features: Tensor | None = None
    _mb_extra: Tensor | None = None

    def criterion(self) -> Tensor:
        """The loss over the classes that take part: the experience's own and those in the batch, or all seen.

        Raises:
            ValueError: if it is not one number; or if it is not finite in an experience's first step though the logits
                are: a criterion that can't do with −∞ for the classes that are left out.
        """
        head = self.model.head
        allowed = head.seen.clone()
        if not self.is_training:
            allowed[self.mb_y] = True
            return self._over(allowed) if _is_torchs(self._criterion) else self._criterion(self.mb_output, self.mb_y)
        if self.config.loss_classes == "current":
            allowed.zero_()
            allowed[head.active] = True
            allowed[self.mb_y] = True
        loss = self._over(allowed)
        if loss.ndim:
            raise ValueError(
                f"Expected a loss that is one number but {_name(self._criterion)} gives {tuple(loss.shape)}: build it "
                "with reduction='mean'."
            )
        if not self.clock.train_exp_iterations and not loss.isfinite().all() and self.mb_output.isfinite().all():
            raise ValueError(
                f"Expected a finite loss but got {loss.detach()} from {_name(self._criterion)}: logits of classes that "
                "take no part are −∞, so a criterion must read those of the labels and log-sum-exps only, as "
                "torch.nn.CrossEntropyLoss does, whose label smoothing is over the classes that take part."
            )
        return loss if self._mb_extra is None else loss + self._mb_extra

    def _train_cleanup(self) -> None:
        """Let go of the last mini-batch's graph."""
        super()._train_cleanup()
        self.mb_features = self._mb_extra = None

    def _over(self, allowed: Tensor) -> Tensor:
        """The criterion over the classes `allowed`, bool [C]; torch's cross-entropy is given no others."""
        if not _is_torchs(self._criterion):
            return self._criterion(functional.masked_logits(self.mb_output, allowed), self.mb_y)
        columns, ce = allowed.nonzero().squeeze(1), self._criterion
        if ce.weight is not None and len(ce.weight) < len(allowed):
            raise ValueError(
                f"Expected a weight for each of the {len(allowed)} classes so far but CrossEntropyLoss has "
                f"{len(ce.weight)}: give it one for each class that will come."
            )
        return F.cross_entropy(
            self.mb_output[:, columns],
            torch.searchsorted(columns, self.mb_y).masked_fill(self.mb_y == ce.ignore_index, _IGNORED),
            ignore_index=_IGNORED,
            weight=None if ce.weight is None else ce.weight[columns],
            reduction=ce.reduction,
            label_smoothing=ce.label_smoothing,
        )


def smooths(criterion: Any) -> bool:
    """Whether it is torch's cross-entropy with label smoothing."""
    return _is_torchs(criterion) and bool(criterion.label_smoothing)


def _is_torchs(criterion: Any) -> bool:
    """Whether it is torch's cross-entropy itself: a subclass with a `forward` of its own is the user's business."""
    return isinstance(criterion, nn.CrossEntropyLoss) and type(criterion).forward is nn.CrossEntropyLoss.forward


def _name(criterion: Any) -> str:
    return getattr(criterion, "__qualname__", type(criterion).__qualname__)
