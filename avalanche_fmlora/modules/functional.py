"""The formulas of FM-LoRA and of its classifier, each a pure function.

Letters: B batch, N tokens, D width, R rank of the shared subspace, K candidate ranks, C classes, M samples.
What the paper (arXiv 2504.08823) publishes is the shape of the method: shared bases, a task update that is a product
of two RxR matrices, a rank chosen through Gumbel-Softmax from a complexity measure, one prompt. The equations here are
this package's definition of it; the README says which part is whose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def update_core(core: Tensor, left: Tensor | None, right: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Core during training, ``C + M diag(m) Nᵀ``.

    Args:
        core: C of the past, shape [..., R, R].
        left: M, shape [..., R, R], or None for no update.
        right: N, shape [..., R, R].
        mask: m in {0, 1}, shape [R]; None means all ones. At most ``m.sum()`` is the rank of the update.

    Returns:
        Shape [..., R, R].

    >>> eye = torch.eye(3)
    >>> update_core(torch.zeros(3, 3), eye, 2 * eye, torch.tensor([1.0, 0.0, 0.0])).diagonal()
    tensor([2., 0., 0.])
    """
    if left is None or right is None:
        return core
    if mask is not None:
        left = left * mask.to(left.dtype)
    return core + left @ right.transpose(-1, -2)


