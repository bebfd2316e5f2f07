"""Weights files: hashes, and state dicts read and loaded without running any code from them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avalanche_fmlora.backbones.config import BackboneConfig


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


def read_state(path: Path) -> dict[str, Tensor]:
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
            f"'{path}' is torn or holds more than tensors ({path.stat().st_size:,} bytes; {first_line(error)}), and "
            "pickled code is never run here. Fetch it again, or, where you trust it, convert it once: "
            "safetensors.torch.save_file(torch.load(path, weights_only=False)['model'], 'weights.safetensors')."
        ) from error


def load_state(model: Any, state: dict[str, Tensor], config: BackboneConfig) -> None:
    """Load `state`, position embeddings resampled to the model's grid; ValueError unless all but a head fits."""
    from timm.models import eva, vision_transformer

    assert config.weights is not None
    where = f"'{config.weights.name}' does not fit {config.name}"
    _check_patch(model, state, config, where)
    try:
        fitted = eva if isinstance(model, eva.Eva) else vision_transformer
        state = fitted.checkpoint_filter_fn(state, model)
    except (RuntimeError, ValueError, KeyError, AssertionError, AttributeError, IndexError) as error:
        raise ValueError(f"{where}: {first_line(error)}. Check the architecture.") from error
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


_PATCHES = ("patch_embed.proj.weight", "visual.conv1.weight")
"""How names of the patch embedding end: timm's (also below a prefix), and OpenAI's."""


def _check_patch(model: Any, state: dict[str, Tensor], config: BackboneConfig, where: str) -> None:
    """ValueError if the file's patch has another size: timm would resample it without a word."""
    own = dict(model.named_parameters()).get(_PATCHES[0])
    given = next((tensor for key, tensor in state.items() if key.endswith(_PATCHES)), None)
    if own is None or given is None or given.ndim != 4 or given.shape[2:] == own.shape[2:]:
        return
    if "patch_size" not in config.model_args:
        raise ValueError(
            f"{where}: the file has patches of {given.shape[-1]} px, the model of {own.shape[-1]}. Name the "
            f"file's architecture, or resample on purpose with model_args={{'patch_size': {own.shape[-1]}}}."
        )


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def first_line(error: BaseException) -> str:
    """Of an error's message."""
    return (str(error).strip().splitlines() or ["no reason given"])[0]
