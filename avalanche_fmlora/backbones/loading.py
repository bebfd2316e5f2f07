"""A name or a file -> a frozen-to-be timm ViT, with what a result record says about it: tag, hash, mean and std."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from avalanche_fmlora.backbones.config import BackboneConfig
from avalanche_fmlora.backbones.files import file_sha256, first_line, load_state, read_state, state_sha256
from avalanche_fmlora.backbones.registry import EMBEDDED, SHORT_NAMES

if TYPE_CHECKING:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backbone:
    """A loaded ViT.

    Attributes:
        model: without a head, float32, in eval mode.
        tag: what to call it in a table: `architecture.tag`, `architecture/file` or `architecture.random`.
        sha256: of the weights file, or of the state dict where there is no file of ours (:func:`state_sha256`).
        image_size: side of the input in pixels.
        mean: of each channel in [0, 1], to be subtracted.
        std: of each channel, to be divided by.
    """

    model: VisionTransformer | Eva
    tag: str
    sha256: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_backbone(config: BackboneConfig | str) -> Backbone:
    """Build the ViT and load its weights; no code from a weights file is ever run.

    Random weights are drawn with a fixed seed, so a configuration always gives the same backbone, and torch's global
    generator is left as it was.

    Args:
        config: what to load; a name is ``BackboneConfig(name=...)``, a timm ViT with its own weights.

    Returns:
        The backbone.

    Raises:
        FileNotFoundError: if the weights file is missing, or the hub can't be reached.
        ValueError: if the name is unknown, ambiguous or no ViT, the file is torn or doesn't fit, or the image size is
            no multiple of the patch. The message names what was expected.
    """
    config = BackboneConfig(name=config) if isinstance(config, str) else config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, tag = _embedded(config) if config.name == EMBEDDED else _from_timm(config)
    size = _check_image_size(config.name, model)
    if config.weights is not None:
        state = read_state(config.weights)
        load_state(model, state, config)
        digest = file_sha256(config.weights)
    elif config.name == EMBEDDED and config.pretrained:
        from avalanche_fmlora.data.glyph_vit import glyph_vit_sha256

        digest = glyph_vit_sha256()
    else:
        digest = state_sha256(model.state_dict())
    mean, std = _normalisation(config, model)
    _warn_of_a_guess(config, mean, std)
    _warn_of_another_activation(config, model)
    logger.info("Backbone %s, %d px, sha256 %s", tag, size, digest[:8])
    return Backbone(model.float().eval(), tag, digest, size, mean, std)


def _embedded(config: BackboneConfig) -> tuple[Any, str]:
    from avalanche_fmlora.data.glyph_vit import GLYPH_VIT_IMAGE_SIZE, GLYPH_VIT_TAG, glyph_vit

    if config.image_size not in (None, GLYPH_VIT_IMAGE_SIZE):
        raise ValueError(f"{EMBEDDED} takes images of {GLYPH_VIT_IMAGE_SIZE} px but got {config.image_size}.")
    if config.model_args:
        raise ValueError(f"{EMBEDDED} takes no `model_args` but got {config.model_args}: name a timm architecture.")
    own = config.pretrained and config.weights is None
    return glyph_vit(pretrained=own), _tag(config, EMBEDDED, GLYPH_VIT_TAG.partition(".")[2])


def _tag(config: BackboneConfig, architecture: str, tag: str) -> str:
    if config.weights is not None:
        return f"{architecture}/{config.weights.name}"
    return f"{architecture}.{tag}" if config.pretrained else f"{architecture}.random"


def _from_timm(config: BackboneConfig) -> tuple[Any, str]:
    """The model and its tag; hub weights are already in it, those of a file are not."""
    import timm

    architecture, _, tag = config.name.partition(".")
    if architecture not in timm.list_models():
        known = [*timm.list_models(), EMBEDDED, *SHORT_NAMES]
        near = difflib.get_close_matches(architecture, known, n=5, cutoff=0.5)
        raise ValueError(
            f"Expected `name` to be {EMBEDDED!r} or a timm model but got {config.name!r}: "
            + (
                f"did you mean {', '.join(near)}?"
                if near
                else "`fmlora list backbones` and `timm.list_models('vit_*')` list them."
            )
        )
    tags = [name.partition(".")[2] for name in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise ValueError(f"{architecture} has no weights {tag!r}: choose one of {', '.join(tags) or 'none'}.")
    from_hub = config.pretrained and config.weights is None
    if from_hub and not tag:
        if len(tags) != 1:
            raise ValueError(
                f"{architecture!r} has {len(tags)} sets of pretrained weights ({', '.join(tags) or 'none'}): say "
                f"which, as `{architecture}.<tag>`, give a file by `weights`, or set `pretrained` to false."
            )
        tag = tags[0]
    full = f"{architecture}.{tag}" if tag else architecture
    model = _create(full, config)
    return (_from_hub(full, config) if from_hub else model), _tag(config, architecture, tag)


def _arguments(config: BackboneConfig) -> dict[str, Any]:
    size = {} if config.image_size is None else {"img_size": config.image_size}
    return {"num_classes": 0, **size, **config.model_args}


def _create(name: str, config: BackboneConfig) -> Any:
    """A timm ViT with random weights; ValueError if it is none or the arguments don't fit it."""
    import timm
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    kinds = (VisionTransformer, Eva)
    try:
        model = timm.create_model(name, pretrained=False, **_arguments(config))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        plain = timm.create_model(name, pretrained=False)
        if isinstance(plain, kinds):
            raise ValueError(
                f"{name} can't be built with image_size={config.image_size}, model_args={config.model_args}: {error}."
            ) from error
        model = plain
    if not isinstance(model, kinds):
        raise ValueError(
            "Expected a timm VisionTransformer (ViT, DeiT, AugReg, DINO, DINOv2, CLIP, SigLIP) or Eva (DINOv3, EVA-02) "
            f"but {name} is a {type(model).__name__}: `timm.list_models('vit_*')` lists most of them."
        )
    return model