def svd_bases(up: Tensor, down: Tensor, core: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of ``A C B`` without forming it: orthonormal bases and a diagonal core, the product unchanged.

    Args:
        up: A, shape [D_out, R].
        down: B, shape [R, D_in].
        core: C, shape [R, R]; None means the identity.

    Returns:
        A' [D_out, R], C' [R, R] and B' [R, D_in] with A'ᵀA' = B'B'ᵀ = I and A'C'B' = A C B, C' = diag(singular values).

    >>> a, c, b = svd_bases(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0]]))
    >>> round(c.item(), 4)
    10.0
    """
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.transpose(0, 1))
    middle = r_up if core is None else r_up @ core
    u, s, vh = torch.linalg.svd(middle @ r_down.transpose(0, 1))
    return q_up @ u, torch.diag(s), vh @ q_down.transpose(0, 1)


def rank_mask(choice: Tensor, candidates: Tensor, rank: int) -> Tensor:
    """``m_j = Σ_k y_k 1[j ≤ r_k]``: the mask of the first r_k inner indices, differentiable in the choice.

    Args:
        choice: y, one-hot or a point of the simplex, shape [..., K].
        candidates: r_1 < … < r_K, integers, shape [K].
        rank: R.

    Returns:
        Shape [..., R].

    >>> rank_mask(torch.tensor([0.0, 1.0]), torch.tensor([1, 2]), 4)
    tensor([1., 1., 0., 0.])
    """
    index = torch.arange(rank, device=choice.device)
    return choice @ (index < candidates.to(choice.device)[:, None]).to(choice.dtype)


def relative_complexity(complexity: float, first: float) -> float:
    """Complexity over that of the first experience, at most 1.

    >>> relative_complexity(0.2, 0.4), relative_complexity(0.5, 0.4)
    (0.5, 1.0)
    """
    return min(1.0, complexity / first) if first > 0 else 1.0


def target_rank(complexity: float, similarity: float, rank_min: int, rank_max: int) -> float:
    """``r* = r_min + (r_max − r_min) · H · (1 − similarity)``: hard and unlike the past asks for more.

    H is the :func:`relative_complexity`. With the absolute one, experiences of equal difficulty got half the subspace
    and lost accuracy for it.

    >>> target_rank(1.0, 0.0, 2, 16), target_rank(0.5, 0.5, 0, 16), target_rank(1.0, 1.0, 2, 16)
    (16.0, 4.0, 2.0)
    """
    return rank_min + (rank_max - rank_min) * complexity * (1.0 - similarity)


def rank_prior(candidates: Tensor, target: float, sigma: float) -> Tensor:
    """Logits ``−(r_k − r*)² / 2σ²`` over the candidate ranks, shape [K]; `sigma` in ranks.

    >>> rank_prior(torch.tensor([2, 4]), 4.0, 1.0)
    tensor([-2., -0.])
    """
    return -((candidates - target) ** 2) / (2 * sigma**2)


def straight_through_gumbel(logits: Tensor, tau: float, generator: torch.Generator | None = None) -> Tensor:
    """One-hot sample of softmax(logits) whose gradient is that of the relaxed sample (arXiv 1611.01144).

    Args:
        logits: shape [..., K].
        tau: temperature, > 0.
        generator: of the Gumbel noise, on the CPU.

    Returns:
        One-hot, shape [..., K].
    """
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float32).clamp_(1e-10, 1 - 1e-7)
    gumbel = -torch.log(-torch.log(uniform)).to(logits)
    soft = ((logits + gumbel) / tau).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
    return hard + (soft - soft.detach())  # in this order the value is one-hot to the bit


def spectral_entropy(features: Tensor) -> Tensor:
    """Entropy of the spectrum of the features' covariance, over log of its largest possible rank: in [0, 1].

    Args:
        features: shape [M, D].

    >>> spectral_entropy(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])).item()
    1.0
    """
    centred = features.float() - features.float().mean(0)
    energy = torch.linalg.svdvals(centred) ** 2
    limit = min(features.shape[0] - 1, features.shape[1])
    total = energy.sum()
    if limit < 2 or total <= 0:
        return features.new_zeros((), dtype=torch.float32)
    p = energy / total
    return (torch.special.entr(p).sum() / torch.log(torch.tensor(float(limit)))).clamp(0.0, 1.0)


def probe_difficulty(features: Tensor, labels: Tensor, ridge: float = 1.0) -> Tensor:
    """Held-out error of a closed-form ridge probe over the error of chance, in [0, 1].

    Every second sample of each class fits the probe, the others test it; with one sample a class it is 1.

    Args:
        features: shape [M, D]; normalised to unit length here.
        labels: integers, shape [M].
        ridge: added to the diagonal of the Gram matrix, in units of its mean diagonal.

    Returns:
        A scalar: 0 where the frozen features solve the experience, 1 where they are of no use.
    """
    classes, target = labels.unique(return_inverse=True)
    if len(classes) < 2:
        return features.new_zeros((), dtype=torch.float32)
    held_out = _every_second_of_class(target)
    if not held_out.any() or held_out.all():
        return features.new_ones((), dtype=torch.float32)
    z = F.normalize(features.float(), dim=-1)
    z = z - z[~held_out].mean(0)
    fit, one_hot = z[~held_out], F.one_hot(target[~held_out], len(classes)).float()
    kernel = fit @ fit.T
    kernel.diagonal().add_(ridge * kernel.diagonal().mean() + 1e-12)
    predicted = (z[held_out] @ fit.T @ torch.linalg.solve(kernel, one_hot - one_hot.mean(0))).argmax(-1)
    error = (predicted != target[held_out]).float().mean()
    return (error / (1 - 1 / len(classes))).clamp(0.0, 1.0)


def _every_second_of_class(target: Tensor) -> Tensor:
    order = torch.argsort(target, stable=True)
    starts = F.pad(torch.bincount(target).cumsum(0), (1, 0))[:-1]
    position = torch.empty_like(target)
    position[order] = torch.arange(len(target), device=target.device) - starts[target[order]]
    return position % 2 == 1


def complexity(features: Tensor, labels: Tensor) -> Tensor:
    """H(T) ∈ [0, 1] of an experience: half spectral entropy, half difficulty of the probe.

    Args:
        features: of the frozen model before the experience, shape [M, D].
        labels: shape [M].
    """
    return 0.5 * spectral_entropy(features) + 0.5 * probe_difficulty(features, labels)


def core_similarity(gradients: list[Tensor], cores: list[Tensor]) -> Tensor:
    """Similarity ∈ [0, 1] to the past: cosine of the descent direction at the start and the core so far, over all maps.

    Negative cosines (the experience pulls against the past) count as 0.

    Args:
        gradients: ∂loss/∂C of every adapted map, each [..., R, R].
        cores: the accumulated core change of the same maps, in the same order.

    >>> core_similarity([-torch.eye(2)], [3 * torch.eye(2)]).item()
    1.0
    """
    g = torch.cat([-x.reshape(-1) for x in gradients])
    c = torch.cat([x.reshape(-1) for x in cores])
    return F.cosine_similarity(g, c, dim=0, eps=1e-12).clamp(0.0, 1.0)


def slow_step(old: Tensor, new: Tensor, epsilon: float) -> Tensor:
    """Reptile step ``old + ε (new − old)`` (arXiv 1803.02999).

    >>> slow_step(torch.zeros(1), torch.ones(1), 0.25)
    tensor([0.2500])
    """
    return old + epsilon * (new - old)


def row_distillation(student: Tensor, teacher: Tensor, rows: Tensor, known: Tensor | None = None) -> Tensor:
    """Mean over samples of Σ_c (cos(f, w_c) − cos(f_teacher, w_c))² over the rows of past classes.

    Args:
        student: features of the model in training, shape [B, D].
        teacher: features of the model before the experience, shape [B, D], no gradient.
        rows: of the past classes, normalised, shape [C, D].
        known: samples that have a teacher, bool [B]; the others count as unchanged. None means all.
    """
    change = F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)
    squares = (change @ rows.T).square().sum(-1)
    return squares.mean() if known is None else (squares * known).mean()


def masked_logits(logits: Tensor, allowed: Tensor) -> Tensor:
    """Logits [B, C] with −∞ for the classes that `allowed` (bool, [C]) leaves out."""
    return logits.masked_fill(~allowed, float("-inf"))
