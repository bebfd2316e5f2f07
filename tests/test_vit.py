"""Any timm ViT, unmodified: its own features, prompts and prefixes in their places, one plain model at the end."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
from timm.layers import Attention, RmsNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avalanche_fmlora.data.glyph_vit import glyph_vit
from avalanche_fmlora.modules.factorized_lora import FactorizedLoRA
from avalanche_fmlora.modules.head import UNSEEN_LOGIT, IncrementalHead
from avalanche_fmlora.modules.network import ContinualNetwork, merged_vit
from avalanche_fmlora.modules.prefixes import prefix_attention
from avalanche_fmlora.modules.prompts import MetaPrompt, insert_tokens, remove_tokens
from avalanche_fmlora.modules.vit import (
    Pooling,
    adapt_linears,
    check_vit,
    feature_dim,
    forward_features,
    forward_tokens,
)

EXACT = {"rtol": 0.0, "atol": 1e-10}
ALL_TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")
DINOV3: dict[str, Any] = {
    "kind": Eva,
    "dynamic_img_size": True,
    "qkv_bias": False,
    "init_values": 0.1,
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "num_reg_tokens": 2,
    "use_fc_norm": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "cls": {},
    "with_head": {"num_classes": 7},
    "avg": {"global_pool": "avg"},
    "avg_without_class_token": {"global_pool": "avg", "class_token": False},
    "max": {"global_pool": "max"},
    "map_siglip": {"global_pool": "map", "class_token": False},
    "map_registers": {"global_pool": "map", "class_token": False, "reg_tokens": 1, "pool_include_prefix": True},
    "registers": {"reg_tokens": 2},
    "registers_without_class_token": {"reg_tokens": 1, "class_token": False, "global_pool": "avg"},
    "dinov2_registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 1e-2},
    "layer_scale": {"init_values": 0.1},
    "clip": {"pre_norm": True},
    "no_final_norm": {"final_norm": False},
    "qk_norm": {"qk_norm": True, "norm_layer": RmsNorm},
    "scaled_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "dynamic": {"dynamic_img_size": True},
    "dynamic_registers": {"dynamic_img_size": True, "reg_tokens": 2, "no_embed_class": True},
    "no_position": {"pos_embed": "none"},
    "pooled_prefix": {"global_pool": "avg", "reg_tokens": 1, "pool_include_prefix": True},
    "distilled": {"kind": VisionTransformerDistilled},
    "distilled_with_head": {"kind": VisionTransformerDistilled, "num_classes": 7},
    "wide": {"embed_dim": 24, "num_heads": 3, "depth": 3},
    "eva": {"kind": Eva},
    "dinov3": DINOV3,
    "dinov3_token": DINOV3 | {"global_pool": "token"},
    "dinov3_biased": DINOV3 | {"qkv_bias": True, "dynamic_img_size": False},
    "eva02": {"kind": Eva, "use_rot_pos_emb": True, "qkv_fused": False, "swiglu_mlp": True, "ref_feat_shape": (3, 3)},
    "rope_mixed": {"kind": Eva, "use_rot_pos_emb": True, "rope_type": "mixed", "global_pool": "token"},
    "rope_registers": {"kind": Eva, "use_rot_pos_emb": True, "attn_type": "rope", "num_reg_tokens": 1},
    "perception": {
        "kind": Eva,
        "use_rot_pos_emb": True,
        "attn_type": "rope",
        "global_pool": "map",
        "use_pre_transformer_norm": True,
        "rope_grid_indexing": "xy",
    },
    "shared_heads": DINOV3 | {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "qk_norm": True},
}


@pytest.fixture(params=sorted(KINDS))
def vit(request: pytest.FixtureRequest, make_vit: Callable[..., Any]) -> Any:
    """One ViT of each kind, float64, in evaluation mode."""
    return make_vit(dtype=torch.float64, **KINDS[request.param]).eval()


def _network(
    vit: Any,
    *,
    prompt: int,
    cosine: bool,
    targets: tuple[str, ...] = ALL_TARGETS,
    pooling: Pooling = "model",
) -> ContinualNetwork:
    """Every part non-trivial: random factors and cores, 4 classes of which 1 was never seen."""
    torch.manual_seed(0)
    head = IncrementalHead(feature_dim(vit, pooling), cosine=cosine)
    layers = adapt_linears(vit, targets, None, 2, 0.5)
    meta_prompt = MetaPrompt(prompt, vit.embed_dim, std=1.0) if prompt else None
    network = ContinualNetwork(vit, head, FactorizedLoRA(layers, "first_experience"), meta_prompt).double()
    network.pooling = pooling
    for layer in layers.values():
        for tensor in (layer.up, layer.down, layer.core):
            tensor.data.normal_(0, 0.3)
    head.begin([0, 1, 3])
    with torch.no_grad():
        head.active_rows.normal_()
        if not cosine:
            head.active_bias.normal_()
    head.close()
    return network.eval()


def test_features_are_the_models_own(vit: Any, images: Tensor) -> None:
    expected = vit.forward_head(vit.forward_features(images.double()), pre_logits=True)
    assert torch.equal(forward_features(vit, images.double()), expected)
    assert expected.shape == (5, feature_dim(vit))


def test_token_and_mean_are_the_two_halves_at_equal_scale(vit: Any, images: Tensor) -> None:
    """Twin: by kind, what timm gives for either pooling of the same tokens; other kinds keep their own pooling."""
    x = images.double()
    own, wide = forward_features(vit, x), forward_features(vit, x, pooling="token_and_mean")
    assert wide.shape == (5, feature_dim(vit, "token_and_mean"))
    if vit.attn_pool is not None or vit.global_pool == "max" or vit.cls_token is None:
        assert torch.equal(wide, own)
        return
    tokens = vit.forward_features(x)
    other = tokens[:, 0] if vit.global_pool == "avg" else vit.pool(tokens, pool_type="avg")
    if isinstance(vit, VisionTransformerDistilled):
        other = tokens[:, 2:].mean(1)
    halves = [half / half.square().mean(-1, keepdim=True).sqrt() for half in (own, vit.fc_norm(other))]
    torch.testing.assert_close(wide, torch.cat(halves, -1), rtol=1e-9, atol=1e-9)


def test_prompt_tokens_stand_between_prefix_and_patches(vit: Any, images: Tensor) -> None:
    """Twin: the steps of the model one by one; tokens join after positions and are taken out before pooling."""
    prompt = torch.randn(3, vit.embed_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    n = vit.num_prefix_tokens
    tokens, outputs = forward_tokens(vit, images.double(), prompt)
    short, plain = forward_features(vit, images.double(), prompt), forward_features(vit, images.double())
    x, rope = _tokens_and_rope(vit, images.double())
    x = torch.stack([torch.cat([sample[:n], prompt, sample[n:]]) for sample in x])
    x = vit.norm_pre(x)
    for i, block in enumerate(vit.blocks):
        if rope is None:
            x = block(x)
            continue
        block.attn.num_prefix_tokens = n + 3  # timm's own way to say which tokens have no position
        x = block(x, rope=rope[i] if vit.rope_mixed else rope)
    x = vit.norm(x)
    torch.testing.assert_close(outputs, x[:, n : n + 3], **EXACT)
    torch.testing.assert_close(tokens, torch.cat([x[:, :n], x[:, n + 3 :]], 1), **EXACT)
    assert not torch.allclose(short, plain)


def _tokens_and_rope(vit: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    embedded = vit._pos_embed(vit.patch_embed(x))
    return embedded if isinstance(embedded, tuple) else (embedded, None)


@pytest.mark.parametrize("prompt", [0, 3])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("pooling", ["model", "token_and_mean"])
def test_merged_model_is_a_plain_vit_with_the_same_logits(
    vit: Any, images: Tensor, prompt: int, cosine: bool, pooling: Pooling
) -> None:
    network = _network(vit, prompt=prompt, cosine=cosine, pooling=pooling)
    x = images.double()
    expected = network(x)
    merged = merged_vit(network)
    assert type(merged) is (Eva if isinstance(vit, Eva) else VisionTransformer)
    assert not [m for m in merged.modules() if type(m).__module__.startswith("avalanche_fmlora")]
    torch.testing.assert_close(merged(x), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(merged(x)[:, 2], torch.full((5,), UNSEEN_LOGIT, dtype=torch.float64))
    assert torch.equal(network(x), expected), "merging a copy must leave the network alone"
    if getattr(vit, "dynamic_img_size", False) and pooling == "model":
        larger = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        torch.testing.assert_close(merged(larger), network(larger), rtol=1e-9, atol=1e-9)


def test_merged_model_loads_where_this_package_is_missing(
    make_vit: Callable[..., Any], images: Tensor, tmp_path: Path
) -> None:
    network = _network(make_vit(reg_tokens=1), prompt=2, cosine=True)
    path = tmp_path / "merged.pt"
    merged = merged_vit(network).double()
    torch.save((merged, images.double(), network(images.double())), path)
    assert b"fmlora" not in path.read_bytes()
    script = (
        "import sys; sys.modules['avalanche_fmlora'] = None; sys.modules['avalanche'] = None\n"
        f"import torch; model, x, y = torch.load({str(path)!r}, weights_only=False)\n"
        "torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pooling", ["model", "token_and_mean"])
def test_merged_model_can_be_adapted_again_and_keeps_its_features(
    make_vit: Callable[..., Any], images: Tensor, pooling: Pooling
) -> None:
    network = _network(make_vit(dtype=torch.float64), prompt=2, cosine=True, pooling=pooling)
    merged = check_vit(merged_vit(network))
    features = network.features(images.double())
    assert features.shape[-1] == feature_dim(merged)
    torch.testing.assert_close(forward_features(merged, images.double()), features, **EXACT)
    prompt = torch.zeros(3, merged.embed_dim, dtype=torch.float64)
    for again in get_args(Pooling):  # token and mean are there already, or can be read now
        read = forward_features(merged, images.double(), prompt, pooling=again)
        assert read.shape == (5, feature_dim(merged, again))
    assert len(adapt_linears(merged, ("q",), None, 2, 1.0)) == 2


@pytest.mark.parametrize("prompt", [0, 2])
def test_the_packaged_backbone_merges_with_token_and_mean(prompt: int) -> None:
    """Its patch embedding is a stack of convolutions, without the one projection of a plain ViT."""
    network = _network(glyph_vit().eval().double(), prompt=prompt, cosine=True, pooling="token_and_mean")
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(merged_vit(network)(x), network(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["cls", "avg", "distilled", "registers"])
def test_a_merged_model_that_learned_more_merges_again(make_vit: Callable[..., Any], images: Tensor, kind: str) -> None:
    first = _network(make_vit(dtype=torch.float64, **KINDS[kind]), prompt=2, cosine=True, pooling="token_and_mean")
    second = _network(merged_vit(first), prompt=3, cosine=True, pooling="token_and_mean")
    assert second.head.dim == first.head.dim
    torch.testing.assert_close(merged_vit(second)(images.double()), second(images.double()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_timm_test_models(name: str) -> None:
    vit = timm.create_model(name, img_size=32).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = vit.forward_head(vit.forward_features(x), pre_logits=True)
    assert torch.equal(forward_features(check_vit(vit), x), expected)
    network = _network(vit, prompt=2, cosine=True).float()
    torch.testing.assert_close(merged_vit(network)(x), network(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "targets", [("q",), ("k",), ("v",), ("q", "v"), ("v", "q"), ("proj",), ("fc1", "fc2"), ALL_TARGETS]
)
@pytest.mark.parametrize("blocks", [None, (1,), (2, 0)])
def test_targets_and_blocks(
    make_vit: Callable[..., Any], targets: tuple[str, ...], blocks: Any, images: Tensor
) -> None:
    """The maps named are adapted, no others, and only the named part of qkv moves."""
    vit = make_vit(depth=3, dtype=torch.float64).eval()
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    x = images.double()
    reference = forward_features(vit, x)
    layers = adapt_linears(vit, targets, blocks, 2, 1.0)
    paths = {"q": "attn.qkv", "k": "attn.qkv", "v": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    assert set(layers) == {f"blocks.{i}.{paths[t]}" for i in (blocks or range(3)) for t in targets}
    FactorizedLoRA(layers, "first_experience")
    torch.testing.assert_close(forward_features(vit, x), reference, **EXACT)
    for name, layer in layers.items():
        assert torch.equal(layer.weight, before[f"{name}.weight"])
        layer.up.data.normal_()
        delta = layer.delta_weight()
        moved = set((delta.abs().sum(1) > 0).nonzero().flatten().tolist())
        if name.endswith("qkv"):
            parts = [range(16 * j, 16 * j + 16) for j, part in enumerate("qkv") if part in targets]
            assert moved == {i for part in parts for i in part}
        else:
            assert moved == set(range(layer.out_features))


def _twin_attention(attn: Attention, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q [P_K; k]ᵀ / √d) [P_V; v], one sample and one head at a time."""
    batch, _, width = x.shape
    d = width // attn.num_heads
    out = torch.zeros_like(x)
    for b in range(batch):
        q, k, v = attn.qkv(x[b]).split(width, dim=-1)
        p_k, p_v = (p if p.ndim == 2 else p[b] for p in (keys, values))
        for h in range(attn.num_heads):
            s = slice(h * d, (h + 1) * d)
            head_k = torch.cat([p_k[:, s], attn.k_norm(k[:, s])])
            head_v = torch.cat([p_v[:, s], v[:, s]])
            weights = (attn.q_norm(q[:, s]) @ head_k.T / d**0.5).softmax(-1)
            out[b, :, s] = weights @ head_v
    out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj(out)


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"scale_norm": True}, {"gated": True}, {"qkv_bias": True, "qk_norm": True}]
)
@pytest.mark.parametrize("per_sample", [False, True])
def test_prefix_attention_is_attention_over_longer_keys_and_values(options: dict[str, bool], per_sample: bool) -> None:
    torch.manual_seed(0)
    attn = Attention(8, num_heads=2, norm_layer=nn.LayerNorm, **options).double().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    keys, values = torch.randn(2, *([3] if per_sample else []), 4, 8, dtype=torch.float64)
    torch.testing.assert_close(prefix_attention(attn, keys, values, x), _twin_attention(attn, x, keys, values), **EXACT)
    empty = torch.zeros(0, 8, dtype=torch.float64)
    torch.testing.assert_close(prefix_attention(attn, empty, empty, x), attn(x), **EXACT)


