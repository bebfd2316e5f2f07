"""Each formula against a literal reference twin: loops and definitions, float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_fmlora.modules import functional
from avalanche_fmlora.modules.factorized_lora import FactorizedLinear
from avalanche_fmlora.modules.rank_selector import RankSelector, default_candidates

EXACT = {"rtol": 0.0, "atol": 1e-10}


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _reference_core(core: Tensor, left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """C + Σ_j m_j · M[:, j] N[:, j]ᵀ."""
    out = core.clone()
    for j in range(core.shape[-1]):
        out += mask[j] * torch.outer(left[:, j], right[:, j])
    return out


def test_update_core_is_the_sum_of_masked_outer_products() -> None:
    core, left, right = (_randn(5, 5, seed=s) for s in range(3))
    mask = torch.tensor([1, 1, 1, 0, 0], dtype=torch.float64)
    new = functional.update_core(core, left, right, mask)
    torch.testing.assert_close(new, _reference_core(core, left, right, mask), **EXACT)
    assert torch.linalg.matrix_rank(new - core) == 3


@pytest.mark.parametrize("slices", [[(0, 6)], [(0, 2), (4, 6)], [(2, 4)], [(0, 2), (2, 4), (4, 6)], [(4, 6)]])
@pytest.mark.parametrize("masked", [False, True])
def test_factorized_linear_is_the_published_sum(slices: list[tuple[int, int]], masked: bool) -> None:
    """h = W₀x + b + s · A (C + M diag(m) Nᵀ) B x, slice by slice and sample by sample."""
    base = nn.Linear(7, 6).double()
    layer = FactorizedLinear(base, slices, rank=2, scale=0.7)
    layer.begin_update(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, tensor in enumerate((layer.up, layer.down, layer.core, layer.left, layer.right)):
            tensor.copy_(_randn(*tensor.shape, seed=i))
    layer.mask = torch.tensor([1.0, 0.0], dtype=torch.float64) if masked else None
    x = _randn(3, 4, 7, seed=9)

    expected = x @ base.weight.T + base.bias
    for p, (start, stop) in enumerate(slices):
        mask = torch.ones(2, dtype=torch.float64) if layer.mask is None else layer.mask
        core = _reference_core(layer.core[p], layer.left[p].detach(), layer.right[p].detach(), mask)
        for b in range(3):
            for n in range(4):
                expected[b, n, start:stop] += 0.7 * (layer.up[p] @ (core @ (layer.down[p] @ x[b, n])))

    torch.testing.assert_close(layer(x), expected, **EXACT)
    delta = F.linear(x, layer.delta_weight())
    torch.testing.assert_close(delta, expected - base(x), **EXACT)
    torch.testing.assert_close(layer.to_linear()(x), expected, **EXACT)


def test_svd_bases_keep_the_product_and_are_orthonormal() -> None:
    up, down, core = _randn(9, 4, seed=1), _randn(4, 6, seed=2), _randn(4, 4, seed=3)
    a, c, b = functional.svd_bases(up, down, core)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(a @ c @ b, up @ core @ down, **EXACT)
    torch.testing.assert_close(a.T @ a, eye, **EXACT)
    torch.testing.assert_close(b @ b.T, eye, **EXACT)
    torch.testing.assert_close(c.diagonal(), torch.linalg.svdvals(up @ core @ down)[:4], **EXACT)
    assert torch.equal(c, torch.diag(c.diagonal()))


def test_rank_mask_is_the_mixture_of_step_functions() -> None:
    candidates, choice = torch.tensor([1, 3, 6]), torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    expected = torch.zeros(2, 6, dtype=torch.float64)
    for g in range(2):
        for j in range(1, 7):
            for k in range(3):
                expected[g, j - 1] += choice[g, k] * (1 if j <= candidates[k] else 0)
    torch.testing.assert_close(functional.rank_mask(choice, candidates, 6), expected, **EXACT)


def test_target_rank_and_prior() -> None:
    assert functional.target_rank(0.6, 0.25, 2, 10) == pytest.approx(2 + 8 * 0.6 * 0.75, abs=1e-12)
    ranks = torch.tensor([2, 4, 8, 16])
    expected = torch.tensor([-((r - 5.0) ** 2) / (2 * 3.0**2) for r in (2, 4, 8, 16)])
    torch.testing.assert_close(functional.rank_prior(ranks, 5.0, 3.0), expected)


def test_gumbel_is_one_hot_to_the_bit_and_has_the_gradient_of_the_relaxed_sample() -> None:
    logits = _randn(50, 4).requires_grad_(True)
    weight = _randn(50, 4, seed=1)
    sample = functional.straight_through_gumbel(logits, 0.7, torch.Generator().manual_seed(3))
    assert set(sample.detach().unique().tolist()) == {0.0, 1.0}
    assert torch.equal(sample.sum(-1), torch.ones(50, dtype=torch.float64))
    (gradient,) = torch.autograd.grad((sample * weight).sum(), logits)

    uniform = torch.rand(50, 4, generator=torch.Generator().manual_seed(3))
    noise = -torch.log(-torch.log(uniform.clamp(1e-10, 1 - 1e-7))).double()
    relaxed = ((logits + noise) / 0.7).softmax(-1)
    (expected,) = torch.autograd.grad((relaxed * weight).sum(), logits)
    torch.testing.assert_close(gradient, expected, **EXACT)
    assert torch.equal(sample.argmax(-1), relaxed.argmax(-1))


def test_gumbel_samples_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20_000, 3)
    shares = functional.straight_through_gumbel(logits, 0.5, torch.Generator().manual_seed(0)).mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.0, 1.0, 2.0]).softmax(0), rtol=0, atol=0.015)


def test_selector_logits_are_prior_plus_delta_and_kl_is_the_definition() -> None:
    selector = RankSelector(8, (1, 2, 4, 8), sigma=0.5, n_groups=2).double()
    target = selector.begin(complexity=0.5, similarity=0.2)
    assert target == pytest.approx(1 + 7 * 0.5 * 0.8, abs=1e-12)
    with torch.no_grad():
        selector.delta.copy_(_randn(2, 4))
    prior = torch.tensor([-((r - target) ** 2) / (2 * 4.0**2) for r in (1, 2, 4, 8)], dtype=torch.float64)
    # The prior's logits are made in float32, the type of the module when it begins in practice.
    torch.testing.assert_close(selector.logits, prior + selector.delta, rtol=0, atol=1e-6)
    expected = torch.zeros((), dtype=torch.float64)
    for g in range(2):
        p, q = selector.logits[g].detach().softmax(0), selector.prior[g].softmax(0)
        expected = expected + sum(p[k] * math.log(p[k] / q[k]) for k in range(4)) / 2
    torch.testing.assert_close(selector.kl().detach(), expected, **EXACT)
    ranks, masks = selector.choose()
    assert masks.sum(-1).tolist() == list(ranks)
    assert ranks == tuple((1, 2, 4, 8)[int(k)] for k in selector.logits.argmax(-1))


def test_selector_forgets_delta_and_starts_at_kl_zero() -> None:
    selector = RankSelector(8)
    with torch.no_grad():
        selector.delta.fill_(1.0)[0, 0] = 5.0
    selector.begin(0.3, 0.0)
    assert selector.delta.abs().sum() == 0
    assert selector.kl().item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("complexity", "similarity", "rank"), [(1.0, 0.0, 8), (0.0, 0.0, 1), (1.0, 1.0, 1)])
def test_extremes_choose_extreme_ranks(complexity: float, similarity: float, rank: int) -> None:
    selector = RankSelector(8, sigma=0.1)
    selector.begin(complexity, similarity)
    assert selector.choose()[0] == (rank,)


@pytest.mark.parametrize("candidates", [(), (0, 2), (2, 1), (2, 2), (4, 9)])
def test_bad_candidates_are_named(candidates: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`candidates` to be increasing ranks between 1 and 8"):
        RankSelector(8, candidates)


def test_default_candidates_of_small_ranks() -> None:
    assert [default_candidates(r) for r in (1, 2, 3, 4, 10)] == [(1,), (1, 2), (1, 3), (1, 2, 4), (1, 2, 5, 10)]


def test_spectral_entropy_is_the_entropy_of_the_covariance_eigenvalues() -> None:
    z = _randn(20, 5).float()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(z.T.double()))
    p = (eigenvalues / eigenvalues.sum()).tolist()
    expected = -sum(x * math.log(x) for x in p) / math.log(5)
    assert functional.spectral_entropy(z).item() == pytest.approx(expected, abs=1e-5)
    line = torch.arange(9.0)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    assert functional.spectral_entropy(line).item() == pytest.approx(0, abs=1e-4)
    assert functional.spectral_entropy(torch.zeros(6, 4)).item() == 0
    assert functional.spectral_entropy(z[:2]).item() == 0


def _reference_difficulty(features: Tensor, labels: Tensor, ridge: float) -> float:
    classes = sorted(set(labels.tolist()))
    fit: list[int] = []
    held_out: list[int] = []
    for c in classes:
        for position, i in enumerate((labels == c).nonzero().flatten().tolist()):
            (held_out if position % 2 else fit).append(i)
    z = features / features.norm(dim=1, keepdim=True)
    mean = z[fit].mean(0)
    x, y = z[fit] - mean, torch.stack([(labels[fit] == c).to(z) for c in classes], 1)
    penalty = ridge * (x @ x.T).diagonal().mean()
    w = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]).to(z), x.T @ (y - y.mean(0)))
    wrong = [classes[int(((z[i] - mean) @ w).argmax())] != int(labels[i]) for i in held_out]
    return min(1.0, (sum(wrong) / len(wrong)) / (1 - 1 / len(classes)))


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_probe_difficulty_is_a_ridge_regression_on_every_second_sample(spread: float) -> None:
    labels = torch.arange(60) % 4
    features = _randn(4, 6, seed=1)[labels] + spread * _randn(60, 6, seed=2)
    value = functional.probe_difficulty(features.float(), labels).item()
    assert value == pytest.approx(_reference_difficulty(features, labels, 1.0), abs=1e-6)
    h = functional.complexity(features.float(), labels)
    assert h.item() == pytest.approx(0.5 * functional.spectral_entropy(features.float()).item() + 0.5 * value, abs=1e-6)


def test_probe_difficulty_without_anything_to_measure() -> None:
    features = _randn(6, 4).float()
    assert functional.probe_difficulty(features, torch.zeros(6, dtype=torch.long)).item() == 0
    assert functional.probe_difficulty(features, torch.arange(6)).item() == 1


def test_core_similarity_is_one_cosine_over_all_maps() -> None:
    gradients, cores = [_randn(2, 3, 3, seed=s) for s in (0, 1)], [_randn(2, 3, 3, seed=s) for s in (2, 3)]
    dot = sum(float((-g * c).sum()) for g, c in zip(gradients, cores, strict=True))
    norms = [math.sqrt(sum(float((x**2).sum()) for x in xs)) for xs in (gradients, cores)]
    cosine = dot / (norms[0] * norms[1])
    assert cosine != 0
    signed = cores if cosine > 0 else [-c for c in cores]
    assert functional.core_similarity(gradients, signed).item() == pytest.approx(abs(cosine), abs=1e-10)
    assert functional.core_similarity(gradients, [-c for c in signed]).item() == 0
    assert functional.core_similarity(gradients, [torch.zeros_like(c) for c in cores]).item() == 0


def test_row_distillation_is_the_squared_change_of_cosines() -> None:
    student, teacher, rows = _randn(6, 5), _randn(6, 5, seed=1), F.normalize(_randn(3, 5, seed=2), dim=-1)
    total = 0.0
    for f, g in zip(student, teacher, strict=True):
        for w in rows:
            total += float((F.cosine_similarity(f, w, dim=0) - F.cosine_similarity(g, w, dim=0)) ** 2)
    assert functional.row_distillation(student, teacher, rows).item() == pytest.approx(total / 6, abs=1e-10)


def test_masked_logits_leave_classes_out_of_the_softmax() -> None:
    logits, allowed = _randn(4, 5), torch.tensor([True, False, True, True, False])
    target = torch.tensor([0, 1, 2, 0])
    loss = F.cross_entropy(functional.masked_logits(logits, allowed), torch.tensor([0, 2, 3, 0]))
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, allowed], target), **EXACT)


def test_slow_step_is_a_convex_combination() -> None:
    old, new = _randn(3, 3), _randn(3, 3, seed=1)
    torch.testing.assert_close(functional.slow_step(old, new, 0.3), 0.7 * old + 0.3 * new, **EXACT)
    torch.testing.assert_close(functional.slow_step(old, new, 1.0), new, **EXACT)


@pytest.mark.parametrize(("later", "rank"), [(0.4, 8), (0.8, 8), (0.2, 4), (0.1, 2)])
def test_a_rank_is_sized_by_the_complexity_of_the_first_experience(later: float, rank: int) -> None:
    """As complex as the first or more: all of the subspace; half, a quarter as complex: less of it."""
    selector = RankSelector(8, sigma=0.1)
    selector.begin(functional.relative_complexity(later, 0.4), similarity=0.0)
    assert selector.choose()[0] == (rank,)
