"""Any timm ViT, unmodified: prompts at the input, prefixes in attention, low-rank updates of maps.

timm has two classes of them: `VisionTransformer` (AugReg, DeiT, DINO, DINOv2, CLIP, SigLIP) and `Eva`, whose attention
turns queries and keys by their patch's position (DINOv3, EVA-02, Perception Encoder, `vit_*_rope_*`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from timm.models._manipulate import checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avalanche_fmlora.modules.adapted_linear import AdaptedLinear, LinearT
from avalanche_fmlora.modules.factorized_lora import FactorizedLinear
from avalanche_fmlora.modules.images import check_images
from avalanche_fmlora.modules.prefixes import Prefixes, check_prefixes, through_block
from avalanche_fmlora.modules.prompts import insert_tokens, remove_tokens

TimmViT: TypeAlias = VisionTransformer | Eva
Target = Literal["q", "k", "v", "proj", "fc1", "fc2"]
Pooling = Literal["model", "token_and_mean", "multi_layer"]

_PATHS = {"q": "attn.qkv", "k": "attn.qkv", "v": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_OF_THREE = {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj"}
"""Where queries, keys and values have maps of their own."""
_LAYERS = 4
"""Last blocks that `multi_layer` reads."""


def check_vit(model: Any) -> TimmViT:
    """The model, if it is one that can be adapted.

    Raises:
        ValueError: if it is no timm `VisionTransformer` or `Eva`, has no pooled features or float16 weights, or is
            adapted already.
    """
    if type(model) not in (VisionTransformer, VisionTransformerDistilled, Eva):
        raise ValueError(
            "Expected `model` to be a timm VisionTransformer or Eva but got "
            f"{type(model).__module__}.{type(model).__name__}: "
            "make one with timm.create_model('vit_…', 'deit_…' or 'eva02_…', num_classes=0)."
        )
    if model.attn_pool is None and not model.global_pool:
        raise ValueError(
            "Expected a model with pooled features but its `global_pool` is '': make it with global_pool='token'."
        )
    for dtype, name, harm in ((torch.float16, "fp16", "overflow"), (torch.bfloat16, "bf16", "are lost to rounding")):
        if next(model.parameters()).dtype == dtype:
            raise ValueError(
                f"Expected weights in float32 but they are in {str(dtype).removeprefix('torch.')}, in which updates "
                f"{harm}: pass model.float(), and precision='{name}' for passes in half precision."
            )
    adapted = next((type(m).__name__ for m in model.modules() if isinstance(m, AdaptedLinear)), None)
    if adapted is not None:
        raise ValueError(
            f"Expected a model that is not adapted yet but it holds {adapted} maps: pass a fresh timm model, "
            "or `strategy.merged_model()` to go on from what another strategy learned."
        )
    return model


def freeze(model: nn.Module) -> nn.Module:
    """No parameter of the model takes a gradient from now on; dropout and stochastic depth are off."""
    return model.requires_grad_(False).eval()


def forward_tokens(
    vit: TimmViT, images: Tensor, prompt: Tensor | None = None, prefixes: Prefixes | None = None
) -> tuple[Tensor, Tensor | None]:
    """One pass through patch embedding, blocks and final norm.

    Args:
        vit: the model; frozen or not.
        images: shape [B, 3, H, W].
        prompt: tokens at the input, [L, D] or [B, L, D], behind class and register tokens, without a position.
        prefixes: by block index, keys and values [L, D] or [B, L, D] in front of the block's own (arXiv 2101.00190).

    Returns:
        The tokens [B, N, D] without the prompt's, and the prompt's outputs [B, L, D] or None.

    Raises:
        ValueError: for images that the model can't embed, see :func:`~avalanche_fmlora.modules.images.check_images`.
    """
    return last_tokens(vit, images, prompt, prefixes)[-1]


def last_tokens(
    vit: TimmViT,
    images: Tensor,
    prompt: Tensor | None = None,
    prefixes: Prefixes | None = None,
    pooling: Pooling = "model",
) -> list[tuple[Tensor, Tensor | None]]:
    """What :func:`forward_tokens` returns, for each block that features are made of: see :func:`pooled_blocks`.

    Every block's outputs go through the final norm; the last block's are last.
    """
    first = len(vit.blocks) - pooled_blocks(vit, pooling)
    outputs: list[Tensor] = []
    prefixes = prefixes or {}
    check_prefixes(vit, prefixes)
    x, rotations = _embedded(vit, images)
    if prompt is not None:
        x = insert_tokens(x, prompt, vit.num_prefix_tokens)
        rotations = _without_position(rotations, prompt.shape[-2])
    x = vit.norm_pre(x)
    own = rotations if getattr(vit, "rope_mixed", False) else None  # then each block has its own positions
    run = partial(checkpoint, through_block) if vit.grad_checkpointing and torch.is_grad_enabled() else through_block
    for i, block in enumerate(vit.blocks):
        positions = rotations if own is None else own[i]
        x = run(block, prefixes.get(i), x, **({} if positions is None else {"rope": positions}))
        if i >= first:
            outputs.append(vit.norm(x))
    if prompt is None:
        return [(tokens, None) for tokens in outputs]
    return [remove_tokens(tokens, prompt.shape[-2], vit.num_prefix_tokens) for tokens in outputs]


def _embedded(vit: TimmViT, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, N, D] at the input, and the rotary position of patch tokens: sine and cosine, [..., P, 2d]."""
    check_images(vit, images)
    x = vit.patch_embed(images)
    if isinstance(vit, Eva):
        tokens, rotations = vit._pos_embed(x)
        return tokens, rotations
    return vit.patch_drop(vit._pos_embed(x)), None


