"""The classifier: one head that grows with the classes, whose rows of past classes nothing can move."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNSEEN_LOGIT = -1e4
"""Logit of a class that was never trained: finite, so that losses over it stay numbers, also in half precision."""


class IncrementalHead(nn.Module):
    """Linear or cosine classifier over all classes seen so far.

    Only the rows of the current experience's classes are parameters; all others are buffers. A past row therefore takes
    no gradient, no weight decay and no momentum, and stays what it was to the bit.

    Args:
        dim: width D of the features.
        cosine: logits ``scale · cos(f, w_c)`` without a bias, else ``f · w_c + b_c``.
        scale: of the cosine logits.
        seed: of the first rows.

    Attributes:
        rows: shape [C, D], C the largest class index seen so far plus one.
        bias: shape [C] (zero with `cosine`).
        seen: bool, shape [C].
        counts: training samples of each class so far, shape [C].
        folded: rows for prediction between experiences, see :meth:`fold`; shape [K, C, D], K = 0 if there are none.
        before: `folded` as the experience in training found them, until the next :meth:`fold`; never saved.
        means: class means kept apart from rows that go on training, see :meth:`keep_means`; shape [K, C, D].
        occurrences: experiences in which a class has been written, shape [C]; further means of it repeat its first.
        covariance: mean within-class covariance, shape [D, D], or [0, D] if it is not kept (:meth:`take_covariance`).
        active: the classes in training, in order, shape [A].
        active_rows, active_bias: their parameters, shapes [A, D] and [A].
    """

    rows: Tensor
    bias: Tensor
    seen: Tensor
    counts: Tensor
    covariance_samples: Tensor
    folded: Tensor
    before: Tensor
    means: Tensor
    occurrences: Tensor
    covariance: Tensor
    active: Tensor
    active_rows: nn.Parameter | None
    active_bias: nn.Parameter | None

    def __init__(self, dim: int, *, cosine: bool = True, scale: float = 16.0, seed: int = 0) -> None:
        super().__init__()
        self.dim = dim
        self.cosine = cosine
        self.scale = scale
        for name, shape in {"rows": (0, dim), "bias": (0,), "counts": (0,), "covariance_samples": ()}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        for name, shape in {"folded": (0, 0, dim), "means": (0, 0, dim), "covariance": (0, dim)}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("before", torch.zeros(0, 0, dim, dtype=torch.float32), persistent=False)
        self.register_buffer("seen", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("occurrences", torch.zeros(0, dtype=torch.long))
        self.register_buffer("active", torch.zeros(0, dtype=torch.long))
        self.register_parameter("active_rows", None)
        self.register_parameter("active_bias", None)
        self.frozen = False
        self._generator = torch.Generator().manual_seed(seed)
        self._undo: tuple[Tensor, Tensor, Tensor] | None = None
        self._reach = 0  # largest class index seen, plus one: asked in every step, so no word to the device

    @property
    def n_classes(self) -> int:
        """Width of the logits: the largest class index known, plus one."""
        return len(self.rows)

    @property
    def past(self) -> Tensor:
        """Classes seen that are not in training, shape [P]."""
        mask = self.seen.clone()
        mask[self.active] = False
        return mask.nonzero().squeeze(1)

    @torch.no_grad()
    def grow(self, classes: Iterable[int]) -> None:
        """Make room for class indices without saying that they have been seen."""
        extra = max(classes, default=-1) + 1 - self.n_classes
        if extra <= 0:
            return
        with torch.inference_mode(False):  # an evaluation in inference mode may come to classes that train later
            for name in ("bias", "seen", "counts", "occurrences"):
                setattr(self, name, F.pad(getattr(self, name), (0, extra)))
            for name in ("rows", "folded", "means"):
                setattr(self, name, F.pad(getattr(self, name), (0, 0, 0, extra)))

    @torch.no_grad()
    def begin(self, classes: Iterable[int]) -> None:
        """Open an experience: its classes' rows become parameters; new rows start random (cosine) or at zero."""
        self.close()
        if len(self.folded):
            self.before = self.folded
        self.folded = self.folded[:0]
        ordered = sorted(int(c) for c in classes)
        self.grow(ordered)
        self.active = torch.tensor(ordered, dtype=torch.long, device=self.rows.device)
        fresh = self.active[~self.seen[self.active]]
        self._undo = (fresh, self.rows[self.active], self._generator.get_state())
        if self.cosine and len(fresh):
            noise = torch.randn(len(fresh), self.dim, generator=self._generator).to(self.rows)
            self.rows[fresh] = F.normalize(noise, dim=-1)
        self.seen[self.active] = True
        self._reach = max([self._reach, *(c + 1 for c in ordered)])
        if not self.frozen:
            self.active_rows = nn.Parameter(self.rows[self.active])
            self.active_bias = None if self.cosine else nn.Parameter(self.bias[self.active])

    @torch.no_grad()
    def close(self) -> None:
        """Close the experience: trained rows go back among the others."""
        if self.active_rows is not None:
            self.rows[self.active] = self.active_rows.detach()
        if self.active_bias is not None:
            self.bias[self.active] = self.active_bias.detach()
        self._let_go()

    @torch.no_grad()
    def discard(self) -> None:
        """Let go of an open experience, as if it had not begun: rows are as they were, its new classes not seen."""
        if self._undo is not None and len(self.active):
            fresh, self.rows[self.active], drawn_from = self._undo
            self.seen[fresh] = False
            self._reach = _reach(self.seen)
            self._generator.set_state(drawn_from)
        if len(self.means) and not bool((self.occurrences > 1).any()):  # kept for the open experience, and in vain
            self.means = self.means[:0]
        self._let_go()

    def _let_go(self) -> None:
        self.active_rows, self.active_bias = None, None
        self.active = self.active[:0]
        self._undo = None

    @torch.no_grad()
    def write(self, classes: Tensor, rows: Tensor) -> None:
        """Set the rows [A, D] of given classes [A], also of those in training."""
        if self.active_rows is not None:
            self.rows[self.active] = self.active_rows
        self.rows[classes] = rows.to(self.rows)
        if self.active_rows is not None:
            self.active_rows.copy_(self.rows[self.active])

    @torch.no_grad()
    def fold(self, rows: Tensor) -> None:
        """Predict with these rows [K, C, D], as they are, until the next experience begins; `rows` stay for it.

        A class's logit is the largest over its K rows.

        Raises:
            ValueError: if the head is linear, or the shape another.
        """
        if not self.cosine or rows.shape[1:] != self.rows.shape:
            raise ValueError(
                f"Expected rows of a cosine head, shape [K, {self.n_classes}, {self.dim}], but got {tuple(rows.shape)}."
            )
        self.folded = rows.to(self.rows)
        self.before = self.before[:0]

    def unfold(self) -> None:
        """Predict with `rows` again, as in training: for a copy that a model in training is compared with."""
        self.folded = self.folded[:0]

    @torch.no_grad()
    def keep_means(self) -> None:
        """Keep the class means, which `rows` are now, apart from rows: classes recur, and theirs will train on."""
        if not len(self.means):
            self.means = self.rows.clone()[None]

    @torch.no_grad()
    def add_means(self, classes: Tensor, means: Tensor, counts: Tensor, *, separate: bool) -> None:
        """Class means of an experience, where means are kept: as further ones, or into the mean of all samples.

        Args:
            classes: shape [A].
            means: shape [A, D].
            counts: samples behind them, shape [A]; those of experiences before are `self.counts`.
            separate: keep those of each experience by themselves.
        """
        slots = self.occurrences[classes] if separate else torch.zeros_like(classes)
        missing = int(slots.max()) + 1 - len(self.means)
        if missing > 0:
            self.means = torch.cat([self.means, self.means[:1].repeat(missing, 1, 1)])
        past = torch.zeros_like(counts) if separate else self.counts[classes]
        weight = (counts / (past + counts))[:, None]
        first = self.occurrences[classes] == 0
        self.means[slots, classes] = torch.lerp(self.means[slots, classes], means.to(self.means), weight.to(self.means))
        self.means[1:, classes[first]] = self.means[0, classes[first]]

    @torch.no_grad()
    def take_covariance(self, covariance: Tensor, samples: int) -> Tensor:
        """Add an experience's covariance [D, D] of so many samples to the mean that is kept; returns that mean."""
        past = self.covariance if len(self.covariance) else torch.zeros_like(covariance)
        total = self.covariance_samples + samples
        self.covariance = past + (covariance.to(past) - past) * (samples / total)
        self.covariance_samples = total
        return self.covariance

    def prediction_rows(self) -> Tensor:
        """What a cosine head multiplies normalised features with: the folded rows [K, C, D], or its own [1, C, D]."""
        folded = len(self.folded) > 0 and not len(self.active)
        return self.folded if folded else F.normalize(self.weights(), dim=-1)[None]

    def weights(self) -> Tensor:
        """All rows [C, D], those in training with their gradient."""
        if self.active_rows is None:
            return self.rows
        return self.rows.index_copy(0, self.active, self.active_rows)

    def biases(self) -> Tensor:
        """All biases [C], those in training with their gradient."""
        if self.active_bias is None:
            return self.bias
        return self.bias.index_copy(0, self.active, self.active_bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features [B, D]: [B, C], classes never seen at :data:`UNSEEN_LOGIT`.

        A product rounds by its number of rows, so those for which an evaluation has made room take no part in it.
        """
        if self.cosine:
            rows = self.prediction_rows()[:, : self._reach]
            logits = self.scale * F.linear(F.normalize(features, dim=-1), rows.flatten(0, 1))
            logits = logits.unflatten(-1, rows.shape[:2]).amax(-2) if len(rows) > 1 else logits
        else:
            logits = F.linear(features, self.weights()[: self._reach], self.biases()[: self._reach])
        logits = F.pad(logits, (0, self.n_classes - self._reach))
        return logits.masked_fill(~self.seen, UNSEEN_LOGIT)

    def stored_parameters(self) -> int:
        """Numbers kept: one row a class seen, its folded rows and its means, and a bias if linear."""
        rows = 1 + len(self.folded) + len(self.means)
        return int(self.seen.sum()) * (rows * self.dim + (0 if self.cosine else 1))

    def stored_statistics(self) -> int:
        """Numbers kept that prediction does not read: the covariance, if it is."""
        return self.covariance.numel()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        """Take the sizes of the saved head first: a head is as wide as the classes that it has met."""
        for name in ("rows", "bias", "seen", "counts", "folded", "means", "occurrences", "covariance", "active"):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != getattr(self, name).shape:
                setattr(self, name, torch.empty_like(saved, device=self.rows.device))
        for name in ("active_rows", "active_bias"):
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is None:
                setattr(self, name, None)
            elif own is None or own.shape != saved.shape:
                setattr(self, name, nn.Parameter(torch.empty_like(saved, device=self.rows.device)))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._reach = _reach(self.seen)


def _reach(seen: Tensor) -> int:
    """The largest index that is true, plus one."""
    return int(seen.nonzero().max()) + 1 if bool(seen.any()) else 0
