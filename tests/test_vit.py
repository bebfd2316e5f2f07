"""Any timm ViT, unmodified: its own features, prompts in their place, maps adapted by name."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLU
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from vit_kinds import ALL_TARGETS, EXACT, KINDS, random_network

from avalanche_fmlora.modules.factorized_lora import FactorizedLoRA
from avalanche_fmlora.modules.prompts import insert_tokens, remove_tokens
from avalanche_fmlora.modules.vit import adapt_linears, check_vit, feature_dim, forward_features, forward_tokens


@pytest.fixture(params=sorted(KINDS))
def vit(request: pytest.FixtureRequest, make_vit: Callable[..., Any]) -> Any:
    """One ViT of each kind, float64, in evaluation mode."""
    return make_vit(dtype=torch.float64, **KINDS[request.param]).eval()


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


@pytest.mark.parametrize("tokens", [0, 3])
def test_multi_layer_is_token_and_mean_of_each_block(vit: Any, images: Tensor, tokens: int) -> None:
    """Twin: the model cut off behind each of its blocks."""
    x, depth = images.double(), len(vit.blocks)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randn(tokens, vit.embed_dim, generator=generator, dtype=torch.float64) if tokens else None
    whole = forward_features(vit, x, prompt, pooling="multi_layer")
    last = forward_features(vit, x, prompt, pooling="token_and_mean")
    assert whole.shape == (5, feature_dim(vit, "multi_layer"))
    if last.shape[-1] == feature_dim(vit):
        assert torch.equal(whole, last)
        return
    expected = []
    for count in range(1, depth + 1):
        cut = copy.deepcopy(vit)
        cut.blocks = cut.blocks[:count]
        expected.append(forward_features(cut, x, prompt, pooling="token_and_mean"))
    assert torch.equal(whole, torch.cat(expected, -1))


def test_multi_layer_reads_the_last_four_blocks(make_vit: Callable[..., Any], images: Tensor) -> None:
    vit = make_vit(depth=6).eval()
    wide = forward_features(vit, images, pooling="multi_layer")
    assert wide.shape[-1] == feature_dim(vit, "multi_layer") == 8 * vit.embed_dim
    assert torch.equal(wide[:, -2 * vit.embed_dim :], forward_features(vit, images, pooling="token_and_mean"))
    vit.blocks = vit.blocks[:3]
    third = forward_features(vit, images, pooling="token_and_mean")
    assert torch.equal(wide[:, : 2 * vit.embed_dim], third)


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


def test_insert_and_remove_tokens_are_inverse() -> None:
    tokens, prompt = torch.randn(2, 6, 3), torch.randn(2, 4, 3)
    longer = insert_tokens(tokens, prompt, 2)
    assert torch.equal(longer[:, 2:6], prompt)
    rest, outputs = remove_tokens(longer, 4, 2)
    assert torch.equal(rest, tokens)
    assert torch.equal(outputs, prompt)


def test_gradient_checkpointing_changes_nothing(make_vit: Callable[..., Any], images: Tensor) -> None:
    vit = make_vit(dtype=torch.float64).eval()
    prompt, keys, values = (torch.randn(2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    results = []
    for enable in (False, True):
        vit.set_grad_checkpointing(enable)
        features = forward_features(vit, images.double(), prompt, {1: (2 * keys, values)})
        results.append((features.detach(), *torch.autograd.grad(features.square().sum(), (prompt, keys, values))))
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


def test_updates_that_move_another_strategys_features_are_told(
    make_strategy: Any, make_vit: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = make_vit()
    first = [make_strategy(method, vit=model) for method in ("ncm", "l2p")]
    make_strategy("fm_lora", vit=copy.deepcopy(model))
    assert not caplog.text, "what only reads a model can share it"
    make_strategy("fm_lora", vit=model)
    assert caplog.text.count("already serves another strategy") == 1
    assert "copy.deepcopy(model)" in caplog.text
    caplog.clear()
    model = make_vit()
    first = [make_strategy("ncm", vit=model)]
    del first
    gc.collect()
    make_strategy("fm_lora", vit=model)
    assert not caplog.text


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
    vit = make_vit(mlp_layer=SwiGLU)
    with pytest.raises(
        ValueError, match=r"linear map at blocks\.0\.mlp\.fc1 but found NoneType.*leave that target out"
    ):
        adapt_linears(vit, ("fc1",), None, 2, 1.0)
    assert len(adapt_linears(vit, ("fc2",), None, 2, 1.0)) == 2


def test_pickled_bytes_of_a_network_reload(make_vit: Callable[..., Any], images: Tensor) -> None:
    """A network in the middle of training can be copied and pickled: what plugins with a teacher do."""
    network = random_network(make_vit(), prompt=2, cosine=True).float()
    network.begin([0, 1])
    expected = network(images)
    assert expected.requires_grad
    assert torch.equal(copy.deepcopy(network)(images), expected)
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(images), expected)