def _without_position(rotations: Tensor | None, count: int) -> Tensor | None:
    """Rotary positions behind those of `count` tokens that are not turned at all (sine 0, cosine 1)."""
    if rotations is None:
        return None
    sine = rotations.new_zeros(*rotations.shape[:-2], count, rotations.shape[-1] // 2)
    return torch.cat([torch.cat([sine, torch.ones_like(sine)], -1), rotations], -2)


def forward_features(
    vit: TimmViT,
    images: Tensor,
    prompt: Tensor | None = None,
    prefixes: Prefixes | None = None,
    pooling: Pooling = "model",
) -> Tensor:
    """Features of images, as the model's own head would get them or with the half that its pooling leaves out.

    Args:
        vit: the model; frozen or not.
        images: shape [B, 3, H, W].
        prompt: as in :func:`forward_tokens`.
        prefixes: as there.
        pooling: `model`: pooled features [B, D]; `token_and_mean`: see :func:`with_complement`, [B, 2D];
            `multi_layer`: those of each of the last four blocks, [B, 8D] (arXiv 2304.07193, 2312.08888).
    """
    layers = last_tokens(vit, images, prompt, prefixes, pooling)
    counted = isinstance(vit.attn_pool, nn.Sequential)  # a merged model's, for which each token has its place
    parts = []
    for tokens, prompt_tokens in layers:
        pooled = tokens
        if prompt_tokens is not None and pools_prefix(vit) and not counted:
            pooled = insert_tokens(tokens, prompt_tokens, vit.num_prefix_tokens)
        features = vit.forward_head(pooled, pre_logits=True)
        parts.append(features if pooling == "model" else with_complement(vit, features, tokens))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def pooled_blocks(vit: TimmViT, pooling: Pooling) -> int:
    """How many of the last blocks the features are made of: more than one with `multi_layer` alone.

    One also where the pooling leaves nothing out that could stand beside it, see :func:`pooling_complement`.
    """
    return 1 if pooling != "multi_layer" or pooling_complement(vit) is None else min(_LAYERS, len(vit.blocks))


def pools_prefix(vit: TimmViT) -> bool:
    """Whether the pooling reads class and register tokens, a prompt's among them, beside those of patches."""
    if isinstance(vit, Eva):
        return vit.attn_pool is not None
    return bool(vit.pool_include_prefix)


def pooling_complement(vit: TimmViT) -> Literal["mean", "token"] | None:
    """What a model's pooling leaves out: the mean of the patch tokens, the class token, or neither.

    Neither, so that the pooled features stand alone, without class token and where the pooling is no plain mean
    (attention, maximum).
    """
    if vit.attn_pool is not None:
        return None
    if vit.global_pool == "token":
        return "mean"
    return "token" if vit.global_pool == "avg" and vit.cls_token is not None else None


def with_complement(vit: TimmViT, features: Tensor, tokens: Tensor) -> Tensor:
    """Class token and mean of the patch tokens side by side, each at a root mean square of 1: [B, 2D].

    As in the linear evaluation of DINOv2 (arXiv 2304.07193), but for the scale, which lets both halves weigh the same
    in a cosine.

    Args:
        vit: says what is missing, see :func:`pooling_complement`; where nothing is, the features come back as they are.
        features: pooled, shape [B, D].
        tokens: after the final norm, without a prompt's, shape [B, N, D].
    """
    missing = pooling_complement(vit)
    if missing is None:
        return features
    other = tokens[:, 0] if missing == "token" else tokens[:, vit.num_prefix_tokens :].mean(1)
    halves = features, vit.fc_norm(other)
    wide = torch.promote_types(features.dtype, torch.float32)
    return torch.cat([F.rms_norm(half.to(wide), half.shape[-1:]) for half in halves], -1)


def feature_dim(vit: TimmViT, pooling: Pooling = "model") -> int:
    """Width of the features."""
    doubled = vit.global_pool == "avgmax_cat" or (pooling != "model" and pooling_complement(vit) is not None)
    return int(vit.num_features) * (2 if doubled else 1) * pooled_blocks(vit, pooling)


def adapt_linears(
    vit: TimmViT, targets: Sequence[Target], blocks: Sequence[int] | None, rank: int, scale: float
) -> dict[str, FactorizedLinear]:
    """Put a :class:`FactorizedLinear` of this rank and scale in the place of each chosen map of the model.

    Arguments, result and errors as in :func:`replace_linears`.
    """
    return replace_linears(vit, targets, blocks, lambda linear, slices: FactorizedLinear(linear, slices, rank, scale))


def replace_linears(
    vit: TimmViT,
    targets: Sequence[Target],
    blocks: Sequence[int] | None,
    make: Callable[[nn.Linear, list[tuple[int, int]]], LinearT],
) -> dict[str, LinearT]:
    """Put an adapted map in the place of each chosen one of the model.

    Args:
        vit: changed in place: its linear maps become the `base` of the new ones, bit for bit.
        targets: of q, k, v (parts of ``attn.qkv``, or maps of their own), proj, fc1, fc2.
        blocks: indices; None means all.
        make: the linear map and the (start, stop) of its output rows to adapt -> the adapted map.

    Returns:
        The new maps by name, as ``blocks.3.attn.qkv``.

    Raises:
        ValueError: for unknown targets, blocks that the model does not have, or blocks without such a linear map.
    """
    unknown = [t for t in targets if t not in get_args(Target)]
    if unknown or not targets:
        raise ValueError(f"Expected `targets` to be among {get_args(Target)} but got {tuple(targets)}.")
    depth = len(vit.blocks)
    chosen = range(depth) if blocks is None else blocks
    if not chosen or any(not 0 <= i < depth for i in chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(f"Expected `blocks` to be different indices in 0..{depth - 1} but got {tuple(chosen)}.")
    layers: dict[str, LinearT] = {}
    for i in chosen:
        apart = getattr(getattr(vit.blocks[i], "attn", None), "q_proj", None) is not None
        for path in dict.fromkeys((_PATHS | _OF_THREE if apart else _PATHS)[t] for t in targets):
            parent_name, _, leaf = f"blocks.{i}.{path}".rpartition(".")
            linear = _find_linear(vit, f"{parent_name}.{leaf}")
            slices = [(0, linear.out_features)]
            if path == "attn.qkv":
                third = linear.out_features // 3
                slices = [(j * third, (j + 1) * third) for j, part in enumerate("qkv") if part in targets]
            layers[f"{parent_name}.{leaf}"] = make(linear, slices)
    for name, layer in layers.items():
        parent_name, _, leaf = name.rpartition(".")
        parent = vit.get_submodule(parent_name)
        setattr(parent, leaf, layer)
        if leaf == "qkv" and hasattr(parent, "qkv_bias_separate"):
            parent.qkv_bias_separate = True  # else EvaAttention takes the map's weights and never calls the map
    return layers


def _find_linear(vit: TimmViT, name: str) -> nn.Linear:
    try:
        module = vit.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"Expected the model to have a linear map at {name} but found {type(module).__name__}: "
            "leave that target out (of q, k and v, all three), or use a ViT of plain timm blocks, or a method that "
            "adapts no maps."
        )
    return module
