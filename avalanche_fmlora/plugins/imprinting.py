"""Imprinted rows: cosine rows that start as class means and then only train."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from torch import Tensor

from avalanche_fmlora.modules import class_rows


class ImprintingPlugin(SupervisedPlugin):
    """Rows of new classes start as means of their normalised features and keep what training makes of them.

    A class that recurs goes on from its row. Weight imprinting with fine-tuning: Qi et al., CVPR 2018 (1712.07136).
    """

    def __init__(self) -> None:
        super().__init__()
        self._classes: Tensor = torch.zeros(0, dtype=torch.long)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """First rows of new classes, from features as the experience begins."""
        head = strategy.model.head
        features, labels = strategy.features_at_start()
        self._classes = labels.unique()
        new = self._classes[head.occurrences[self._classes] == 0]
        if len(new):
            means, _ = class_rows.class_means(features, labels, new)
            head.write(new, F.normalize(means, dim=-1))

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """From now on the classes are known."""
        strategy.model.head.occurrences[self._classes] += 1
