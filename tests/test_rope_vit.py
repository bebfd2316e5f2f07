"""ViTs with rotary positions (timm's `Eva`: DINOv3, EVA-02, Perception Encoder): every method learns on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import AttentionRope, RotaryEmbeddingCat
from timm.models.eva import Eva, EvaAttention
from torch import Tensor, nn

from avalanche_fmlora.backbones import BackboneConfig, load_backbone
from avalanche_fmlora.modules.network import backbone_parameter_names
from avalanche_fmlora.modules.prefixes import prefix_attention, takes_prefix
from avalanche_fmlora.strategies.registry import methods

ROTARY = {"kind": Eva, "use_rot_pos_emb": True, "num_reg_tokens": 1, "init_values": 0.5, "use_fc_norm": False}
KINDS: dict[str, dict[str, Any]] = {
    "dinov3": {"rope_type": "dinov3", "rope_rotate_half": True, "use_abs_pos_emb": False, "qkv_bias": False},
    "biased": {"rope_type": "dinov3", "rope_rotate_half": True, "use_abs_pos_emb": False},
    "apart": {"qkv_fused": False, "swiglu_mlp": True},
    "shared_heads": {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "qk_norm": True},
}
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(params=sorted(KINDS))
def vit(request: pytest.FixtureRequest, make_vit: Callable[..., Any]) -> Any:
    return make_vit(**ROTARY, **KINDS[request.param])


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_learns_and_leaves_the_backbone_alone(
    name: str, vit: Any, make_strategy: Any, train: Any, class_benchmark: Any, images: Tensor
) -> None:
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    untrained = vit(images)
    strategy = make_strategy(name, vit, train_epochs=2)
    train(strategy, class_benchmark)
    state = vit.state_dict()
    plain = {n.replace(".base.", "."): state[n] for n in backbone_parameter_names(vit)}
    assert plain.keys() == before.keys()
    assert not [n for n, v in plain.items() if not torch.equal(v, before[n])]
    model = strategy.model.eval()
    features = model.features(images)
    assert torch.isfinite(features).all()
    if strategy.model.lora is not None:
        assert not torch.allclose(vit.eval()(images), untrained), "updates that the attention never reads"
        merged = strategy.merged_model().eval()
        assert type(merged) is Eva
        torch.testing.assert_close(merged(images), model(images), rtol=1e-3, atol=1e-3)
        strategy.merge()
        torch.testing.assert_close(model.features(images), features, rtol=1e-4, atol=1e-4)
        strategy.unmerge()
        assert torch.equal(model.features(images), features)


@pytest.mark.parametrize("attention", [AttentionRope, EvaAttention])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"qkv_fused": False}, {"rotate_half": True}])
def test_a_prefix_is_tokens_without_a_position_that_ask_nothing(attention: Any, options: dict[str, bool]) -> None:
    """Twin: timm's attention over longer sequences, whose first tokens project to the prefix."""
    torch.manual_seed(0)
    attn = attention(16, num_heads=2, num_prefix_tokens=1, norm_layer=nn.LayerNorm, scale_norm=True, **options)
    attn = attn.double().eval()
    for bias in (p for n, p in attn.named_parameters() if n.endswith("bias")):
        nn.init.normal_(bias)
    rope = RotaryEmbeddingCat(8, in_pixels=False, feat_shape=(2, 2)).get_embed().double()
    x, extra = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 2, 16, dtype=torch.float64)
    keys, values = (_projected(attn, extra, part) for part in (1, 2))
    out = prefix_attention(attn, keys, values, x, rope=rope)
    empty = torch.zeros(0, 16, dtype=torch.float64)
    torch.testing.assert_close(prefix_attention(attn, empty, empty, x, rope=rope), attn(x, rope=rope))
    attn.num_prefix_tokens = 3
    torch.testing.assert_close(out, attn(torch.cat([extra, x], 1), rope=rope)[:, 2:])
    assert takes_prefix(attn, 16)
    assert not takes_prefix(attn, 24)


def test_a_prefix_beside_shared_keys_and_values_belongs_to_the_heads_in_order() -> None:
    """Twin: as above, two heads sharing each key and value, so that those of the prefix stand there twice."""
    torch.manual_seed(0)
    attn = AttentionRope(16, num_heads=4, num_kv_heads=2, qkv_fused=False, num_prefix_tokens=1).double().eval()
    rope = RotaryEmbeddingCat(4, in_pixels=False, feat_shape=(2, 2)).get_embed().double()
    x, extra = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 2, 16, dtype=torch.float64)
    narrow = (layer(extra).unflatten(-1, (2, 4)) for layer in (attn.k_proj, attn.v_proj))
    keys, values = (part[..., [0, 0, 1, 1], :].flatten(2) for part in narrow)
    out = prefix_attention(attn, keys, values, x, rope=rope)
    attn.num_prefix_tokens = 3
    torch.testing.assert_close(out, attn(torch.cat([extra, x], 1), rope=rope)[:, 2:])


def _projected(attn: Any, tokens: Tensor, part: int) -> Tensor:
    """Keys (1) or values (2) of tokens, by the weights themselves."""
    if attn.qkv is None:
        return (attn.q_proj, attn.k_proj, attn.v_proj)[part](tokens)
    if isinstance(attn, AttentionRope):
        return attn.qkv(tokens).chunk(3, -1)[part]
    bias = (attn.q_bias, attn.k_bias, attn.v_bias)[part]
    out = tokens @ attn.qkv.weight.chunk(3)[part].T
    return out if bias is None else out + bias


def test_compiled_features_are_the_same(make_vit: Callable[..., Any], make_strategy: Any, images: Tensor) -> None:
    model = make_strategy("fm_lora", make_vit(**ROTARY, **KINDS["dinov3"])).model.eval()
    compiled = torch.compile(model.features, backend="eager")
    torch.testing.assert_close(compiled(images), model.features(images))


@pytest.mark.parametrize("image_size", [32, 64])
def test_a_file_of_metas_names_loads(tmp_path: Path, image_size: int) -> None:
    """As DINOv3 was published: storage tokens, ls1.gamma, a mask token; and as timm writes it."""
    torch.manual_seed(0)
    own = timm.create_model("vit_small_patch16_dinov3", num_classes=0, img_size=32, **TINY).eval()
    for parameter in own.parameters():
        nn.init.normal_(parameter, std=0.1)
    published = {
        k.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v
        for k, v in own.state_dict().items()
    } | {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(4)}
    x = torch.randn(2, 3, image_size, image_size)
    for name, state in (("meta.pth", published), ("timm.safetensors", own.state_dict())):
        path = tmp_path / name
        torch.save(state, path) if path.suffix == ".pth" else safetensors.torch.save_file(state, path)
        config = BackboneConfig(
            name="vit_small_patch16_dinov3", weights=path, image_size=image_size, model_args={**TINY}
        )
        backbone = load_backbone(config)
        assert backbone.image_size == image_size
        torch.testing.assert_close(backbone.model(x), own(x))  # of any size: positions are turned, not stored


def test_a_file_with_blocks_missing_names_them(tmp_path: Path) -> None:
    own = timm.create_model("vit_small_patch16_dinov3", num_classes=0, img_size=32, **TINY)
    path = tmp_path / "torn.safetensors"
    safetensors.torch.save_file({k: v for k, v in own.state_dict().items() if "blocks.1." not in k}, path)
    with pytest.raises(ValueError, match=r"does not fit vit_small_patch16_dinov3: .* missing .*model_args"):
        load_backbone(BackboneConfig(name="vit_small_patch16_dinov3", weights=path, image_size=32, model_args={**TINY}))
