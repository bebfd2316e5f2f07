"""Formulas of class-mean rows against literal twins in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avalanche_fmlora.modules import class_rows

EXACT = {"rtol": 0.0, "atol": 1e-10}


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_class_means_of_normalised_features() -> None:
    features, labels = _randn(12, 5), torch.tensor([0, 3, 3, 1] * 3)
    classes = torch.tensor([3, 0, 7])
    means, counts = class_rows.class_means(features, labels, classes)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for i, c in enumerate((3, 0)):
        rows = [features[j] / features[j].norm() for j in range(12) if labels[j] == c]
        expected[i] = torch.stack(rows).mean(0)
    torch.testing.assert_close(means, expected, **EXACT)
    assert counts.tolist() == [6, 3, 0]


def test_transport_is_the_ridge_solution_anchored_at_the_identity() -> None:
    before, rotation = _randn(30, 4), torch.linalg.qr(_randn(4, 4, seed=2))[0]
    after = before @ (torch.eye(4).double() + 0.1 * rotation)
    transport = class_rows.ridge_transport(before, after, 2.5)
    torch.testing.assert_close(
        (before.T @ before + 2.5 * torch.eye(4)) @ transport, before.T @ (after - before), **EXACT
    )
    torch.testing.assert_close(class_rows.ridge_transport(before, before, 2.5), torch.zeros(4, 4).double(), **EXACT)
    rows = F.normalize(_randn(3, 4, seed=5), dim=-1)
    for w, moved in zip(rows, class_rows.transport_rows(rows, transport), strict=True):
        expected = w + w @ transport
        torch.testing.assert_close(moved, expected / expected.norm(), **EXACT)
    exact = class_rows.transport_rows(rows, class_rows.ridge_transport(before, after, 1e-9))
    torch.testing.assert_close(exact, F.normalize(rows @ (torch.eye(4).double() + 0.1 * rotation)), rtol=0, atol=1e-8)


def test_transport_gain_on_held_out_samples() -> None:
    before = _randn(40, 4)
    after = before @ (torch.eye(4).double() + 0.1 * _randn(4, 4, seed=2))
    transport = class_rows.ridge_transport(before[::2], after[::2], 3.0)
    drift = (after - before)[1::2]
    residual = sum(float(((d - z @ transport) ** 2).sum()) for d, z in zip(drift, before[1::2], strict=True))
    expected = 1 - residual / float((drift**2).sum())
    assert class_rows.transport_gain(before, after, 3.0).item() == pytest.approx(expected, abs=1e-10)
    assert expected > 0.8
    noise = before + _randn(40, 4, seed=9)
    assert class_rows.transport_gain(before, noise, 1e-6).item() < 0
    rounded = before * (1 + 2 * torch.finfo(before.dtype).eps)  # a drift that a map would explain perfectly
    assert class_rows.transport_gain(before, rounded, 1e-6).item() == 0


def test_within_class_covariance_is_the_pooled_scatter_around_the_means() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(9, 4, dtype=torch.float64), torch.tensor([3, 3, 7, 7, 7, 1, 3, 7, 7])
    scatter = torch.zeros(4, 4, dtype=torch.float64)
    for c in (1, 3, 7):
        z = [F.normalize(f, dim=0) for f, y in zip(features, labels, strict=True) if y == c]
        mean = sum(z) / len(z)
        scatter += sum(torch.outer(x - mean, x - mean) for x in z)
    torch.testing.assert_close(class_rows.within_class_covariance(features, labels), scatter / (9 - 3))


@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
def test_whitened_rows_rank_classes_as_cosines_after_whitening(shrinkage: float) -> None:
    """Twin: whiten rows and features with the symmetric root of Σ⁻¹, then take cosines."""
    torch.manual_seed(0)
    rows, features = torch.randn(5, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    half = torch.randn(6, 6, dtype=torch.float64)
    covariance = class_rows.trace_normalized(half @ half.T)
    assert covariance.trace().item() == pytest.approx(6)
    sigma = covariance + shrinkage * torch.eye(6, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(sigma)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    expected = F.normalize(features @ root, dim=-1) @ F.normalize(rows @ root, dim=-1).T
    folded = class_rows.whitened_rows(rows, covariance, shrinkage)
    given = F.normalize(features, dim=-1) @ folded.T
    ratio = expected / given
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))  # one positive factor an image
    assert (ratio > 0).all()
    plain = class_rows.whitened_rows(rows, covariance, 1e9)
    torch.testing.assert_close(plain * 1e9**0.5, F.normalize(rows, dim=-1), rtol=0, atol=1e-6)
    with_unseen = class_rows.whitened_rows(torch.cat([rows, torch.zeros(1, 6)]), covariance, shrinkage)
    torch.testing.assert_close(with_unseen, torch.cat([folded, torch.zeros(1, 6, dtype=torch.float64)]))


def some_covariance(size: int, seed: int) -> torch.Tensor:
    half = torch.randn(size, 3 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return class_rows.trace_normalized(half @ half.T)


@pytest.mark.parametrize("classes", [1, 4, 7, 12])
def test_whitened_rows_remember_the_covariance_on_the_span_of_classes(classes: int) -> None:
    """Twin: Σ is the only matrix of its kind that maps every Σ⁻¹w to w; elsewhere the guess stands."""
    size, shrinkage = 8, 0.3
    rows = torch.randn(classes, size, dtype=torch.float64, generator=torch.Generator().manual_seed(classes))
    true, guess = some_covariance(size, 1), some_covariance(size, 2)
    sigma, guess = (c + shrinkage * torch.eye(size, dtype=c.dtype) for c in (true, guess))
    solved = class_rows.solved_rows(rows, true, shrinkage)
    back = class_rows.unfolded_rows(rows, class_rows.folded_rows(rows, solved))
    torch.testing.assert_close(back, solved)
    found = class_rows.secant_covariance(guess, rows, back)
    torch.testing.assert_close(found, found.T)
    assert torch.linalg.eigvalsh(found).min() > 0
    torch.testing.assert_close(found @ solved.T, F.normalize(rows, dim=-1).T)
    if classes >= size:
        torch.testing.assert_close(found, sigma)
    else:
        assert (found - sigma).norm() > 0.1, "one class fewer leaves something open"
        unknown = torch.linalg.qr(F.normalize(rows, dim=-1).T, mode="complete").Q[:, classes:]  # u with wᵀu = 0
        torch.testing.assert_close(unknown.T @ found @ unknown, unknown.T @ guess @ unknown)


def test_pairs_that_say_the_same_are_no_harm() -> None:
    rows, sigma = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), some_covariance(8, 1)
    solved, guess = class_rows.solved_rows(rows, sigma, 0.3), some_covariance(8, 2)
    once = class_rows.secant_covariance(guess, rows, solved)
    twice = class_rows.secant_covariance(guess, rows.repeat(2, 1), solved.repeat(2, 1))
    torch.testing.assert_close(twice, once)


def test_whitened_rows_move_with_the_features() -> None:
    """Twin: whitening after the move."""
    torch.manual_seed(0)
    rows, covariance = torch.randn(3, 8, dtype=torch.float64), some_covariance(8, 1)
    transport = 0.1 * torch.randn(8, 8, dtype=torch.float64)
    moved = torch.eye(8, dtype=torch.float64) + transport
    after = torch.linalg.solve(moved.T @ covariance @ moved, (rows @ moved).T).T
    before = torch.linalg.solve(covariance, rows.T).T
    torch.testing.assert_close(class_rows.transport_solved(before, transport), after)
