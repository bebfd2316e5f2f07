"""A name or a file -> a frozen-to-be timm ViT, with what a result record says about it: tag, hash, mean and std."""

from __future__ import annotations

import difflib
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

logger = logging.getLogger(__name__)

EMBEDDED = "glyph_vit"
_RESERVED_ARGS = {
    "img_size": "`image_size`",
    "pretrained": "`pretrained`",
    "num_classes": "nothing: heads are the strategy's",
    "checkpoint_path": "`weights`",
}


class BackboneConfig(BaseModel):
    """Which ViT, whose weights, and how its input is normalised."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    name: str = EMBEDDED
    """`glyph_vit` (embedded) or a timm model: `architecture.tag`, or just the architecture with `weights`."""
    weights: Path | None = None
    """A .safetensors, .pth, .pt or .bin file with a state dict for the architecture; None is the tag's own weights."""
    image_size: int | None = Field(default=None, gt=0)
    """Side of the square input in pixels, a multiple of the patch; None is the model's own."""
    pretrained: bool = True
    """False gives random weights."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `timm.create_model`, such as `depth: 11`."""
    mean: tuple[float, float, float] | None = None
    """Of each channel in [0, 1], subtracted; None is the mean the weights were trained with."""
    std: tuple[float, float, float] | None = None
    """Of each channel, divided by; None is the one the weights were trained with."""
    normalize: Literal["weights", "unit"] = "weights"
    """`weights`: mean and std of the weights, or those given; `unit`: input in [0, 1], as in most published runs."""

    @field_validator("weights")
    @classmethod
    def _home(cls, weights: Path | None) -> Path | None:
        return None if weights is None else weights.expanduser()

    @model_validator(mode="after")
    def _agree(self) -> BackboneConfig:
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"Expected `mean` and `std` together but got mean={self.mean}, std={self.std}.")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"Expected `std` to be above 0 but got {self.std}.")
        if self.mean is not None and self.normalize == "unit":
            raise ValueError("`normalize: unit` is mean 0 and std 1: leave `mean` and `std` out, or say `weights`.")
        if self.weights is not None and not self.pretrained:
            raise ValueError("`pretrained: false` means random weights: leave `weights` out, or `pretrained` at true.")
        for key in sorted(set(self.model_args) & set(_RESERVED_ARGS)):
            raise ValueError(f"`model_args` holds {key!r}, which is set by {_RESERVED_ARGS[key]}: take it out.")
        return self


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

    model: VisionTransformer
    tag: str
    sha256: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_backbone(config: BackboneConfig) -> Backbone:
    """Build the ViT and load its weights; no code from a weights file is ever run.

    Args:
        config: what to load.

    Returns:
        The backbone.

    Raises:
        FileNotFoundError: if the weights file is missing, or the hub can't be reached.
        ValueError: if the name is unknown, ambiguous or no ViT, the file is torn or doesn't fit, or the image size is
            no multiple of the patch. The message names what was expected.
    """
    if config.name == EMBEDDED:
        model, tag = _embedded(config)
    else:
        model, tag = _from_timm(config)
    size = _check_image_size(config.name, model)
    if config.weights is not None:
        state = _read_state(config.weights)
        _load_state(model, state, config)
        digest = file_sha256(config.weights)
    elif config.name == EMBEDDED and config.pretrained:
        from avalanche_fmlora.data.glyph_vit import glyph_vit_sha256

        digest = glyph_vit_sha256()
    else:
        digest = state_sha256(model.state_dict())
    mean, std = _normalisation(config, model)
    logger.info("Backbone %s, %d px, sha256 %s", tag, size, digest[:8])
    return Backbone(model.float().eval(), tag, digest, size, mean, std)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def state_sha256(state: dict[str, Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of each tensor, in the order of the names.

    >>> a, b = {"x": torch.ones(2), "y": torch.zeros(1)}, {"y": torch.zeros(1), "x": torch.ones(2)}
    >>> state_sha256(a) == state_sha256(b) != state_sha256({"x": torch.ones(2)})
    True
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
        known = [*timm.list_models(), EMBEDDED]
        near = difflib.get_close_matches(architecture, known, n=5, cutoff=0.5)
        raise ValueError(
            f"Expected `name` to be {EMBEDDED!r} or a timm model but got {config.name!r}: "
            + (f"did you mean {', '.join(near)}?" if near else "`timm.list_models('vit_*')` lists them.")
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
    from timm.models.vision_transformer import VisionTransformer

    try:
        model = timm.create_model(name, pretrained=False, **_arguments(config))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        plain = timm.create_model(name, pretrained=False)
        if isinstance(plain, VisionTransformer):
            raise ValueError(
                f"{name} can't be built with image_size={config.image_size}, model_args={config.model_args}: {error}."
            ) from error
        model = plain
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"Expected a timm VisionTransformer (ViT, DeiT, AugReg, DINO, DINOv2, CLIP, SigLIP) but {name} is a "
            f"{type(model).__name__}: `timm.list_models('vit_*')` lists most of them."
        )
    return model


def _from_hub(name: str, config: BackboneConfig) -> Any:
    import timm

    try:
        return timm.create_model(name, pretrained=True, **_arguments(config))
    except Exception as error:  # the hub client's own errors share no base class
        if "state_dict" in str(error):
            raise ValueError(
                f"The weights of {name} don't fit model_args={config.model_args}: {_first_line(error)}"
            ) from error
        architecture = name.partition(".")[0]
        raise FileNotFoundError(
            f"The weights of {name} can't be fetched ({type(error).__name__}: {_first_line(error)}). Without a "
            f"network, fetch them elsewhere and give the file: BackboneConfig(name={architecture!r}, "
            f"weights='/path/to/{name}.safetensors')."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]


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


def _normalisation(config: BackboneConfig, model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if config.normalize == "unit":
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    if config.name == EMBEDDED:
        from avalanche_fmlora.data.glyph_vit import GLYPH_VIT_MEAN, GLYPH_VIT_STD

        return tuple(GLYPH_VIT_MEAN), tuple(GLYPH_VIT_STD)
    return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])


def _read_state(path: Path) -> dict[str, Tensor]:
    """The file's tensors, floating ones as float32; ValueError if it is torn or needs pickled code."""
    if not path.is_file():
        raise FileNotFoundError(f"Expected a weights file at '{path}' but there is none: correct `weights`.")
    if path.suffix == ".safetensors":
        found = _read_safetensors(path)
    elif path.suffix in (".pth", ".pt", ".bin"):
        found = _read_torch(path)
    else:
        raise ValueError(f"Expected weights as .safetensors, .pth, .pt or .bin but got '{path.name}'.")
    for key in ("model", "state_dict"):
        found = found.get(key, found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(
            f"Expected '{path.name}' to hold a state dict (name -> tensor, at the top or under `model` or "
            f"`state_dict`) but got {_kind(found)}: save `model.state_dict()`."
        )
    state = {str(k): v.float() if v.is_floating_point() else v for k, v in found.items()}
    sick = [k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if sick:
        raise ValueError(f"{len(sick)} of {len(state)} tensors in '{path.name}' are not finite: {_names(sick)}.")
    return state


def _kind(found: Any) -> str:
    if not isinstance(found, dict):
        return f"a {type(found).__name__}"
    return f"a dict of {_names([f'{k}: {type(v).__name__}' for k, v in found.items()])}" if found else "an empty dict"


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' is no whole safetensors file ({error}; {path.stat().st_size:,} bytes): fetch it again."
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # torch raises nearly any type on torn data
        raise ValueError(
            f"'{path}' is torn or holds more than tensors ({path.stat().st_size:,} bytes; {_first_line(error)}), and "
            "pickled code is never run here. Fetch it again, or, where you trust it, convert it once: "
            "safetensors.torch.save_file(torch.load(path, weights_only=False)['model'], 'weights.safetensors')."
        ) from error


def _load_state(model: Any, state: dict[str, Tensor], config: BackboneConfig) -> None:
    """Load `state`, position embeddings resampled to the model's grid; ValueError unless all but a head fits."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    assert config.weights is not None
    where = f"'{config.weights.name}' does not fit {config.name}"
    _check_patch(model, state, config, where)
    try:
        state = checkpoint_filter_fn(state, model)
    except (RuntimeError, ValueError, KeyError, AssertionError, AttributeError, IndexError) as error:
        raise ValueError(f"{where}: {_first_line(error)}. Check the architecture.") from error
    own = model.state_dict()
    state = {k: v for k, v in state.items() if k in own or not k.startswith(("head.", "head_dist."))}
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if not (missing or unexpected or shapes):
        model.load_state_dict(state)
        return
    faults = ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
    said = "; ".join(f"{len(names)} {kind} ({_names(names)})" for names, kind in faults if names)
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    hint = f" The file has {depth} blocks, the model {len(model.blocks)}: try model_args={{'depth': {depth}}}."
    raise ValueError(
        f"{where}: of {len(own)} tensors expected, {said}. Check the architecture and `model_args`."
        + (hint if depth and depth != len(model.blocks) else "")
    )


def _check_patch(model: Any, state: dict[str, Tensor], config: BackboneConfig, where: str) -> None:
    """ValueError if the file's patch has another size: timm would resample it without a word."""
    key = "patch_embed.proj.weight"
    own, given = dict(model.named_parameters()).get(key), state.get(key)
    if own is None or given is None or given.ndim != 4 or given.shape[2:] == own.shape[2:]:
        return
    if "patch_size" not in config.model_args:
        raise ValueError(
            f"{where}: the file has patches of {given.shape[-1]} px, the model of {own.shape[-1]}. Name the "
            f"file's architecture, or resample on purpose with model_args={{'patch_size': {own.shape[-1]}}}."
        )


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
