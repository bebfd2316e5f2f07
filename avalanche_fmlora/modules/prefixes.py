"""Prefixes: further keys and values in front of a block's own (arXiv 2101.00190), in timm's attention as it is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention
from torch import Tensor

Prefixes = Mapping[int, tuple[Tensor, Tensor]]
"""By block index, keys and values [L, D] or [B, L, D]."""


_KNOWN = (Attention, AttentionRope, EvaAttention)


def check_prefixes(vit: Any, prefixes: Prefixes) -> None:
    """Refuse prefixes for blocks that the model does not have.

    Raises:
        ValueError: that names them and the model's depth.
    """
    depth = len(vit.blocks)
    wrong = [i for i in prefixes if not 0 <= i < depth]
    if wrong:
        raise ValueError(
            f"Expected prefixes for blocks 0..{depth - 1} but got {wrong}: choose other blocks or a deeper ViT."
        )


def through_block(block: Any, prefix: tuple[Tensor, Tensor] | None, x: Tensor, **kwargs: Any) -> Tensor:
    """One block of a ViT, whose attention reads further keys and values for this once, if there are any."""
    if prefix is None:
        return block(x, **kwargs)
    block.attn.forward = partial(prefix_attention, block.attn, *prefix)
    try:
        return block(x, **kwargs)
    finally:
        del block.attn.forward


def takes_prefix(attn: Any, width: int) -> bool:
    """Whether prefixes of this width can be put into an attention: whether it computes what timm's own ones do."""
    plain = any(isinstance(attn, own) and type(attn).forward is own.forward for own in _KNOWN)
    return plain and attn.proj.in_features == width


def prefix_attention(
    attn: Any, keys: Tensor, values: Tensor, x: Tensor, rope: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """A timm attention whose keys and values begin with given ones, split over the heads as its own are.

    The prefix is not projected, has no position and passes no norm; queries and the residual stream stay as they are.

    Args:
        attn: an `Attention`, `AttentionRope` or `EvaAttention`, whose weights are used.
        keys: shape [L, D] or [B, L, D].
        values: as `keys`.
        x: tokens, shape [B, N, D].
        rope: rotary positions of the patch tokens, if the model has such, sine and cosine: shape [..., P, 2d].
        kwargs: what timm's block passes on: ``attn_mask`` (None here) and ``is_causal`` (False).

    Returns:
        Shape [B, N, D].
    """
    if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
        raise ValueError("Expected no attention mask beside a prefix: a mask has no columns for the prefix's keys.")
    batch, tokens, _ = x.shape
    q, k, v = _own_heads(attn, x)
    if rope is not None:
        q, k = (_turned(attn, part, rope).type_as(v) for part in (q, k))
    shared = attn.num_heads // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    k, v = (
        torch.cat([_split_heads(p, batch, attn.num_heads).to(own.dtype), own], 2) for p, own in ((keys, k), (values, v))
    )
    drop = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=attn.scale)
    out = attn.norm(out.transpose(1, 2).reshape(batch, tokens, -1))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _own_heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of tokens [B, N, D], each [B, heads, N, d]; keys and values may have fewer heads."""
    batch, tokens, _ = x.shape
    if attn.qkv is None:
        parts = [layer(x) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
        head = parts[0].shape[-1] // attn.num_heads
        q, k, v = (part.reshape(batch, tokens, -1, head).transpose(1, 2) for part in parts)
    else:
        qkv = attn.qkv(x)
        if getattr(attn, "q_bias", None) is not None:
            qkv = qkv + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        q, k, v = qkv.reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def _turned(attn: Any, part: Tensor, rope: Tensor) -> Tensor:
    """Queries or keys with the positions of the patch tokens, which are the last."""
    still = part.shape[2] - rope.shape[-2]
    half = getattr(attn, "rotate_half", False)
    return torch.cat([part[:, :, :still], apply_rot_embed_cat(part[:, :, still:], rope, half=half)], 2)


def _split_heads(prefix: Tensor, batch: int, heads: int) -> Tensor:
    if prefix.ndim == 2:
        prefix = prefix.expand(batch, -1, -1)
    return prefix.reshape(batch, prefix.shape[1], heads, prefix.shape[2] // heads).transpose(1, 2)
