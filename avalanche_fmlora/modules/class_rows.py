"""The formulas of class-mean rows, each a pure function: means, how they follow drift, how they are whitened.

Letters: D width, C classes, M samples. All is this package's own; none of it is in the paper (arXiv 2504.08823).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def class_means(features: Tensor, labels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the normalised features of each class, and how many samples each has.

    Args:
        features: shape [M, D].
        labels: shape [M].
        classes: the classes wanted, in any order, shape [C].

    Returns:
        Means [C, D] (not normalised; zero for a class without samples) and counts [C].
    """
    index = torch.full((int(max(classes.max(), labels.max())) + 1,), -1, device=labels.device)
    index[classes] = torch.arange(len(classes), device=labels.device)
    slot = index[labels]
    keep = slot >= 0
    z = F.normalize(features[keep], dim=-1)
    sums = z.new_zeros(len(classes), z.shape[-1]).index_add_(0, slot[keep], z)
    counts = torch.bincount(slot[keep], minlength=len(classes)).to(z)
    return sums / counts.clamp(min=1)[:, None], counts


def ridge_transport(before: Tensor, after: Tensor, ridge: float) -> Tensor:
    """Ridge map R of ``z₁ − z₀ ≈ z₀ R``: the drift of the features, anchored at the identity (R = 0 for no drift).

    Args:
        before: normalised features z₀ before the experience, shape [M, D].
        after: z₁ of the same images after it.
        ridge: strength of the anchor, in samples.

    Returns:
        R, shape [D, D].
    """
    gram = before.T @ before
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, before.T @ (after - before))


def transport_gain(before: Tensor, after: Tensor, ridge: float) -> Tensor:
    """Share of the drift that a map fitted on one half of the samples explains on the other half: 1 all, ≤ 0 none.

    Args:
        before: normalised features, shape [M, D].
        after: the same images after the experience.
        ridge: as in :func:`ridge_transport`.

    Returns:
        A scalar; 0 where the drift is no more than the rounding of the features.
    """
    fit, held_out = slice(0, None, 2), slice(1, None, 2)
    drift = after[held_out] - before[held_out]
    rounding = 8 * torch.finfo(before.dtype).eps * before[held_out].norm()
    if drift.norm() <= rounding:
        return drift.new_zeros(())
    error = drift - before[held_out] @ ridge_transport(before[fit], after[fit], ridge)
    return 1 - error.square().sum() / drift.square().sum()


def transport_solved(solved: Tensor, transport: Tensor) -> Tensor:
    """``v ← v (I + R)⁻ᵀ``: whitened rows moved along, so that their products with moved features and rows stay.

    Features move as ``z ← z (I + R)``, their covariance as ``Σ ← (I + R)ᵀ Σ (I + R)``, and ``Σ⁻¹w`` accordingly. Shapes
    [C, D] and [D, D] -> float64 [C, D].
    """
    moved = torch.eye(len(transport), dtype=torch.float64, device=transport.device) + transport.double()
    return torch.linalg.solve(moved, solved.double().T).T


def transport_rows(rows: Tensor, transport: Tensor) -> Tensor:
    """Old classifier rows moved along: ``w ← normalise(w + w R)``, shapes [C, D] and [D, D]."""
    return F.normalize(rows + rows @ transport, dim=-1)


def within_class_covariance(features: Tensor, labels: Tensor) -> Tensor:
    """Covariance of the normalised features around the mean of their class, pooled over classes.

    Args:
        features: shape [M, D].
        labels: shape [M].

    Returns:
        Shape [D, D]; zero if no class has two samples.

    >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    >>> within_class_covariance(z, torch.tensor([4, 4, 7]))
    tensor([[ 0.5000, -0.5000],
            [-0.5000,  0.5000]])
    """
    classes = labels.unique()
    means, _ = class_means(features, labels, classes)
    residuals = F.normalize(features, dim=-1) - means[torch.searchsorted(classes, labels)]
    return residuals.T @ residuals / max(1, len(labels) - len(classes))


