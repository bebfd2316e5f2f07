"""Frozen features under the same head: what a method must beat to have learned anything about images."""

from __future__ import annotations

from typing import ClassVar

from avalanche_fmlora.strategies.base import ContinualStrategy
from avalanche_fmlora.strategies.config import MethodConfig
from avalanche_fmlora.strategies.registry import register


class LinearProbeConfig(MethodConfig):
    """Options of the linear probe: those of every method."""


@register
class LinearProbeStrategy(ContinualStrategy):
    """Only the head trains: options are the fields of :class:`LinearProbeConfig`."""

    method: ClassVar[str] = "linear_probe"
    summary: ClassVar[str] = "frozen features, trained head"
    config_class = LinearProbeConfig
    config: LinearProbeConfig
