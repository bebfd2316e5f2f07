"""Which mean and standard deviation a backbone's images get, and what is said where that is a guess."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm

from avalanche_fmlora.backbones import Backbone, BackboneConfig, load_backbone

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def load(**options: Any) -> Backbone:
    return load_backbone(BackboneConfig(model_args=TINY, **options))


def save(path: Path, name: str, **options: Any) -> Path:
    model = timm.create_model(name, num_classes=0, **TINY, **options)
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


def test_normalisation() -> None:
    base = {"name": "vit_small_patch14_dinov2", "pretrained": False, "image_size": 28}
    assert (load(**base).mean, load(**base).std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    unit = load(**base, normalize="unit")
    assert (unit.mean, unit.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    own = load(**base, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    assert (own.mean, own.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


def test_a_file_under_a_bare_architecture_says_which_mean_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = {"name": "vit_base_patch16_224", "weights": save(tmp_path / "b.safetensors", "vit_base_patch16_224")}
    assert load(**base).mean == (0.5, 0.5, 0.5)
    assert re.search(r"3 of the \d+ published weights of .*, as vit_base_patch16_224.bamboo,", caplog.text)
    assert "Write `vit_base_patch16_224.<tag>`, or give `mean` and `std`." in caplog.text
    caplog.clear()
    for said in (
        {"name": "vit_base_patch16_224.bamboo"},
        {"mean": (0.5,) * 3, "std": (0.5,) * 3},
        {"normalize": "unit"},
    ):
        load(**{**base, **said})
    path = save(tmp_path / "s.safetensors", "vit_small_patch14_dinov2", img_size=28)
    load(name="vit_small_patch14_dinov2", weights=path, image_size=28)
    assert not caplog.text, "DINOv2's weights all want the same"
