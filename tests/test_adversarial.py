"""Images moved toward rows of the past: the formula, and the drift that is measured on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avalanche_fmlora.modules import class_rows
from avalanche_fmlora.modules.adversarial import moved_images, nearest_pairs
from avalanche_fmlora.plugins.class_means import ClassMeanPlugin

DRIFTING = {"lr_core": 0.05, "distillation": 0.0, "transport_ridge": 0.1}


def _plugin(strategy: Any) -> ClassMeanPlugin:
    return next(p for p in strategy.plugins if isinstance(p, ClassMeanPlugin))


def _images(experience: Any) -> Tensor:
    return torch.stack([x for x, *_ in experience.dataset.eval()])


@pytest.mark.parametrize(
    ("count", "rows", "each"), [(12, [0, 1, 2], 4), (7, [0, 1, 2], 2), (2, [0, 2], 1), (99, [0, 1, 2], 5)]
)
def test_pairs_are_the_nearest_images_of_each_row(count: int, rows: list[int], each: int) -> None:
    torch.manual_seed(0)
    targets, z = F.normalize(torch.randn(3, 4), dim=-1), F.normalize(torch.randn(5, 4), dim=-1)
    found = list(zip(*(index.tolist() for index in nearest_pairs(targets, z, count)), strict=True))
    expected = [(r, i) for r in rows for i in sorted(range(5), key=lambda i: -float(targets[r] @ z[i]))[:each]]
    assert found == expected


def test_steps_follow_the_gradient_of_the_cosine_at_a_fixed_length() -> None:
    """Twin for features that are a linear map, whose cosine has its gradient in closed form."""
    torch.manual_seed(0)
    weight, images = torch.randn(12, 5).double(), torch.randn(4, 3, 2, 2).double()
    targets = F.normalize(torch.randn(4, 5).double(), dim=-1)
    weight32, x = weight.float(), images.flatten(1)
    for _ in range(2):
        f = x @ weight
        norm = f.norm(dim=-1, keepdim=True)
        cosine = (f * targets).sum(-1, keepdim=True) / norm
        gradient = (targets / norm - cosine * f / norm**2) @ weight.T
        x = x + 0.1 * 12**0.5 * gradient / gradient.norm(dim=-1, keepdim=True)
    moved = moved_images(lambda i: i.flatten(1) @ weight32, images.float(), targets.float(), steps=2, length=0.1)
    torch.testing.assert_close(moved.flatten(1), x.float(), rtol=1e-4, atol=1e-4)
    assert not moved.requires_grad


def test_an_image_without_a_gradient_stays() -> None:
    moved = moved_images(lambda i: i.flatten(1)[:, :2] * 0 + 1, torch.ones(2, 3, 2, 2), F.normalize(torch.ones(2, 2)))
    assert torch.equal(moved, torch.ones(2, 3, 2, 2))


@pytest.mark.parametrize("samples", [6, 1000])
def test_the_map_is_fitted_on_the_experience_and_on_moved_images(
    samples: int, make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    """Twin: images, features before and after, and the ridge map by hand."""
    strategy = train(make_strategy("fm_lora", transport_samples=samples, **DRIFTING), class_benchmark, n=1)
    rows, second = strategy.model.head.rows.clone(), class_benchmark.train_stream[1]
    images = _images(second)
    features = strategy.model.eval().features
    z = F.normalize(features(images).detach(), dim=-1)
    index = [(r, i) for r in range(2) for i in (rows[r] @ z.T).topk(min(len(z), samples) // 2).indices.tolist()]
    toward = rows[[r for r, _ in index]]
    moved = moved_images(features, images[[i for _, i in index]], toward)
    assert ((F.normalize(features(moved), dim=-1) - z[[i for _, i in index]]) * toward).sum(-1).min() > 0
    seen = torch.cat([images, moved])
    before = F.normalize(features(seen).detach(), dim=-1)
    strategy.train(second)
    after = F.normalize(strategy.model.eval().features(seen).detach(), dim=-1)
    assert _plugin(strategy).gains == [
        pytest.approx(class_rows.transport_gain(before, after, 0.1).item(), rel=1e-2, abs=1e-3)
    ]
    transport = class_rows.ridge_transport(before, after, 0.1)
    expected = class_rows.transport_rows(rows, transport)
    torch.testing.assert_close(strategy.model.head.rows[:2], expected, rtol=0, atol=2e-3)
    own = class_rows.ridge_transport(before[: len(images)], after[: len(images)], 0.1)
    assert (class_rows.transport_rows(rows, own) - expected).abs().max() > 1e-2


def test_training_is_the_same_and_no_image_stays(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    """The samples change old rows alone: the core, batches and random numbers are those of a run without them."""
    runs = [train(make_strategy("fm_lora", transport_samples=n, **DRIFTING), class_benchmark, n=2) for n in (0, 10)]
    for one, other in zip(*(s.model.lora.layers for s in runs), strict=True):
        assert torch.equal(one.core, other.core)
    assert torch.equal(*(s.model.head.rows[2:] for s in runs))
    assert not torch.equal(*(s.model.head.rows[:2] for s in runs))
    assert _plugin(runs[1])._moved == []
    assert all(p.grad is None for p in runs[1].model.vit.parameters() if not p.requires_grad)


def test_features_that_never_drift_cost_nothing(
    make_strategy: Any, train: Any, class_benchmark: Any, passes: Any
) -> None:
    counts = []
    for samples in (0, 10):
        options = {"classifier": "class_mean", "row_transport": True, "transport_samples": samples}
        strategy = train(make_strategy("linear_probe", **options), class_benchmark, n=1)
        passes.watch(strategy.model.vit)
        strategy.train(class_benchmark.train_stream[1])
        counts.append(sum(passes.take()))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(("recurring", "targets"), [("per_experience", 2), ("mean", 1), ("trained", 1)])
def test_classes_that_recur_are_targets_by_each_of_their_means(
    recurring: str, targets: int, make_strategy: Any, train: Any, domain_benchmark: Any
) -> None:
    strategy = make_strategy("fm_lora", recurring_rows=recurring, transport_samples=8, **DRIFTING)
    train(strategy, domain_benchmark, n=2)
    head = strategy.model.head
    rows = _plugin(strategy)._past_rows(head)
    assert rows.shape == (targets * head.n_classes, head.dim)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)))
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classifier": "class_mean", "row_transport": True}, False),
        ({"classifier": "class_mean", "row_transport": False}, True),
        ({"classifier": "linear", "row_transport": True}, True),
    ],
)
def test_moved_images_without_effect_are_said(
    make_strategy: Any, caplog: pytest.LogCaptureFixture, options: dict[str, Any], said: bool
) -> None:
    make_strategy("seq_lora", transport_samples=8, **options)
    assert ("transport_samples=8 has no effect" in caplog.text) is said