def trace_normalized(covariance: Tensor) -> Tensor:
    """The covariance [..., D, D] over the mean of its diagonal, in float64; zero stays zero."""
    sigma = covariance.double()
    spread = sigma.diagonal().mean()
    return sigma / spread if spread > 0 else torch.zeros_like(sigma)


def solved_rows(rows: Tensor, covariance: Tensor, shrinkage: float) -> Tensor:
    """``Σ⁻¹w`` of class means w with ``Σ = S + λI``, S a :func:`trace_normalized` covariance: [C, D] -> float64 [C, D].

    Args:
        rows: normalised here; a row of zeros stays one.
        covariance: S, shape [D, D].
        shrinkage: λ > 0.
    """
    sigma = covariance + shrinkage * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.solve(sigma, F.normalize(rows.double(), dim=-1).T).T


def folded_rows(rows: Tensor, solved: Tensor) -> Tensor:
    """Rows whose products with features rank the classes as their cosines after whitening do.

    Classes are told apart by ``cos(Σ^-½ f, Σ^-½ w_c)``. The length of ``Σ^-½ f`` is the same for all classes, so
    ``f · Σ⁻¹w_c / |Σ^-½ w_c|`` ranks them alike, and prediction needs rows alone.

    Args:
        rows: class means w, normalised here, shape [C, D].
        solved: ``Σ⁻¹w``, shape [C, D].
    """
    w = F.normalize(rows.double(), dim=-1)
    return solved / (solved * w).sum(-1, keepdim=True).clamp_min(1e-30).sqrt()


def whitened_rows(rows: Tensor, covariance: Tensor, shrinkage: float) -> Tensor:
    """Class means [C, D] -> :func:`folded_rows` of them, for a :func:`trace_normalized` covariance [D, D].

    >>> whitened_rows(torch.tensor([[3.0, 4.0]]), torch.eye(2, dtype=torch.float64), 3.0)
    tensor([[0.3000, 0.4000]])
    """
    return folded_rows(rows, solved_rows(rows, covariance, shrinkage)).to(rows)


def unfolded_rows(rows: Tensor, folded: Tensor) -> Tensor:
    """``Σ⁻¹w`` again of :func:`folded_rows`: shapes [C, D] and [C, D] -> float64 [C, D]."""
    w = F.normalize(rows.double(), dim=-1)
    return folded.double() * (folded.double() * w).sum(-1, keepdim=True)


def secant_covariance(covariance: Tensor, rows: Tensor, solved: Tensor, tolerance: float = 1e-6) -> Tensor:
    """The covariance nearest to a guess that maps ``Σ⁻¹w`` to w: what whitened rows remember of Σ.

    A class mean w and its whitened row ``v = Σ⁻¹w`` are a secant pair ``Σv = w``, so C classes fix Σ on the span of C
    directions. There it is taken from the pairs, elsewhere from the guess: the update of Davidon, Fletcher and Powell
    in its block form (Schnabel, 1983), which stays symmetric and positive definite.

    Args:
        covariance: the guess, shape [D, D].
        rows: w, normalised here, shape [C, D].
        solved: v, shape [C, D].
        tolerance: combinations of pairs whose share of ``wᵀv`` is below this, relative to the largest, are left out.

    Returns:
        float64 [D, D]; with exact pairs ``Σv = w``.

    >>> sigma = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> w = torch.eye(2)
    >>> secant_covariance(torch.eye(2), w, torch.linalg.solve(sigma, w.double().T).T)
    tensor([[2.0000, 1.0000],
            [1.0000, 3.0000]], dtype=torch.float64)
    """
    guess, w, v = covariance.double(), F.normalize(rows.double(), dim=-1).T, solved.double().T
    products = v.T @ w
    values, vectors = torch.linalg.eigh((products + products.T) / 2)
    kept = values > tolerance * values.max().clamp_min(1e-30)
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    rest = torch.eye(len(guess), dtype=guess.dtype, device=guess.device) - w @ inverse @ v.T
    return rest @ guess @ rest.T + w @ inverse @ w.T
