"""Imprinted rows: they start as class means of new classes, train, and are written by nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from torch import Tensor

from avalanche_fmlora.strategies.registry import methods

LINEAR = {"row_transport": False, "whitening": None}


@torch.no_grad()
def _means(strategy: Any, experience: Any) -> tuple[Tensor, Tensor]:
    """Normalised means of normalised features under the model as it is, and their classes."""
    samples = [(x, int(y)) for x, y, *_ in experience.dataset.eval()]
    features = strategy.features(torch.stack([x for x, _ in samples]))
    labels = torch.tensor([y for _, y in samples])
    z, classes = F.normalize(features, dim=-1), labels.unique()
    return F.normalize(torch.stack([z[labels == c].mean(0) for c in classes]), dim=-1), classes


class _Starts(SupervisedPlugin):
    """What the rows in training were before the first step, and what they should be."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Tensor] = []
        self.means: list[Tensor] = []

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.clock.train_exp_epochs == 0:
            self.rows.append(strategy.model.head.active_rows.detach().clone())
            self.means.append(_means(strategy, strategy.experience)[0])


@pytest.mark.parametrize("method", sorted(set(methods()) - {"joint", "ncm"}))
def test_new_rows_start_as_means_train_and_are_left_alone(
    method: str, make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    starts, ends = _Starts(), list[Tensor]()
    strategy = make_strategy(method, classifier="imprinted", plugins=[starts], lr_head=0.01)
    train(strategy, class_benchmark, after=lambda s: ends.append(s.model.head.rows.clone()))
    for start, means in zip(starts.rows, starts.means, strict=True):
        torch.testing.assert_close(start, means, rtol=0, atol=1e-5)
    for t, start in enumerate(starts.rows):
        trained = ends[t][2 * t : 2 * t + 2]
        assert (trained - start).abs().max() > 1e-3, "they train"
        assert all(torch.equal(later[2 * t : 2 * t + 2], trained) for later in ends[t:]), "and stay what they became"


def test_a_class_that_recurs_goes_on_from_its_row(make_strategy: Any, train: Any, domain_benchmark: Any) -> None:
    starts, ends = _Starts(), list[Tensor]()
    strategy = make_strategy("seq_lora", classifier="imprinted", plugins=[starts])
    train(strategy, domain_benchmark, after=lambda s: ends.append(s.model.head.rows.clone()))
    torch.testing.assert_close(starts.rows[0], starts.means[0], rtol=0, atol=1e-5)
    assert torch.equal(starts.rows[1], ends[0])
    assert torch.equal(starts.rows[2], ends[1])


def test_nothing_is_stored_but_rows_and_the_free_teacher_is_silent(
    make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    imprinted, cosine = (
        train(make_strategy("fm_lora", classifier=c, **LINEAR), class_benchmark) for c in ("imprinted", "cosine")
    )
    assert {k: v.shape for k, v in imprinted.model.state_dict().items()} == {
        k: v.shape for k, v in cosine.model.state_dict().items()
    }
    assert not imprinted.model.head.counts.any(), "without means of the past there is nothing to distil"
