"""Prefixes of keys and values: attention over longer rows, in their own blocks, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import Attention
from torch import Tensor, nn
from vit_kinds import EXACT

from avalanche_fmlora.modules.prefixes import prefix_attention
from avalanche_fmlora.modules.vit import forward_features


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
