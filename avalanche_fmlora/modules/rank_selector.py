"""Dynamic rank selector: a distribution over candidate ranks, sampled while it is undecided, then fixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_fmlora.modules import functional


def default_candidates(rank: int) -> tuple[int, ...]:
    """{R/8, R/4, R/2, R}, without repetitions and without 0.

    >>> default_candidates(32), default_candidates(2)
    ((4, 8, 16, 32), (1, 2))
    """
    return tuple(sorted({max(1, rank // d) for d in (8, 4, 2, 1)}))


def check_candidates(candidates: tuple[int, ...], rank: int) -> None:
    """Refuse candidates that are not increasing ranks in 1..R.

    Raises:
        ValueError: that names them.
    """
    if not candidates or list(candidates) != sorted(set(candidates)) or candidates[0] < 1 or candidates[-1] > rank:
        raise ValueError(f"Expected `candidates` to be increasing ranks between 1 and {rank} but got {candidates}.")


class RankSelector(nn.Module):
    """Logits ``ℓ = prior(H, similarity) + δ`` over candidate ranks, with straight-through Gumbel-Softmax samples.

    Args:
        rank: R of the shared subspace.
        candidates: r_1 < … < r_K ≤ R; None means {R/8, R/4, R/2, R}.
        sigma: width of the prior, as a share of R.
        n_groups: how many choices are made (1, or one a layer).
        seed: of the Gumbel noise.

    Raises:
        ValueError: for candidates that are not increasing ranks in 1..R.
    """

    prior: Tensor
    candidates: Tensor

    def __init__(
        self, rank: int, candidates: Sequence[int] | None = None, sigma: float = 0.25, n_groups: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        chosen = default_candidates(rank) if candidates is None else tuple(candidates)
        check_candidates(chosen, rank)
        self.rank = rank
        self.sigma = sigma
        self.register_buffer("candidates", torch.tensor(chosen))
        self.register_buffer("prior", torch.zeros(n_groups, len(chosen)))
        self.delta = nn.Parameter(torch.zeros(n_groups, len(chosen)))
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn_from = self._generator.get_state()

    @torch.no_grad()
    def begin(self, complexity: float, similarity: float) -> float:
        """Set the prior for an experience of this relative complexity, forget δ; returns the target rank r*."""
        low, high = int(self.candidates[0]), int(self.candidates[-1])
        target = functional.target_rank(complexity, similarity, low, high)
        self.prior.copy_(functional.rank_prior(self.candidates, target, self.sigma * self.rank).expand_as(self.prior))
        self.delta.zero_()
        self._drawn_from = self._generator.get_state()
        return target

    def discard(self) -> None:
        """Let go of an experience that was broken off: the next one draws what it would have drawn."""
        self._generator.set_state(self._drawn_from)

    @property
    def logits(self) -> Tensor:
        """ℓ, shape [groups, K]."""
        return self.prior + self.delta

    def sample(self, tau: float) -> Tensor:
        """Masks of one draw, shape [groups, R]; gradients reach δ."""
        choice = functional.straight_through_gumbel(self.logits, tau, self._generator)
        return functional.rank_mask(choice, self.candidates, self.rank)

    def kl(self) -> Tensor:
        """KL(softmax(ℓ) ‖ softmax(prior)), mean over the groups. Without it cross-entropy drives every rank up."""
        return F.kl_div(self.prior.log_softmax(-1), self.logits.log_softmax(-1), log_target=True, reduction="batchmean")

    @torch.no_grad()
    def choose(self) -> tuple[tuple[int, ...], Tensor]:
        """The likeliest rank of each group, and the hard masks [groups, R]."""
        best = self.logits.argmax(-1)
        one_hot = F.one_hot(best, len(self.candidates)).to(self.prior)
        ranks = tuple(int(self.candidates[k]) for k in best)
        return ranks, functional.rank_mask(one_hot, self.candidates, self.rank)
