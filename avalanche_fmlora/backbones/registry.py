"""Short names of the backbones that the literature of continual learning uses most, each for one full timm tag."""

from __future__ import annotations

from dataclasses import dataclass

EMBEDDED = "glyph_vit"

SHORT_NAMES = {
    "vit_b16_in21k_ft_in1k": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_b16_in21k": "vit_base_patch16_224.augreg_in21k",
    "vit_s16_in21k_ft_in1k": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_s16_in21k": "vit_small_patch16_224.augreg_in21k",
    "vit_ti16_in21k_ft_in1k": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_ti16_in21k": "vit_tiny_patch16_224.augreg_in21k",
    "dinov2_b14": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_b14_reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2_s14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_s14_reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov3_b16": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3_s16": "vit_small_patch16_dinov3.lvd1689m",
    "clip_b16": "vit_base_patch16_clip_quickgelu_224.openai",
}
"""Short name -> `architecture.tag` of timm."""


@dataclass(frozen=True)
class BackboneFacts:
    """What a list of backbones shows of one.

    Attributes:
        name: short name.
        tag: `architecture.tag`.
        width: of its features.
        depth: blocks.
        patch: side of a patch in pixels; None for the embedded model, which has convolutions before its blocks.
        image_size: side of its own input in pixels; a timm model takes any multiple of the patch.
        mean: of each channel in [0, 1], as its weights were trained.
        std: of each channel.
    """

    name: str
    tag: str
    width: int
    depth: int
    patch: int | None
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def full_name(name: str) -> str:
    """The `architecture.tag` of a short name; any other name as it is.

    >>> full_name("dinov2_b14"), full_name("deit_tiny_patch16_224.fb_in1k")
    ('vit_base_patch14_dinov2.lvd142m', 'deit_tiny_patch16_224.fb_in1k')
    """
    return SHORT_NAMES.get(name, name)


def known_backbones() -> list[BackboneFacts]:
    """The embedded model and those with a short name. Their facts are timm's; no weights are fetched."""
    return [_embedded_facts(), *(_timm_facts(short, tag) for short, tag in SHORT_NAMES.items())]


def _embedded_facts() -> BackboneFacts:
    from avalanche_fmlora.data import glyph_vit as packaged

    vit = packaged.glyph_vit(pretrained=False)
    size, mean, std = packaged.GLYPH_VIT_IMAGE_SIZE, packaged.GLYPH_VIT_MEAN, packaged.GLYPH_VIT_STD
    width, depth = vit.num_features, len(vit.blocks)
    return BackboneFacts(EMBEDDED, packaged.GLYPH_VIT_TAG, width, depth, None, size, tuple(mean), tuple(std))


def _timm_facts(short: str, tag: str) -> BackboneFacts:
    import timm
    import torch

    with torch.device("meta"):  # shapes without memory
        vit = timm.create_model(tag, pretrained=False, num_classes=0)
    own = vit.pretrained_cfg
    patch, size = vit.patch_embed.patch_size[0], own["input_size"][-1]
    width, depth = vit.num_features, len(vit.blocks)
    return BackboneFacts(short, tag, width, depth, patch, size, tuple(own["mean"]), tuple(own["std"]))