def test_prefixes_reach_their_blocks_only_and_leave_no_trace(make_vit: Callable[..., Any], images: Tensor) -> None:
    vit = make_vit(dtype=torch.float64, depth=3).eval()
    x = images.double()
    plain = forward_features(vit, x)
    prefix = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = vit._pos_embed(vit.patch_embed(x))
    for i, block in enumerate(vit.blocks):
        attention = (
            _twin_attention(block.attn, block.norm1(steps), *prefix) if i == 1 else block.attn(block.norm1(steps))
        )
        steps = steps + attention
        steps = steps + block.mlp(block.norm2(steps))
    torch.testing.assert_close(forward_features(vit, x, prefixes={1: tuple(prefix)}), vit.norm(steps)[:, 0], **EXACT)
    assert not any("forward" in vars(block.attn) for block in vit.blocks)
    assert torch.equal(forward_features(vit, x), plain)


def test_blocks_are_restored_after_an_error(make_vit: Callable[..., Any], images: Tensor) -> None:
    vit = make_vit().eval()
    good, bad = (torch.zeros(2, 16), torch.zeros(2, 16)), (torch.zeros(2, 15), torch.zeros(2, 15))
    with pytest.raises(RuntimeError):
        forward_features(vit, images, prefixes={0: good, 1: bad})
    assert not any("forward" in vars(block.attn) for block in vit.blocks)
    with pytest.raises(ValueError, match=r"prefixes for blocks 0\.\.1 but got \[2\].*deeper ViT"):
        forward_features(vit, images, prefixes={2: good})
    mask = torch.zeros(5, 5)
    with pytest.raises(ValueError, match="no attention mask beside a prefix"):
        prefix_attention(vit.blocks[0].attn, *good, torch.zeros(1, 5, 16), attn_mask=mask)


