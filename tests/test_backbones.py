"""load_backbone: each route to the weights, and an error that says what to do for each way it can fail."""

from __future__ import annotations

import hashlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from pydantic import ValidationError
from timm.models.vision_transformer import VisionTransformer

from avalanche_fmlora import backbones
from avalanche_fmlora.backbones import Backbone, BackboneConfig, load_backbone, state_sha256

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def load(**options: Any) -> Backbone:
    return load_backbone(BackboneConfig(**options))


def tiny(image_size: int = 32, num_classes: int = 0, **options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=image_size, num_classes=num_classes, **(TINY | options))
    return model.eval()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def call(state: Any, name: str = "tiny.safetensors") -> Path:
        path = tmp_path / name
        if path.suffix == ".safetensors":
            safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
        else:
            torch.save(state, path)
        return path

    return call


@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny.pth", "tiny.pt", "tiny.bin"])
def test_file_gives_the_same_features(save: Callable[..., Path], name: str) -> None:
    model = tiny()
    path = save(model.state_dict(), name)
    got = load(name="test_vit", weights=path, image_size=32, model_args=TINY)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(got.model(x), model(x))
    assert got.tag == f"test_vit/{name}"
    assert got.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (got.image_size, got.mean, got.std) == (32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert not got.model.training


def test_half_precision_head_and_wrapping_are_taken_in(save: Callable[..., Path]) -> None:
    state = {k: v.half() for k, v in tiny(num_classes=7).state_dict().items()}
    assert "head.weight" in state
    for wrapped in ({"model": state, "epoch": 3}, {"state_dict": state}):
        got = load(name="test_vit", weights=save(wrapped, "w.pth"), image_size=32, model_args=TINY).model
        assert {p.dtype for p in got.parameters()} == {torch.float32}
        assert torch.equal(got.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"].float())
        assert isinstance(got.head, torch.nn.Identity)


def test_position_embedding_is_resampled(save: Callable[..., Path]) -> None:
    path = save(tiny(64).state_dict())
    got = load(name="test_vit", weights=path, image_size=48, model_args=TINY)
    assert got.image_size == 48
    assert got.model.pos_embed.shape == (1, 9 + 1, 16)
    assert got.model(torch.zeros(1, 3, 48, 48)).isfinite().all()
    flat = {k: torch.full_like(v, 0.25) if k == "pos_embed" else v for k, v in tiny(64).state_dict().items()}
    got = load(name="test_vit", weights=save(flat), image_size=48, model_args=TINY)
    torch.testing.assert_close(got.model.pos_embed[:, 1:], torch.full((1, 9, 16), 0.25))


@pytest.mark.parametrize("size", [40, 15, 33])
def test_image_size_must_fit_the_patch(size: int) -> None:
    near = {40: "32 or 48", 15: "16", 33: "32 or 48"}[size]
    with pytest.raises(ValueError, match=rf"multiple of its patch, 16 px, but got {size}: take {near}\."):
        load(name="test_vit", pretrained=False, image_size=size)


def test_keys_and_shapes_that_do_not_fit_are_named(save: Callable[..., Path]) -> None:
    state = dict(tiny().state_dict())
    options = {"name": "test_vit", "image_size": 32, "model_args": TINY}
    del state["blocks.0.norm1.weight"]
    state["extra.a"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"1 missing \(blocks.0.norm1.weight\); 1 unexpected \(extra.a\)"):
        load(weights=save(state), **options)
    with pytest.raises(ValueError, match=r"of another shape \(cls_token \(1, 1, 24\) for \(1, 1, 16\), .* more\)"):
        load(weights=save(tiny(embed_dim=24).state_dict()), **options)
    with pytest.raises(ValueError, match=r"12 unexpected .*file has 3 blocks, the model 2: try .*'depth': 3"):
        load(weights=save(tiny(depth=3).state_dict()), **options)
    three = options | {"model_args": TINY | {"depth": 3}}
    assert len(load(weights=save(tiny(depth=3).state_dict()), **three).model.blocks) == 3


def test_another_patch_is_refused_unless_asked_for(save: Callable[..., Path]) -> None:
    path = save(tiny(patch_size=8).state_dict())
    with pytest.raises(ValueError, match=r"the file has patches of 8 px, the model of 16"):
        load(name="test_vit", weights=path, image_size=32, model_args=TINY)
    args = TINY | {"patch_size": 16}
    assert load(name="test_vit", weights=path, image_size=32, model_args=args).model.patch_embed.grid_size == (2, 2)


def test_torn_files(save: Callable[..., Path]) -> None:
    for name, message in (
        ("a.safetensors", "no whole safetensors file"),
        ("a.pth", "is torn or holds more than tensors"),
    ):
        path = save(tiny().state_dict(), name)
        data = path.read_bytes()
        for part in (data[: len(data) // 2], b"", b"<html>not found</html>"):
            path.write_bytes(part)
            with pytest.raises(ValueError, match=rf"{message}.*{len(part):,} bytes"):
                load(name="test_vit", weights=path, image_size=32, model_args=TINY)


class Runs:
    """Unpickling it would create the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickled_code_is_never_run(save: Callable[..., Path], tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    with pytest.raises(ValueError, match=r"pickled code is never run here.*safetensors.torch.save_file"):
        load(name="test_vit", weights=save({"model": Runs(mark)}, "evil.pth"))
    assert not mark.exists()
    with pytest.raises(ValueError, match="holds more than tensors"):
        load(name="test_vit", weights=save(tiny(), "whole_model.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lr": 0.1, "epoch": 2}, r"but got a dict of lr: float, epoch: int"),
        ([1, 2], "but got a list"),
        ({}, "but got an empty dict"),
    ],
)
def test_files_without_a_state_dict(save: Callable[..., Path], content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name="test_vit", weights=save(content, "a.pth"))


def test_weights_that_are_not_finite_missing_or_of_another_kind(save: Callable[..., Path], tmp_path: Path) -> None:
    state = dict(tiny().state_dict())
    state["norm.bias"] = torch.full((16,), float("nan"))
    with pytest.raises(ValueError, match=r"1 of \d+ tensors in 'tiny.safetensors' are not finite: norm.bias"):
        load(name="test_vit", weights=save(state), image_size=32, model_args=TINY)
    with pytest.raises(FileNotFoundError, match=r"weights file at .*gone.pth"):
        load(name="test_vit", weights=tmp_path / "gone.pth")
    (tmp_path / "a.onnx").touch()
    with pytest.raises(ValueError, match=r"\.safetensors, \.pth, \.pt or \.bin but got 'a.onnx'"):
        load(name="test_vit", weights=tmp_path / "a.onnx")


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    got = load(name="test_vit", pretrained=False, image_size=32)
    drawn = torch.rand(2)
    again = load(name="test_vit", pretrained=False, image_size=32)
    assert got.tag == "test_vit.random"
    assert got.sha256 == again.sha256 == state_sha256(got.model.state_dict())
    assert got.model.blocks[0].attn.qkv.weight.std() > 0
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))


def test_state_hash_sees_names_shapes_dtypes_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.tensor(1)}
    others = [
        {"c": base["a"], "b": base["b"]},
        {"a": torch.zeros(3, 2), "b": base["b"]},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": base["b"]},
        {"a": base["a"], "b": torch.tensor(2)},
        {"a": base["a"].to(torch.bfloat16), "b": base["b"]},
    ]
    assert len({state_sha256(s) for s in [base, *others]}) == 6
    assert state_sha256(base) == state_sha256({"b": base["b"], "a": torch.zeros(3, 2).t()})


def test_a_name_alone_is_a_configuration() -> None:
    backbone = load_backbone("glyph_vit")
    assert backbone.sha256 == load_backbone(BackboneConfig(name="glyph_vit")).sha256
    with pytest.raises(ValueError, match=r"did you mean glyph_vit"):
        load_backbone("glyph-vit")


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"got 'vit_smal_patch16_224.augreg_in21k': did you mean vit_small_patch16_224"
    ):
        load(name="vit_smal_patch16_224.augreg_in21k")
    with pytest.raises(ValueError, match=r"did you mean glyph_vit"):
        load(name="glyph-vit")


def test_ambiguous_names_and_wrong_tags_list_the_tags() -> None:
    with pytest.raises(
        ValueError, match=r"'vit_base_patch16_224' has \d+ sets .*augreg_in21k, augreg_in21k_ft_in1k.*<tag>"
    ):
        load(name="vit_base_patch16_224")
    with pytest.raises(
        ValueError, match=r"vit_base_patch16_224 has no weights 'imagenet': choose one of .*augreg_in21k"
    ):
        load(name="vit_base_patch16_224.imagenet")


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_other_architectures_are_refused(name: str) -> None:
    for size in (None, 32):
        with pytest.raises(ValueError, match=rf"Expected a timm VisionTransformer .* but {name} is a "):
            load(name=name, pretrained=False, image_size=size)


def test_wrong_model_args_are_named() -> None:
    with pytest.raises(ValueError, match=r"test_vit can't be built with .*model_args={'dept': 3}.*'dept'"):
        load(name="test_vit", pretrained=False, model_args={"dept": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0, 0, 0)}, "`mean` and `std` together"),
        ({"mean": (0, 0, 0), "std": (1, 0, 1)}, "`std` to be above 0"),
        ({"mean": (0, 0, 0), "std": (1, 1, 1), "normalize": "unit"}, "leave `mean` and `std` out"),
        ({"weights": "a.pth", "pretrained": False}, "random weights"),
        ({"model_args": {"img_size": 3}}, "'img_size', which is set by `image_size`"),
        ({"image_size": 0}, "greater than 0"),
        ({"nmae": "x"}, "Extra inputs"),
    ],
)
def test_configurations_that_contradict_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BackboneConfig(**options)


def test_configuration_describes_itself_and_round_trips() -> None:
    fields = BackboneConfig.model_fields
    assert all(f.description for f in fields.values())
    config = BackboneConfig(name="test_vit", weights="a/b.pth", model_args={"depth": 2})
    assert BackboneConfig(**config.model_dump(mode="json")) == config
    assert BackboneConfig(name="test_vit", weights="~/w.pth").weights == Path.home() / "w.pth"
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "x"  # type: ignore[misc]


@pytest.fixture
def glyphs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A stand-in for the embedded model; the `pretrained` it was asked for."""
    asked: list[bool] = []
    fake = types.ModuleType("avalanche_fmlora.data.glyph_vit")

    def glyph_vit(pretrained: bool) -> VisionTransformer:
        asked.append(pretrained)
        return tiny().train()

    for name, value in {
        "glyph_vit": glyph_vit,
        "glyph_vit_sha256": lambda: "ab" * 32,
        "GLYPH_VIT_TAG": "glyph_vit.letters",
        "GLYPH_VIT_IMAGE_SIZE": 32,
        "GLYPH_VIT_MEAN": (0.1, 0.1, 0.1),
        "GLYPH_VIT_STD": (0.2, 0.2, 0.2),
    }.items():
        setattr(fake, name, value)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return asked


def test_embedded_default(glyphs: list[bool], save: Callable[..., Path]) -> None:
    got = load()
    assert (got.tag, got.sha256, got.image_size) == ("glyph_vit.letters", "ab" * 32, 32)
    assert (got.mean, got.std) == ((0.1, 0.1, 0.1), (0.2, 0.2, 0.2))
    assert not got.model.training
    fresh = load(pretrained=False)
    assert fresh.tag == "glyph_vit.random"
    assert fresh.sha256 == state_sha256(fresh.model.state_dict())
    path = save({k: v + 1 for k, v in tiny().state_dict().items()}, "mine.safetensors")
    own = load(weights=path)
    assert own.tag == "glyph_vit/mine.safetensors"
    assert own.sha256 == backbones.file_sha256(path)
    assert torch.equal(own.model.norm.bias, torch.ones(16))
    assert glyphs == [True, False, False]
    with pytest.raises(ValueError, match="takes images of 32 px but got 64"):
        load(image_size=64)
    with pytest.raises(ValueError, match=r"takes no `model_args` but got {'depth': 2}"):
        load(model_args={"depth": 2})


def test_embedded_default_is_there(tmp_path: Path) -> None:
    module = pytest.importorskip("avalanche_fmlora.data.glyph_vit")
    if not hasattr(module, "glyph_vit"):
        pytest.skip("the embedded model has no loader yet")
    got = load()
    features = got.model(torch.zeros(2, 3, got.image_size, got.image_size))
    assert features.shape == (2, got.model.num_features)
    assert features.isfinite().all()
    path = tmp_path / "copy.safetensors"
    safetensors.torch.save_file(got.model.state_dict(), path)
    assert torch.equal(load(weights=path).model(torch.ones(1, 3, 32, 32)), got.model(torch.ones(1, 3, 32, 32)))


def test_real_vit_small() -> None:
    name = "vit_small_patch14_saliency_d11.fp16.safetensors"
    path = Path(os.environ.get("AVALANCHE_FMLORA_DATA", "")) / name
    if "AVALANCHE_FMLORA_DATA" not in os.environ or not path.is_file():
        pytest.skip(f"set AVALANCHE_FMLORA_DATA to the folder that holds {name}")
    options = {"name": "vit_small_patch14_dinov2", "weights": path, "image_size": 70}
    got = load(**options, model_args={"depth": 11})
    assert got.sha256.startswith("cc4d46ee")
    assert got.tag == f"vit_small_patch14_dinov2/{name}"
    assert (got.image_size, got.mean) == (70, (0.485, 0.456, 0.406))
    with torch.no_grad():
        features = got.model(torch.randn(2, 3, 70, 70))
    assert features.shape == (2, 384)
    assert features.isfinite().all()
    assert features.std() > 0.1
    with pytest.raises(ValueError, match=r"14 missing .*try model_args={'depth': 11}"):
        load(**options)
    with pytest.raises(ValueError, match=r"multiple of its patch, 14 px, but got 64: take 56 or 70"):
        load(**(options | {"image_size": 64}), model_args={"depth": 11})
