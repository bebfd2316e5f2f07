"""Plugins that choose among an experience's images are obeyed by all that reads them, in every experience."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin

from avalanche_fmlora.strategies.registry import methods


class FewShot(SupervisedPlugin):
    """Keeps so many images of each class."""

    def __init__(self, shots: int) -> None:
        super().__init__()
        self.shots = shots

    def after_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        labels = [int(c) for c in strategy.adapted_dataset.targets]
        of_class = {c: [i for i, label in enumerate(labels) if label == c] for c in set(labels)}
        kept = sorted(i for members in of_class.values() for i in members[: self.shots])
        strategy.adapted_dataset = strategy.adapted_dataset.subset(kept)


@pytest.mark.parametrize("method", sorted(set(methods()) - {"joint"}))
def test_class_means_are_of_the_images_that_were_kept(
    method: str, make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    strategy = make_strategy(method, classifier="class_mean", plugins=[FewShot(2)])
    train(strategy, class_benchmark)
    assert strategy.model.head.counts.tolist() == [2.0] * 6
    if method == "ncm":
        dataset = class_benchmark.train_stream[2].dataset.eval()
        kept = [i for i, c in enumerate(dataset.targets) if int(c) == 4][:2]
        with torch.no_grad():
            features = strategy.model.features(torch.stack([dataset[i][0] for i in kept]))
        mean = F.normalize(features, dim=-1).mean(0)
        torch.testing.assert_close(strategy.model.head.rows[4], mean, rtol=0, atol=1e-5)


def test_an_experience_without_images_says_so(make_strategy: Any, class_benchmark: Any) -> None:
    strategy = make_strategy("fm_lora", plugins=[FewShot(0)])
    with pytest.raises(ValueError, match="experience 1 has none: leave it out of the stream"):
        strategy.train(class_benchmark.train_stream[1])


def test_classes_without_images_stay_unseen(make_strategy: Any, class_benchmark: Any) -> None:
    """A stream may list a class of which an experience has none."""
    experience = class_benchmark.train_stream[0]
    whole = experience.dataset
    try:
        experience.dataset = whole.subset([i for i, c in enumerate(whole.targets) if int(c) == 0])
        strategy = make_strategy("seq_lora")
        strategy.train(experience)
    finally:
        experience.dataset = whole
    assert strategy.model.head.seen.tolist() == [True]
