"""A trained network as a plain timm model: updates in its weights, prompt among its register tokens, its own head."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avalanche_fmlora.modules.adapted_linear import AdaptedLinear
from avalanche_fmlora.modules.head import UNSEEN_LOGIT, IncrementalHead
from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.modules.vit import TimmViT, pooled_blocks, pooling_complement, pools_prefix


@torch.no_grad()
def merged_vit(network: ContinualNetwork) -> TimmViT:
    """A plain timm ViT with the updates in its weights, the prompt among its register tokens and the head as its head.

    It holds no class of this package: saved with `torch.save`, it loads wherever timm is installed. Logits are the
    network's own, also those of classes never seen; no random number is drawn. A distilled DeiT becomes a ViT with one
    register token. Where the network reads token and mean, so does the pooling (`attn_pool`), for images of the model's
    own size; its features are then twice as wide as timm's `reset_classifier` takes them to be: set `head` yourself for
    other classes.

    Args:
        network: with any of low-rank updates and prompt.

    Raises:
        ValueError: if a subclass calculates its features in another way, or they are those of several blocks, which no
            plain ViT can.
    """
    if not network.has_plain_features:
        raise ValueError(
            f"Expected a network whose features are its ViT's but {type(network).__name__} has its own `features`, "
            "which a plain timm model can't hold: use `strategy.model(images)`, and `strategy.save(path)` to keep it."
        )
    vit = network.vit
    if (count := pooled_blocks(vit, network.pooling)) > 1:
        raise ValueError(
            f"Expected features of the last block, which a plain timm model pools, but {network.pooling!r} reads the "
            f"last {count}: use `strategy.model(images)`, and `strategy.save(path)` to keep it, or train with "
            "pooling='token_and_mean'."
        )
    dtype = next(vit.parameters()).dtype
    merged: Any = copy.deepcopy(vit)
    for name, layer in vit.named_modules():
        if isinstance(layer, AdaptedLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(merged.get_submodule(parent), leaf, layer.to_linear())
    if isinstance(merged, VisionTransformerDistilled):
        _distilled_to_plain(merged)
    if network.prompt is not None:
        _prompt_to_registers(merged, network.prompt.prompt.to(dtype))
    missing = pooling_complement(vit)
    if network.pooling == "token_and_mean" and missing is not None:
        _pool_token_and_mean(merged, missing)
    merged.head = _plain_head(network.head).to(dtype)
    merged.num_classes = network.head.n_classes
    return merged.requires_grad_(True)


def _distilled_to_plain(vit: Any) -> None:
    """Distillation token -> register token; the features stay the mean of its output and the class token's."""
    vit.__class__ = VisionTransformer
    vit.reg_token, vit.num_reg_tokens = vit.dist_token, 1
    del vit.dist_token, vit.head_dist
    # With a stride longer than any sequence, one window is left: the first two tokens.
    vit.attn_pool = nn.Sequential(nn.AvgPool2d((2, 1), stride=(2**20, 1)), nn.Flatten(1))
    vit.pool_include_prefix = True


def _pool_token_and_mean(vit: Any, missing: Literal["mean", "token"]) -> None:
    """Pooling made of torch's own layers: the tokens are a convolution's channels, which fixes how many there are."""
    prefix, patches = vit.num_prefix_tokens, vit.patch_embed
    tokens = prefix + math.prod(patches.dynamic_feat_size(patches.img_size))  # num_patches leaves out what is padded
    token, mean, own = torch.zeros(3, tokens)
    token[0] = 1
    mean[prefix:] = 1 / (tokens - prefix)
    if missing == "token":
        start = 0 if pools_prefix(vit) else prefix
        own[start:] = 1 / (tokens - start)
    else:
        own[: 1 if vit.attn_pool is None else 2] = 1 if vit.attn_pool is None else 1 / 2  # two: a distilled model's
    halves = torch.stack([own, token if missing == "token" else mean]).to(next(vit.parameters()))
    norm = nn.RMSNorm(vit.num_features, elementwise_affine=False)
    vit.attn_pool = nn.Sequential(_token_sums(halves), vit.fc_norm, norm, nn.Flatten(1))
    vit.fc_norm, vit.pool_include_prefix = nn.Identity(), True
    vit.num_features = vit.head_hidden_size = 2 * vit.num_features


def _token_sums(weights: Tensor) -> nn.Conv1d:
    """Weights [K, N] -> the map from N tokens [B, N, D] to K weighted sums of them."""
    sums = nn.utils.skip_init(nn.Conv1d, weights.shape[1], weights.shape[0], 1, bias=False)
    sums.weight = nn.Parameter(weights[..., None])
    return sums


def _prompt_to_registers(vit: Any, prompt: Tensor) -> None:
    prefix = vit.num_prefix_tokens
    if vit.pos_embed is not None and not vit.no_embed_class:
        own = vit.pos_embed[:, :prefix].clone()
        if vit.cls_token is not None:
            vit.cls_token = nn.Parameter(vit.cls_token + own[:, :1])
            own = own[:, 1:]
        if vit.reg_token is not None:
            vit.reg_token = nn.Parameter(vit.reg_token + own)
        vit.pos_embed = nn.Parameter(vit.pos_embed[:, prefix:].clone())
    vit.no_embed_class = True
    registers = [prompt[None]] if vit.reg_token is None else [vit.reg_token, prompt[None]]
    vit.reg_token = nn.Parameter(torch.cat(registers, 1))
    if isinstance(vit.attn_pool, nn.Sequential) and isinstance(vit.attn_pool[0], nn.Conv1d):  # merged before
        weights = vit.attn_pool[0].weight[..., 0]
        unread = weights.new_zeros(len(weights), len(prompt))
        vit.attn_pool[0] = _token_sums(torch.cat([weights[:, :prefix], unread, weights[:, prefix:]], 1))
    vit.num_prefix_tokens += len(prompt)
    if isinstance(vit, Eva):
        for block in vit.blocks:  # rotary positions begin behind them
            block.attn.num_prefix_tokens += len(prompt)
    else:
        vit.num_reg_tokens += len(prompt)


def _plain_head(head: IncrementalHead) -> nn.Module:
    unseen = ~head.seen
    rows = head.prediction_rows() if head.cosine else head.weights()[None]
    count, n_classes = rows.shape[:2]
    biased = not head.cosine or bool(unseen.any())
    linear = nn.utils.skip_init(nn.Linear, head.dim, count * n_classes, bias=biased).to(rows)
    if linear.bias is not None:
        linear.bias.copy_(head.biases().masked_fill(unseen, UNSEEN_LOGIT).repeat(count))
    # RMSNorm without weights is f·√D/‖f‖: with rows s·w/√D behind it the logits are exactly s·f·w/‖f‖.
    linear.weight.copy_(rows.flatten(0, 1) * (head.scale / head.dim**0.5 if head.cosine else 1.0))
    if not head.cosine:
        return linear
    norm = nn.RMSNorm(head.dim, eps=torch.finfo(rows.dtype).tiny, elementwise_affine=False)
    if count == 1:
        return nn.Sequential(norm, linear)
    # As an image of one row for each of the K, so that pooling takes a class's largest.
    largest = nn.Sequential(
        nn.Unflatten(-1, (1, count, n_classes)), nn.AdaptiveMaxPool2d((1, n_classes)), nn.Flatten(1)
    )
    return nn.Sequential(norm, linear, *largest)
