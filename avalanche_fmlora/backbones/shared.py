"""One loading for all runs of a process: the weights are read, hashed and resampled once, then copied in memory."""

from __future__ import annotations

import copy
import dataclasses
import functools

from avalanche_fmlora.backbones.config import BackboneConfig
from avalanche_fmlora.backbones.loading import Backbone, load_backbone

KEPT = 2
"""Loaded backbones that a process keeps, the latest used: one model's memory each."""


def shared_backbone(config: BackboneConfig) -> Backbone:
    """As :func:`load_backbone`, but loaded once a process; a weights file that has changed is loaded anew.

    Each caller gets a model of its own: nothing that is done to it, adapting and merging included, reaches the next
    caller's. :func:`release_backbones` gives the memory back.
    """
    stamp = None
    if config.weights is not None and config.weights.is_file():
        stat = config.weights.stat()
        stamp = (stat.st_mtime_ns, stat.st_size)
    kept = _kept(config.model_dump_json(), stamp)
    return dataclasses.replace(kept, model=copy.deepcopy(kept.model))


def release_backbones() -> None:
    """Forget all loaded backbones; models handed out stay with their holders."""
    _kept.cache_clear()


@functools.lru_cache(maxsize=KEPT)
def _kept(options: str, stamp: tuple[int, int] | None) -> Backbone:
    return load_backbone(BackboneConfig.model_validate_json(options))