def test_insert_and_remove_tokens_are_inverse() -> None:
    tokens, prompt = torch.randn(2, 6, 3), torch.randn(2, 4, 3)
    longer = insert_tokens(tokens, prompt, 2)
    assert torch.equal(longer[:, 2:6], prompt)
    rest, outputs = remove_tokens(longer, 4, 2)
    assert torch.equal(rest, tokens)
    assert torch.equal(outputs, prompt)


def test_gradient_checkpointing_changes_nothing(make_vit: Callable[..., Any], images: Tensor) -> None:
    vit = make_vit(dtype=torch.float64).eval()
    prompt = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for enable in (False, True):
        vit.set_grad_checkpointing(enable)
        features = forward_features(vit, images.double(), prompt)
        results.append((features.detach(), *torch.autograd.grad(features.square().sum(), prompt)))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, **EXACT)


def test_models_that_cannot_be_adapted_are_named(make_vit: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match=r"timm VisionTransformer or Eva but got torch\.nn.*Linear: make one with timm"
    ):
        check_vit(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"VisionTransformer or Eva but got timm\.models\.resnet\.ResNet"):
        check_vit(timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match=r"`global_pool` is ''.*make it with"):
        check_vit(make_vit(global_pool=""))
    vit = make_vit()
    adapt_linears(vit, ("q",), (0,), 2, 1.0)
    with pytest.raises(ValueError, match=r"not adapted yet.*pass a fresh timm model"):
        check_vit(vit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ("w",)}, r"`targets` to be among .*'fc2'.* but got \('w',\)"),
        ({"targets": ()}, r"`targets` to be among"),
        ({"blocks": (0, 2)}, r"`blocks` to be different indices in 0\.\.1 but got \(0, 2\)"),
        ({"blocks": (-1,)}, r"`blocks` to be different indices in 0\.\.1"),
        ({"blocks": (1, 1)}, r"`blocks` to be different indices in 0\.\.1"),
        ({"blocks": ()}, r"`blocks` to be different indices in 0\.\.1"),
        ({"rank": 17}, r"`rank` between 1 and 16, the smaller side of the map, but got 17"),
        ({"rank": 0}, r"`rank` between 1 and 16"),
    ],
)
def test_bad_choices_of_maps_are_named_and_change_nothing(
    make_vit: Callable[..., Any], arguments: dict[str, Any], message: str
) -> None:
    vit = make_vit()
    with pytest.raises(ValueError, match=message):
        adapt_linears(vit, **{"targets": ("q",), "blocks": None, "rank": 2, "scale": 1.0, **arguments})
    assert check_vit(vit) is vit


def test_a_map_that_the_model_does_not_have_is_named(make_vit: Callable[..., Any]) -> None:
    from timm.layers import SwiGLU

    vit = make_vit(mlp_layer=SwiGLU)
    with pytest.raises(
        ValueError, match=r"linear map at blocks\.0\.mlp\.fc1 but found NoneType.*leave that target out"
    ):
        adapt_linears(vit, ("fc1",), None, 2, 1.0)
    assert len(adapt_linears(vit, ("fc2",), None, 2, 1.0)) == 2


def test_pickled_bytes_of_a_network_reload(make_vit: Callable[..., Any], images: Tensor) -> None:
    """A network in the middle of training can be copied and pickled: what plugins with a teacher do."""
    import copy

    network = _network(make_vit(), prompt=2, cosine=True).float()
    network.begin([0, 1])
    expected = network(images)
    assert expected.requires_grad
    assert torch.equal(copy.deepcopy(network)(images), expected)
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(images), expected)
