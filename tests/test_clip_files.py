"""Files of CLIP's weights, which have other names and another activation than timm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from avalanche_fmlora.backbones import Backbone, BackboneConfig, load_backbone

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def load(**options: Any) -> Backbone:
    return load_backbone(BackboneConfig(**options, image_size=32, model_args=TINY))


def save(state: Any, folder: Path) -> Path:
    safetensors.torch.save_file(state, folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


@pytest.mark.parametrize(("name", "warned"), [("clip_224", True), ("clip_quickgelu_224", False)])
def test_weights_trained_with_another_activation_are_named(
    tmp_path: Path, caplog: Any, name: str, warned: bool
) -> None:
    """timm fetches OpenAI's weights under both names, and only one computes what they were trained with."""
    name = f"vit_base_patch16_{name}.openai"
    path = save(timm.create_model(name, img_size=32, **TINY).state_dict(), tmp_path)
    load(name=name, weights=path)
    assert ("GELU what was trained with QuickGELU" in caplog.text) == warned
    caplog.clear()
    load(name=name, pretrained=False)
    assert not caplog.text


@pytest.mark.parametrize("key", ["visual.conv1.weight", "visual.trunk.patch_embed.proj.weight"])
def test_another_patch_is_refused_under_other_names_too(tmp_path: Path, key: str) -> None:
    """OpenAI's and OpenCLIP's names, which timm reads as its own."""
    state = {key: torch.zeros(16, 3, 32, 32), "visual.positional_embedding": torch.zeros(50, 16)}
    with pytest.raises(ValueError, match=r"the file has patches of 32 px, the model of 16"):
        load(name="vit_base_patch16_clip_224.openai", weights=save(state, tmp_path))
