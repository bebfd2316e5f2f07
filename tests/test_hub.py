"""Weights from the hub: by full tag or the only one, and what is said without a network."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from avalanche_fmlora.backbones import Backbone, BackboneConfig, load_backbone, state_sha256

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def load(**options: Any) -> Backbone:
    return load_backbone(BackboneConfig(**options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that serves one tiny model; what was asked of it."""
    asked: list[str] = []
    create = timm.create_model

    def served(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            asked.append(name)
            torch.manual_seed(5)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", served)
    return asked


def test_hub_weights_by_full_tag_or_by_the_only_one(hub: list[str]) -> None:
    for name in ("test_vit.r160_in1k", "test_vit"):
        got = load(name=name, image_size=32)
        assert got.tag == "test_vit.r160_in1k"
        assert got.sha256 == state_sha256(got.model.state_dict())
    assert hub == ["test_vit.r160_in1k"] * 2
    load(name="vit_base_patch16_224.augreg_in21k", image_size=32, model_args=TINY)
    assert hub[-1] == "vit_base_patch16_224.augreg_in21k"


@pytest.mark.parametrize(
    "error", [OSError("offline"), RuntimeError("Cannot send a request"), FileNotFoundError("cache")]
)
def test_offline_hub_names_the_local_route(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise error
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    route = r"--backbone test_vit.r160_in1k --weights /path/to/model.safetensors, or .*\(name='test_vit.r160_in1k', w"
    with pytest.raises(FileNotFoundError, match=route):
        load(name="test_vit.r160_in1k", image_size=32)


def test_hub_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def misfit(name: str, pretrained: bool = False, **options: Any) -> Any:
        model = create(name, pretrained=False, **options)
        if pretrained:
            model.load_state_dict({"x": torch.zeros(1)})
        return model

    monkeypatch.setattr(timm, "create_model", misfit)
    with pytest.raises(ValueError, match=r"weights of test_vit.r160_in1k don't fit model_args={'depth': 2}"):
        load(name="test_vit", image_size=32, model_args={"depth": 2})
