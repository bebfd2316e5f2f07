"""What a strategy has added to its backbone, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from avalanche_fmlora.backbones import state_sha256
from avalanche_fmlora.results.record import write_atomically

_FORMAT = "avalanche_fmlora adapter 1"


def save_adapter(
    path: Path,
    state: dict[str, Tensor],
    method: str,
    config: dict[str, Any],
    numbers: dict[str, Any] | None = None,
    backbone: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write tensors with the method's name and configuration beside them; the file appears whole or not at all."""
    metadata = {"format": _FORMAT, "method": method, "config": json.dumps(config, sort_keys=True)}
    if backbone:
        metadata["backbone"] = _fingerprint(backbone)
    if numbers:
        metadata["numbers"] = json.dumps(numbers, sort_keys=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    return write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_adapter(
    path: Path,
    method: str,
    config: dict[str, Any],
    structural: Iterable[str],
    backbone: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and numbers of :func:`save_adapter` for a strategy of this method and configuration.

    Args:
        path: the file.
        method: of the strategy.
        config: its options.
        structural: names of the options that must be as they were saved.
        backbone: weights of the backbone, which must be those that it was saved around, if the file says of which.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is torn, another program's, another method's, or of a model with other options or weights.
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
    other = {k: saved[k] for k in sorted({*structural} & saved.keys() & config.keys()) if saved[k] != config[k]}
    if other:
        own = {k: config[k] for k in other}
        raise ValueError(
            f"{path} was saved with {other} but this strategy has {own}: "
            "build the strategy with the options that it was saved with."
        )
    if backbone and (around := metadata.get("backbone")):
        found = _fingerprint(backbone)
        if around != found and around.split()[0] == found.split()[0]:
            raise ValueError(
                f"{path} was saved around other weights of the backbone ({around}) than this strategy's ({found}): "
                "build it around the model that was trained."
            )
    return state, json.loads(metadata.get("numbers", "{}"))


def _fingerprint(backbone: Mapping[str, Tensor]) -> str:
    """Precision and hash of a backbone's weights: in another precision the same weights have another hash."""
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in backbone.values()})
    return f"{'+'.join(dtypes)} {state_sha256(dict(backbone))[:16]}"