def _from_hub(name: str, config: BackboneConfig) -> Any:
    import timm

    try:
        return timm.create_model(name, pretrained=True, **_arguments(config))
    except Exception as error:  # the hub client's own errors share no base class
        if "state_dict" in str(error):
            raise ValueError(
                f"The weights of {name} don't fit model_args={config.model_args}: {first_line(error)}"
            ) from error
        cfg = timm.get_pretrained_cfg(name)
        hub = (cfg and cfg.hf_hub_id) or f"timm/{name}"
        raise FileNotFoundError(
            f"The weights of {name} can't be fetched ({type(error).__name__}: {first_line(error)}). Without a network, "
            f"fetch model.safetensors of huggingface.co/{hub} elsewhere and give the file: --backbone {name} "
            f"--weights /path/to/model.safetensors, or BackboneConfig(name={name!r}, weights=...)."
        ) from error


def _check_image_size(name: str, model: Any) -> int:
    """The side of the model's input; ValueError unless it is square and a multiple of the patch."""
    height, width = model.patch_embed.img_size
    if name == EMBEDDED:  # its size is fixed, and its convolutions are no patch
        return int(height)
    patch = model.patch_embed.feat_ratio(as_scalar=False)
    if height != width or height % patch[0] or width % patch[1]:
        below = height // patch[0] * patch[0]
        near = " or ".join(str(s) for s in (below, below + patch[0]) if s)
        raise ValueError(
            f"Expected `image_size` of {name} to be a multiple of its patch, {patch[0]} px, but got {height}: "
            f"take {near}."
        )
    return int(height)


def _warn_of_a_guess(config: BackboneConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Say so where a file's weights stand under a bare architecture whose published weights want several means."""
    import timm

    if config.weights is None or config.mean is not None or config.normalize == "unit":
        return
    names = timm.list_models(f"{config.name}.*", pretrained=True)
    cfgs = {name: timm.get_pretrained_cfg(name) for name in names}
    others = [name for name, cfg in cfgs.items() if cfg and (tuple(cfg.mean), tuple(cfg.std)) != (mean, std)]
    if others:
        logger.warning(
            "%s under the name %s: images are normalised by mean %s and std %s, but %d of the %d published weights of "
            "this architecture, as %s, were trained with others. Write `%s.<tag>`, or give `mean` and `std`.",
            config.weights.name, config.name, mean, std, len(others), len(cfgs), others[0], config.name,
        )  # fmt: skip


def _warn_of_another_activation(config: BackboneConfig, model: Any) -> None:
    """Say so where weights that were trained with QuickGELU stand in a model with GELU, as timm loads them too."""
    if config.name == EMBEDDED or not (config.pretrained or config.weights):
        return
    notes = " ".join(model.pretrained_cfg.get("notes") or ())
    if "QuickGELU" in notes and type(model.blocks[0].mlp.act) is nn.GELU:
        logger.warning(
            "%s computes with GELU what was trained with QuickGELU, so its features are not the published ones. Write "
            "the name with `quickgelu`: `timm.list_models('*quickgelu*')` lists them.",
            config.name,
        )


def _normalisation(config: BackboneConfig, model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if config.normalize == "unit":
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    if config.name == EMBEDDED:
        from avalanche_fmlora.data.glyph_vit import GLYPH_VIT_MEAN, GLYPH_VIT_STD

        return tuple(GLYPH_VIT_MEAN), tuple(GLYPH_VIT_STD)
    return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])
