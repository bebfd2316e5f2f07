"""Nearest class mean on frozen features (SimpleCIL, arXiv 2303.07338): no training at all."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

from avalanche.core import BasePlugin

from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.modules.vit import TimmViT
from avalanche_fmlora.plugins.lifecycle import ExperiencePlugin
from avalanche_fmlora.strategies.base import ContinualStrategy
from avalanche_fmlora.strategies.config import MethodConfig
from avalanche_fmlora.strategies.registry import register

_LOG = logging.getLogger(__name__)


class NCMConfig(MethodConfig):
    """Options of nearest class mean. Nothing trains, so rates have no effect."""

    classifier: Literal["class_mean"] = "class_mean"
    """Rows are class means."""


@register
class NCMStrategy(ContinualStrategy):
    """Cosine to the means of the normalised frozen features; one pass over the training images, no epochs.

    Options are the fields of :class:`NCMConfig`; the source is Zhou et al., arXiv 2303.07338 (SimpleCIL).
    """

    method: ClassVar[str] = "ncm"
    summary: ClassVar[str] = "class means of frozen features"
    paper: ClassVar[str] = "arXiv 2303.07338"
    config_class = NCMConfig
    config: NCMConfig

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.train_epochs = 0

    def build_network(self, vit: TimmViT) -> ContinualNetwork:
        """A head whose rows are not parameters."""
        head = self.build_head(vit)
        head.frozen = True
        return ContinualNetwork(vit, head)

    def build_plugins(self) -> list[BasePlugin]:
        """Rows are written when the experience ends."""
        if self.config.transport_samples:
            _LOG.warning("transport_samples=%d has no effect here: features never move.", self.config.transport_samples)
        return [ExperiencePlugin(), self._class_mean_plugin(train_rows=False)]
