"""Class-mean rows: what they are after an experience, for frozen, trained and drifting features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from torch import Tensor

from avalanche_fmlora.modules import class_rows
from avalanche_fmlora.plugins.class_means import ClassMeanPlugin

CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@torch.no_grad()
def _features(strategy: Any, experiences: Any) -> tuple[Tensor, Tensor]:
    """Normalised features of all training images of these experiences under the model as it is."""
    samples = [(x, int(y)) for e in experiences for x, y, *_ in e.dataset.eval()]
    z = strategy.model.eval().features(torch.stack([x for x, _ in samples]))
    return F.normalize(z, dim=-1), torch.tensor([y for _, y in samples])


def whitened(rows: Tensor, covariance: Tensor, shrinkage: float) -> Tensor:
    """With a covariance of any scale."""
    return class_rows.whitened_rows(rows, class_rows.trace_normalized(covariance), shrinkage)


def _means(z: Tensor, y: Tensor) -> Tensor:
    return torch.stack([z[y == c].mean(0) for c in y.unique()])


@pytest.mark.parametrize("benchmark_name", ["class_benchmark", "domain_benchmark"])
def test_ncm_does_not_depend_on_how_the_stream_is_split(
    benchmark_name: str, make_strategy: Any, train: Any, request: pytest.FixtureRequest
) -> None:
    benchmark = request.getfixturevalue(benchmark_name)
    strategy = train(make_strategy("ncm"), benchmark)
    expected = _means(*_features(strategy, benchmark.train_stream))
    torch.testing.assert_close(strategy.model.head.rows, expected, rtol=0, atol=1e-5)
    assert strategy.model.head.counts.sum() == sum(len(e.dataset) for e in benchmark.train_stream)


def test_rows_of_an_experience_are_its_means_under_the_final_model(
    make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    strategy = train(make_strategy("fm_lora", lr_core=0.05), class_benchmark)
    z, y = _features(strategy, [class_benchmark.train_stream[2]])
    torch.testing.assert_close(strategy.model.head.rows[4:], F.normalize(_means(z, y), dim=-1), rtol=0, atol=1e-5)
    norms = strategy.model.head.rows.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_past_rows_follow_the_drift_where_that_explains_it(
    ridge: float, make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    """Twin: both passes by hand, then the ridge map if it explains held-out drift."""
    strategy = make_strategy("fm_lora", transport_ridge=ridge, lr_core=0.05, distillation=0.0)
    train(strategy, class_benchmark, n=1)
    rows = strategy.model.head.rows.clone()
    second = class_benchmark.train_stream[1]
    before, _ = _features(strategy, [second])
    strategy.train(second)
    after, _ = _features(strategy, [second])
    plugin = next(p for p in strategy.plugins if isinstance(p, ClassMeanPlugin))
    gain = class_rows.transport_gain(before, after, ridge).item()
    assert plugin.gains == [pytest.approx(gain, abs=1e-4)]
    moved = class_rows.transport_rows(rows, class_rows.ridge_transport(before, after, ridge)) if gain > 0 else rows
    torch.testing.assert_close(strategy.model.head.rows[:2], moved, rtol=0, atol=1e-4)
    if ridge < 1:
        assert gain > 0
        assert (moved - rows).abs().max() > 1e-3


def test_distillation_holds_the_cosines_to_past_rows(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    """Change of the cosines to past rows on the images of the experience, with and without the term."""
    changes = []
    for weight in (0.0, 100.0):
        strategy = make_strategy("fm_lora", distillation=weight, row_transport=False, lr_core=0.02, train_epochs=8)
        train(strategy, class_benchmark, n=1)
        second = class_benchmark.train_stream[1]
        rows, (before, _) = strategy.model.head.rows.clone(), _features(strategy, [second])
        strategy.train(second)
        after, _ = _features(strategy, [second])
        changes.append(((after - before) @ rows.T).square().sum(-1).mean().item())
    assert changes[1] < 0.3 * changes[0]


def test_the_teacher_costs_no_pass_unless_it_is_asked_for(
    make_strategy: Any, train: Any, class_benchmark: Any, passes: Any
) -> None:
    """Images forwarded in the second experience (16 images, 3 epochs), and what the teacher does to the core."""
    counts, cores = [], []
    for options in ({"distillation": 0.0}, {"teacher": "known"}, {"teacher": "every_step"}):
        strategy = make_strategy("fm_lora", **{"distillation": 1.0, "lr_core": 0.02, "train_epochs": 3, **options})
        train(strategy, class_benchmark, n=1)
        passes.watch(strategy.model.vit)
        strategy.train(class_benchmark.train_stream[1])
        counts.append(sum(passes.take()))
        cores.append(strategy.model.lora.layers[0].core.clone())
    assert counts[1] == counts[0]
    assert counts[2] == counts[0] + 16 * 3
    assert not torch.equal(cores[1], cores[0])
    torch.testing.assert_close(cores[1], cores[2], rtol=1e-3, atol=1e-5)


def test_the_teacher_that_costs_nothing_is_silent_where_inputs_change(
    make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    from avalanche.core import SupervisedPlugin

    class Noise(SupervisedPlugin):
        def before_forward(self, strategy: Any, **kwargs: Any) -> None:
            strategy.mbatch[0] = strategy.mbatch[0] + torch.randn(1, generator=self.generator)

    cores = []
    for weight in (0.0, 1.0):
        noise = Noise()
        noise.generator = torch.Generator().manual_seed(0)
        options = {"plugins": [noise], "lr_core": 0.02, "distillation": weight}
        strategy = train(make_strategy("fm_lora", **options), class_benchmark, n=2)
        cores.append(strategy.model.lora.layers[0].core.clone())
    assert torch.equal(*cores)


def test_the_stability_term_keeps_the_core_in_place(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    changes = []
    for weight in (0.0, 10.0):
        cores: list[Tensor] = []
        strategy = make_strategy("fm_lora", stability=weight, lr_core=0.02, train_epochs=8)
        train(strategy, class_benchmark, n=2, after=lambda s, to=cores: to.append(s.model.lora.layers[0].core.clone()))
        changes.append((cores[1] - cores[0]).norm().item())
    assert changes[1] < 0.5 * changes[0]


@pytest.mark.parametrize(
    ("step", "shares"), [(0.5, [0.5, 0.5]), ("1/t", [1 / 2, 1 / 3]), ("2/(t+1)", [2 / 3, 1 / 2]), (1.0, [1.0, 1.0])]
)
def test_the_averaged_step_keeps_its_share(
    step: Any, shares: list[float], make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    from avalanche.core import SupervisedPlugin

    taken: list[float] = []

    class Twin(SupervisedPlugin):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            self.old = strategy.model.lora.layers[0].core.clone()

        def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            self.full = strategy.model.lora.layers[0].effective_core().detach() - self.old

        def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            change = strategy.model.lora.layers[0].core - self.old
            share = (change * self.full).sum() / self.full.square().sum()
            torch.testing.assert_close(change, share * self.full, rtol=0, atol=1e-6)
            taken.append(share.item())

    train(make_strategy("fm_lora", core_step=step, lr_core=0.02, plugins=[Twin()]), class_benchmark)
    assert taken == pytest.approx([1.0, *shares], rel=1e-4), "the first update is kept whole"


def test_recurring_classes_keep_what_training_made_of_their_rows(
    make_strategy: Any, train: Any, domain_benchmark: Any
) -> None:
    """In the first domain rows are class means; in the next they start from the mean of all and then train."""
    strategy = train(make_strategy("fm_lora", prompt_length=0, lr_core=0.0, lr_head=0.0), domain_benchmark, n=1)
    first = strategy.model.head.rows.clone()
    seen: list[Any] = []

    class Rows(SupervisedPlugin):
        def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            seen.append(strategy.model.head.active_rows.detach().clone())

        def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                strategy.model.head.active_rows.add_(0.25)

    strategy.plugins.append(Rows())
    strategy.train(domain_benchmark.train_stream[1])
    assert not torch.allclose(seen[0], first), "the start counts the new domain's images"
    trained = seen[0] + 0.25 * strategy.train_epochs
    torch.testing.assert_close(strategy.model.head.rows, trained / trained.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("name", ["fm_lora", "ncm"])
def test_whitened_rows_come_from_the_current_experience_alone(
    name: str, make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    """Twin: covariance of the last experience's features under the final model; the rows themselves stay means."""
    strategy = train(make_strategy(name, whitening=0.5, whitening_covariance="current"), class_benchmark)
    head = strategy.model.head
    z, y = _features(strategy, [class_benchmark.train_stream[2]])
    expected = whitened(head.rows, class_rows.within_class_covariance(z, y), 0.5)
    torch.testing.assert_close(head.folded[0], expected, rtol=1e-4, atol=1e-5)
    images = torch.stack([x for x, *_ in class_benchmark.test_stream[0].dataset])
    logits = strategy.model.eval()(images)
    torch.testing.assert_close(
        logits, head.scale * F.normalize(strategy.model.features(images), dim=-1) @ head.folded[0].T
    )
    torch.testing.assert_close(strategy.merged_model().eval()(images), logits, rtol=1e-4, atol=1e-4)


