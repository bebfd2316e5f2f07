"""What a ViT can take as images, said before timm or torch would fail in other words."""

from __future__ import annotations

import torch
from timm.layers import HybridEmbed, PatchEmbed
from torch import Tensor, nn


def check_images(vit: nn.Module, images: Tensor) -> None:
    """Refuse images that the model can't embed; nothing is computed from their values.

    Args:
        vit: a timm ViT; one whose embedding is of a kind of its own, or whose images pass a forward pre-hook of it
            first, is left to check for itself.
        images: expected of shape [B, C, H, W], in floating point.

    Raises:
        ValueError: for another shape or size than the model's, or numbers that its weights can't be multiplied with.
    """
    embed = vit.patch_embed
    if not isinstance(embed, (PatchEmbed, HybridEmbed)) or embed._forward_pre_hooks:
        return
    weight = next(embed.parameters())
    channels = weight.shape[1] if isinstance(embed, PatchEmbed) else embed.in_chans
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"Expected images of shape [B, {channels}, H, W] but got {list(images.shape)}: change the benchmark's "
            "transform (`Grayscale(3)` makes three channels), or make the model with `in_chans`."
        )
    mixed = torch.is_autocast_enabled(images.device.type) and torch.float64 not in (images.dtype, weight.dtype)
    if not images.is_floating_point() or (images.dtype != weight.dtype and not mixed):
        raise ValueError(
            f"Expected images in {weight.dtype}, as the model's weights are, but got {images.dtype}: end the "
            "benchmark's transform with what makes them so (`ToTensor()`, `Normalize(mean, std)`, "
            "`ConvertImageDtype(dtype)`)."
        )
    size = tuple(images.shape[-2:])
    if embed.img_size is not None and embed.strict_img_size:
        if size != tuple(embed.img_size):
            raise ValueError(
                f"Expected images of {_px(embed.img_size)} px, the model's size, but got {_px(size)}: resize them in "
                f"the benchmark's transform, or make the model for them: timm.create_model(…, img_size={size})."
            )
    elif (
        isinstance(embed, PatchEmbed)
        and not embed.dynamic_img_pad
        and any(side % patch for side, patch in zip(size, embed.patch_size, strict=True))
    ):
        raise ValueError(
            f"Expected images whose sides are multiples of {_px(embed.patch_size)} px, the model's patches, but got "
            f"{_px(size)}: resize them in the benchmark's transform, or make the model with dynamic_img_pad=True."
        )


def _px(size: tuple[int, ...]) -> str:
    return " × ".join(map(str, size))
