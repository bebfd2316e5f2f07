"""The packaged backbone: a small timm ViT pretrained on characters that are in neither glyph benchmark.

The model is an ordinary ``timm`` :class:`VisionTransformer` (width 128, 6 blocks, 4 heads, class token, 4x4 tokens of
32x32 images behind four convolutions) that needs nothing of this package. ``benchmarks/pretrain_glyphs.py`` made the
weights; ``assets/glyph_vit.json`` says how.
"""

from __future__ import annotations

import hashlib
from functools import partial
from importlib.resources import files

import torch
from timm.layers import HybridEmbed
from timm.layers.conv_bn_act import ConvNormAct
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .glyph_render import GLYPH_MEAN, GLYPH_STD, IMAGE_SIZE

GLYPH_VIT_TAG = "glyph_vit.glyphs639"
GLYPH_VIT_IMAGE_SIZE = IMAGE_SIZE
GLYPH_VIT_MEAN = GLYPH_MEAN
GLYPH_VIT_STD = GLYPH_STD
_WEIGHTS = "glyph_vit.safetensors"
_STEM = ((3, 24, 1), (24, 48, 2), (48, 96, 2), (96, 128, 2))


def _stem(batch_norm: bool) -> nn.Sequential:
    """3x3 convolutions, stride 8 in all; the last has neither normalisation nor activation."""
    last = len(_STEM) - 1
    layers = []
    for i, (channels_in, channels_out, stride) in enumerate(_STEM):
        normed = batch_norm and i < last
        layer = ConvNormAct(
            channels_in,
            channels_out,
            3,
            stride=stride,
            padding=1,
            bias=not normed,
            apply_norm=normed,
            act_layer=nn.GELU,
        )
        if i < last and not normed:  # timm's layer has an activation only where it has a normalisation
            layer.bn.add_module("act", nn.GELU())
        layers.append(layer)
    return nn.Sequential(*layers)


def build_glyph_vit(batch_norm: bool = False) -> VisionTransformer:
    """The architecture with fresh weights. `batch_norm=True` is the form that is trained, see :func:`fold_batch_norm`.

    >>> vit = build_glyph_vit()
    >>> tuple(vit(torch.zeros(2, 3, 32, 32)).shape)
    (2, 128)
    """
    return VisionTransformer(
        img_size=GLYPH_VIT_IMAGE_SIZE,
        patch_size=1,
        num_classes=0,
        embed_dim=128,
        depth=6,
        num_heads=4,
        embed_layer=partial(HybridEmbed, backbone=_stem(batch_norm), proj=False),
    )


@torch.no_grad()
def fold_batch_norm(vit: VisionTransformer) -> VisionTransformer:
    """A copy of a model built with `batch_norm=True` whose convolutions do the normalisation: nothing in it depends on
    the batch or changes when the model is in training mode. The output is that of `vit` in evaluation mode."""
    folded = build_glyph_vit()
    state = {k: v.clone() for k, v in vit.state_dict().items() if ".bn." not in k}
    for i, layer in enumerate(vit.patch_embed.backbone):
        bn = layer.bn
        if not isinstance(bn, nn.BatchNorm2d):
            continue
        assert bn.running_var is not None
        assert bn.running_mean is not None
        gain = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        prefix = f"patch_embed.backbone.{i}.conv"
        state[f"{prefix}.weight"] = layer.conv.weight * gain[:, None, None, None]
        state[f"{prefix}.bias"] = bn.bias - bn.running_mean * gain
    folded.load_state_dict(state)
    return folded.eval()


def glyph_vit(pretrained: bool = True) -> VisionTransformer:
    """The packaged backbone in evaluation mode, without a head; its features are the normed class token, [B, 128].

    Args:
        pretrained: load the packaged weights (float16 in the file, float32 in memory); otherwise fresh ones.

    Expects images [B, 3, 32, 32] normalised with :data:`GLYPH_VIT_MEAN` and :data:`GLYPH_VIT_STD`.
    """
    vit = build_glyph_vit()
    if pretrained:
        from safetensors.torch import load

        vit.load_state_dict({name: value.float() for name, value in load(_packaged(_WEIGHTS)).items()})
    return vit.eval()


def glyph_vit_sha256() -> str:
    """sha256 of the packaged weights file: 64 hexadecimal digits."""
    return hashlib.sha256(_packaged(_WEIGHTS)).hexdigest()


def _packaged(name: str) -> bytes:
    return (files("avalanche_fmlora") / "assets" / name).read_bytes()