def test_the_running_covariance_is_the_mean_over_samples(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    """Frozen features: the running covariance is the sample-weighted mean of the experiences' own, and is declared."""
    strategy = train(make_strategy("ncm", whitening=0.5, whitening_covariance="running"), class_benchmark)
    parts = [_features(strategy, [e]) for e in class_benchmark.train_stream]
    total = sum(len(y) for _, y in parts)
    expected = sum(class_rows.within_class_covariance(z, y) * len(y) / total for z, y in parts)
    head = strategy.model.head
    torch.testing.assert_close(head.covariance, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.folded[0], whitened(head.rows, expected, 0.5), rtol=1e-3, atol=1e-4)
    assert strategy.model.stored_statistics() == head.dim**2
    assert make_strategy("ncm", whitening=0.5).model.stored_statistics() == 0


@pytest.mark.parametrize("benchmark_name", ["class_benchmark", "domain_benchmark"])
@pytest.mark.parametrize("name", ["fm_lora", "ncm"])
def test_rows_remember_the_covariances_of_the_past(
    name: str, benchmark_name: str, make_strategy: Any, train: Any, request: pytest.FixtureRequest
) -> None:
    """Twin: the past as its class means and prediction rows tell, moved with the drift, then the mean over samples."""
    benchmark, shrinkage = request.getfixturevalue(benchmark_name), 0.3
    options = {"lr_core": 0.05, "transport_ridge": 0.1} if name == "fm_lora" else {}
    strategy = make_strategy(
        *(name,), whitening=shrinkage, whitening_covariance="secant", recurring_rows="per_experience", **options
    )
    train(strategy, benchmark, n=1)
    head, (first, second, third) = strategy.model.head, benchmark.train_stream
    current = class_rows.within_class_covariance(*_features(strategy, [first]))
    torch.testing.assert_close(head.folded[0], whitened(head.rows, current, shrinkage), **CLOSE)
    strategy.train(second)
    means = head.means if len(head.means) else head.rows[None]
    rows, folded = F.normalize(means, dim=-1).double().flatten(0, 1), head.folded.double().flatten(0, 1)
    before, _ = _features(strategy, [third])
    strategy.train(third)
    z, y = _features(strategy, [third])
    if name == "fm_lora":
        assert class_rows.transport_gain(before, z, 0.1) > 0
        moved = torch.eye(head.dim).double() + class_rows.ridge_transport(before, z, 0.1).double()
        rows, folded = F.normalize(rows @ moved, dim=-1), folded @ torch.linalg.inv(moved).T
    solved = folded * (folded * rows).sum(1, keepdim=True)
    current = class_rows.within_class_covariance(z, y).double()
    current = current / current.trace() * head.dim + shrinkage * torch.eye(head.dim).double()
    past = class_rows.secant_covariance(current, rows, solved)
    share = len(y) / sum(len(e.dataset) for e in (first, second, third))
    sigma = past + (current - past) * share
    means = head.means if len(head.means) else head.rows[None]
    expected = torch.stack(
        [class_rows.folded_rows(m, torch.linalg.solve(sigma, F.normalize(m, dim=-1).double().T).T) for m in means]
    )
    torch.testing.assert_close(head.folded.double(), expected, rtol=1e-3, atol=1e-3)
    plain = torch.stack([class_rows.whitened_rows(m, current, 0.0) for m in means])
    assert (head.folded - plain).abs().max() > 1e-2, "the past changes something"
    assert len(head.before) == 0
    assert strategy.model.stored_statistics() == 0


@pytest.mark.parametrize("whitening", [None, 0.5])
def test_one_mean_for_each_experience_of_a_class(
    whitening: float | None, make_strategy: Any, train: Any, domain_benchmark: Any, images: Tensor
) -> None:
    """Twin: means of each domain when it was learned; a class's logit is its largest over the domains."""
    means: list[Tensor] = []

    def remember(strategy: Any) -> None:
        means.append(_means(*_features(strategy, [domain_benchmark.train_stream[len(means)]])))

    options = {"recurring_rows": "per_experience", "whitening": whitening, "whitening_covariance": "current"}
    options |= {"lr_core": 0.05, "row_transport": False}
    strategy = train(make_strategy("fm_lora", **options), domain_benchmark, after=remember)
    head, rows = strategy.model.head, torch.stack([F.normalize(m, dim=-1) for m in means])
    torch.testing.assert_close(F.normalize(head.means, dim=-1), rows, rtol=1e-4, atol=1e-5)
    if whitening:
        covariance = class_rows.within_class_covariance(*_features(strategy, [domain_benchmark.train_stream[-1]]))
        rows = whitened(rows.flatten(0, 1), covariance, whitening).view_as(rows)
    z = F.normalize(strategy.model.eval().features(images), dim=-1)
    expected = torch.stack([head.scale * z @ r.T for r in rows]).max(0).values
    torch.testing.assert_close(strategy.model(images), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(strategy.merged_model().eval()(images), strategy.model(images), rtol=1e-4, atol=1e-4)
    assert head.stored_parameters() == head.n_classes * head.dim * (1 + 2 * len(domain_benchmark.train_stream))


@pytest.mark.parametrize("recurring", ["per_experience", "mean"])
def test_kept_means_of_recurring_classes_follow_the_drift(
    recurring: str, make_strategy: Any, train: Any, domain_benchmark: Any
) -> None:
    """Twin: the ridge map of the second domain's images, by hand; lengths stay."""
    strategy = make_strategy("fm_lora", recurring_rows=recurring, lr_core=0.05, distillation=0.0, transport_ridge=0.1)
    train(strategy, domain_benchmark, n=1)
    first, second = domain_benchmark.train_stream[:2]
    kept = strategy.model.head.rows.clone()
    before, _ = _features(strategy, [second])
    strategy.train(second)
    after, y = _features(strategy, [second])
    assert class_rows.transport_gain(before, after, 0.1) > 0
    moved = class_rows.transport_rows(kept, class_rows.ridge_transport(before, after, 0.1))
    assert (moved - kept).abs().max() > 1e-3
    means = strategy.model.head.means
    if recurring == "mean":
        past, count = (torch.bincount(labels)[:, None] for labels in (_features(strategy, [first])[1], y))
        moved = (moved * past + _means(after, y) * count) / (past + count)
    torch.testing.assert_close(means[0], moved, rtol=0, atol=1e-4)
    if recurring == "per_experience":
        torch.testing.assert_close(means[1], _means(after, y), rtol=0, atol=1e-5)
    lengths = means.norm(dim=-1)
    assert (lengths - 1).abs().max() > 1e-3, "means of unit vectors are shorter"
    strategy.train(domain_benchmark.train_stream[2])
    if recurring == "per_experience":
        torch.testing.assert_close(strategy.model.head.means[:2].norm(dim=-1), lengths, rtol=0, atol=1e-4)


def test_one_mean_over_the_experiences_of_a_class(make_strategy: Any, train: Any, domain_benchmark: Any) -> None:
    parts: list[tuple[Tensor, Tensor]] = []

    def remember(strategy: Any) -> None:
        parts.append(_features(strategy, [domain_benchmark.train_stream[len(parts)]]))

    options = {"recurring_rows": "mean", "whitening": None, "lr_core": 0.05, "row_transport": False}
    strategy = train(make_strategy("fm_lora", **options), domain_benchmark, after=remember)
    head = strategy.model.head
    first, *others = [(_means(z, y), torch.bincount(y)[:, None]) for z, y in parts]
    mean, total = F.normalize(first[0], dim=-1), first[1]
    for part, count in others:
        mean, total = (mean * total + part * count) / (total + count), total + count
    torch.testing.assert_close(head.means[0], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.folded[0], F.normalize(mean, dim=-1), rtol=1e-4, atol=1e-5)
    options = {"recurring_rows": "trained", "whitening": 0.5, "lr_core": 0.05}
    trained = train(make_strategy("fm_lora", **options), domain_benchmark).model.head
    assert len(trained.folded) == len(trained.means) == 0, "rows that went on training are no means: never whitened"


def test_the_end_of_whitening_where_rows_stay_as_trained_is_said_once(
    make_strategy: Any, train: Any, domain_benchmark: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for recurring, times in (("trained", 1), ("mean", 0), ("per_experience", 0)):
        caplog.clear()
        train(make_strategy("fm_lora", recurring_rows=recurring), domain_benchmark)
        assert caplog.text.count("no row is whitened any more") == times
