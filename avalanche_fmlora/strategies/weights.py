"""What a strategy has added to its backbone, in one safetensors file."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

_FORMAT = "avalanche_fmlora adapter 1"
# fmt: off
_OF_THE_MODEL = {
    "rank", "targets", "blocks", "scale", "bases", "classifier", "logit_scale", "prompt_length", "pool_size", "top_k",
    "prompt_position", "batchwise", "g_length", "e_length", "g_blocks", "e_blocks", "n_tasks", "restrict_to_seen",
}
# fmt: on
"""Options that say what the tensors mean; all others only matter to training."""


def save_adapter(path: Path, state: dict[str, Tensor], method: str, config: dict[str, Any]) -> Path:
    """Write tensors with the method's name and configuration beside them; the file appears whole or not at all."""
    metadata = {"format": _FORMAT, "method": method, "config": json.dumps(config, sort_keys=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        safetensors.torch.save_file({k: v.detach().contiguous() for k, v in state.items()}, name, metadata)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path


def load_adapter(path: Path, method: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of :func:`save_adapter` for a strategy of this method and configuration.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is torn, another program's, another method's, or of a model with other options.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no adapter file {path}: `strategy.save(path)` writes one.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): save it again.") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} was not written by `strategy.save`: it has format {metadata.get('format')!r}.")
    if metadata["method"] != method:
        raise ValueError(
            f"{path} holds a {metadata['method']} adapter but this strategy is {method}: use that strategy."
        )
    saved = json.loads(metadata["config"])
    other = {k: saved[k] for k in sorted(_OF_THE_MODEL & saved.keys() & config.keys()) if saved[k] != config[k]}
    if other:
        own = {k: config[k] for k in other}
        raise ValueError(
            f"{path} was saved with {other} but this strategy has {own}: "
            "build the strategy with the options that it was saved with."
        )
    return state
