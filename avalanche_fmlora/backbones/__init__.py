"""Backbones: a name or a file -> a frozen-to-be timm ViT."""

from avalanche_fmlora.backbones.config import BackboneConfig
from avalanche_fmlora.backbones.files import file_sha256, state_sha256
from avalanche_fmlora.backbones.loading import Backbone, load_backbone
from avalanche_fmlora.backbones.registry import EMBEDDED, SHORT_NAMES, BackboneFacts, full_name, known_backbones
from avalanche_fmlora.backbones.shared import fetch_backbone, release_backbones, shared_backbone

__all__ = [
    "EMBEDDED",
    "SHORT_NAMES",
    "Backbone",
    "BackboneConfig",
    "BackboneFacts",
    "fetch_backbone",
    "file_sha256",
    "full_name",
    "known_backbones",
    "load_backbone",
    "release_backbones",
    "shared_backbone",
    "state_sha256",
]
