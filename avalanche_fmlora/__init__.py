"""FM-LoRA and its rivals as Avalanche strategies: pretrained vision transformers that go on learning.

Names are imported when they are first used: `import avalanche_fmlora` itself loads neither torch nor Avalanche.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "FMLoRAStrategy": "strategies.fm_lora",
    "FM_LORA_CLASSIFIER": "strategies.fm_lora",
    "SeqLoRAStrategy": "strategies.seq_lora",
    "LinearProbeStrategy": "strategies.linear_probe",
    "NCMStrategy": "strategies.ncm",
    "JointStrategy": "strategies.joint",
    "L2PStrategy": "strategies.l2p",
    "DualPromptStrategy": "strategies.dual_prompt",
    "CODAPromptStrategy": "strategies.coda_prompt",
    "InfLoRAStrategy": "strategies.inflora",
    "SDLoRAStrategy": "strategies.sd_lora",
    "RankSelectionPlugin": "plugins.rank_selection",
    "MetaPromptPlugin": "plugins.meta_prompt",
    "CheckpointPlugin": "plugins.checkpoint",
    "split_glyphs": "data.glyphs",
    "domain_glyphs": "data.glyphs",
    "uneven_glyphs": "data.uneven_glyphs",
    "image_folder": "data.image_folder",
    "split_cifar100": "data.cifar100",
    "split_imagenet_r": "data.imagenet_r",
    "split_cub200": "data.cub200",
    "domainnet": "data.domainnet",
    "domainnet_cil": "data.domainnet",
    "glyph_vit": "data.glyph_vit",
    "load_backbone": "backbones",
    "BackboneConfig": "backbones",
    "compare": "comparison",
    "WeightsAndBiasesLogger": "loggers",
}
__all__ = [*_WHERE, "__version__"]

if TYPE_CHECKING:
    from avalanche_fmlora.backbones import BackboneConfig as BackboneConfig
    from avalanche_fmlora.backbones import load_backbone as load_backbone
    from avalanche_fmlora.comparison import compare as compare
    from avalanche_fmlora.data.cifar100 import split_cifar100 as split_cifar100
    from avalanche_fmlora.data.cub200 import split_cub200 as split_cub200
    from avalanche_fmlora.data.domainnet import domainnet as domainnet
    from avalanche_fmlora.data.domainnet import domainnet_cil as domainnet_cil
    from avalanche_fmlora.data.glyph_vit import glyph_vit as glyph_vit
    from avalanche_fmlora.data.glyphs import domain_glyphs as domain_glyphs
    from avalanche_fmlora.data.glyphs import split_glyphs as split_glyphs
    from avalanche_fmlora.data.image_folder import image_folder as image_folder
    from avalanche_fmlora.data.imagenet_r import split_imagenet_r as split_imagenet_r
    from avalanche_fmlora.data.uneven_glyphs import uneven_glyphs as uneven_glyphs
    from avalanche_fmlora.loggers import WeightsAndBiasesLogger as WeightsAndBiasesLogger
    from avalanche_fmlora.plugins.checkpoint import CheckpointPlugin as CheckpointPlugin
    from avalanche_fmlora.plugins.meta_prompt import MetaPromptPlugin as MetaPromptPlugin
    from avalanche_fmlora.plugins.rank_selection import RankSelectionPlugin as RankSelectionPlugin
    from avalanche_fmlora.strategies.coda_prompt import CODAPromptStrategy as CODAPromptStrategy
    from avalanche_fmlora.strategies.dual_prompt import DualPromptStrategy as DualPromptStrategy
    from avalanche_fmlora.strategies.fm_lora import FM_LORA_CLASSIFIER as FM_LORA_CLASSIFIER
    from avalanche_fmlora.strategies.fm_lora import FMLoRAStrategy as FMLoRAStrategy
    from avalanche_fmlora.strategies.inflora import InfLoRAStrategy as InfLoRAStrategy
    from avalanche_fmlora.strategies.joint import JointStrategy as JointStrategy
    from avalanche_fmlora.strategies.l2p import L2PStrategy as L2PStrategy
    from avalanche_fmlora.strategies.linear_probe import LinearProbeStrategy as LinearProbeStrategy
    from avalanche_fmlora.strategies.ncm import NCMStrategy as NCMStrategy
    from avalanche_fmlora.strategies.sd_lora import SDLoRAStrategy as SDLoRAStrategy
    from avalanche_fmlora.strategies.seq_lora import SeqLoRAStrategy as SeqLoRAStrategy


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
