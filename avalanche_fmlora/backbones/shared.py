"""One loading for all runs of a process: the weights are read, hashed and resampled once, then copied in memory."""

from __future__ import annotations

import copy
import dataclasses
import functools

from avalanche_fmlora.backbones.config import BackboneConfig
from avalanche_fmlora.backbones.loading import Backbone, load_backbone
from avalanche_fmlora.backbones.registry import EMBEDDED

KEPT = 2
"""Loaded backbones that a process keeps, the latest used: one model's memory each."""


def shared_backbone(config: BackboneConfig) -> Backbone:
    """As :func:`load_backbone`, but loaded once a process; a weights file that has changed is loaded anew.

    Each caller gets a model of its own: nothing that is done to it, adapting and merging included, reaches the next
    caller's. :func:`release_backbones` gives the memory back.
    """
    kept = _kept(config.model_dump_json(), _stamp(config))
    return dataclasses.replace(kept, model=copy.deepcopy(kept.model))


def fetch_backbone(config: BackboneConfig) -> None:
    """Have the hub's weights on this machine, before many runs start that need them; nothing to do for others.

    Raises:
        FileNotFoundError: if the hub can't be reached and the weights are not here; it names the way by a file.
        ValueError: see :func:`load_backbone`.
    """
    if config.weights is None and config.pretrained and config.name != EMBEDDED:
        _fetch_once(config.model_dump_json())


def release_backbones() -> None:
    """Forget all loaded backbones; models handed out stay with their holders."""
    _kept.cache_clear()
    _fetch_once.cache_clear()


def _stamp(config: BackboneConfig) -> tuple[int, int] | None:
    """Changes with the weights file."""
    if config.weights is None or not config.weights.is_file():
        return None
    stat = config.weights.stat()
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=KEPT)
def _kept(options: str, stamp: tuple[int, int] | None) -> Backbone:
    return load_backbone(BackboneConfig.model_validate_json(options))


@functools.cache
def _fetch_once(options: str) -> None:
    _kept(options, None)
