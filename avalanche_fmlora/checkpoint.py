"""Checkpoints: one safetensors file each, tensors as tensors and all else as JSON beside them, no pickle.

A file appears whole or not at all, says what it is a checkpoint of and carries a checksum over everything in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from avalanche_fmlora.backbones import state_sha256
from avalanche_fmlora.results.record import is_old, write_atomically

_FORMAT = "avalanche_fmlora checkpoint 1"
_NAME = re.compile(r"experience-(\d{4,})\.safetensors")

logger = logging.getLogger(__name__)


def write_checkpoint(path: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> Path:
    """Write a nested state of numbers, strings, None, tensors, dicts, lists, tuples and sets.

    Args:
        path: of the file; its folder is made.
        state: what to keep. Tensors are named by their place in it.
        identity: what it is a checkpoint of, as JSON knows it; :func:`read_checkpoint` compares it.

    Raises:
        ValueError: if the state holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {"format": _FORMAT, "identity": _json(identity), "state": _json(_pack(dict(state), "", tensors))}
    metadata["sha256"] = _checksum(metadata, tensors)
    return write_atomically(path, safetensors.torch.save(tensors, metadata))


def read_checkpoint(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state that :func:`write_checkpoint` was given, tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is torn, changed, another program's, or a checkpoint of something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}).") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is no checkpoint of this package: its format is {metadata.get('format')!r}.")
    if metadata.pop("sha256", None) != _checksum(metadata, tensors):
        raise ValueError(f"{path} does not match its checksum: it was damaged or changed after it was written.")
    saved = json.loads(metadata["identity"])
    differing = _differences(saved, json.loads(_json(identity)))
    if differing:
        raise ValueError(f"{path} is a checkpoint of something else: {'; '.join(differing)}.")
    state: dict[str, Any] = _unpack(json.loads(metadata["state"]), tensors)
    return state


class CheckpointFolder:
    """The last few checkpoints of one run, a file for each number of finished experiences.

    Args:
        folder: of these files and nothing else; made with the first of them.
        keep: how many are kept.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"Expected `keep` to be at least 1 but got {keep}.")
        self.folder = Path(folder)
        self.keep = keep

    def files(self) -> dict[int, Path]:
        """The files by the number of experiences that were finished, in order."""
        found = {int(m[1]): p for p in self.folder.glob("*.safetensors") if (m := _NAME.fullmatch(p.name))}
        return dict(sorted(found.items()))

    def save(self, finished: int, state: Mapping[str, Any], identity: Mapping[str, Any]) -> Path:
        """Write one; older than the last `keep` go, and so do those of a future that is now another."""
        path = write_checkpoint(self.folder / f"experience-{finished:04d}.safetensors", state, identity)
        files = self.files()
        kept = [n for n in files if n <= finished][-self.keep :]
        for file in [*(p for n, p in files.items() if n not in kept), *self._left_behind()]:
            file.unlink(missing_ok=True)
        return path

    def _left_behind(self) -> list[Path]:
        """What writers that were killed had begun; a younger file may be another process's that runs the same."""
        return [path for path in self.folder.glob(".experience-*.tmp") if is_old(path)]

    def latest(self, identity: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """The last good checkpoint, as (finished experiences, state); None if there is no file.

        Files that are refused are named in the log.

        Raises:
            ValueError: if there are files but all of them are refused.
        """
        refused: list[str] = []
        for finished, path in reversed(self.files().items()):
            try:
                state = read_checkpoint(path, identity)
            except ValueError as error:
                refused.append(str(error))
                continue
            for reason in refused:
                logger.warning("%s The one before it is used.", reason)
            return finished, state
        if refused:
            raise ValueError("\n".join(refused))
        return None

    def clear(self) -> None:
        """Delete all files, and the folder if nothing else is in it."""
        for path in [*self.files().values(), *self._left_behind()]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def random_state() -> dict[str, Any]:
    """States of the random generators that all share: torch on CPU and GPUs, numpy, Python."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": {"keys": _as_tensor(keys), "position": position, "has_gauss": has_gauss, "cached": cached},
        "python": {"version": version, "words": _as_tensor(words), "gauss": gauss},
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on drawing where :func:`random_state` was called; GPUs too, if there are as many of them."""
    torch.set_rng_state(state["torch"])
    own, python = state["numpy"], state["python"]
    np.random.set_state(("MT19937", _as_words(own["keys"]), own["position"], own["has_gauss"], own["cached"]))
    random.setstate((python["version"], tuple(_as_words(python["words"]).tolist()), python["gauss"]))
    if "cuda" in state and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def _as_tensor(words: Any) -> Tensor:
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


def _as_words(tensor: Tensor) -> Any:
    return tensor.numpy().view(np.uint32)


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """A nested state as what JSON knows: all but lists and dicts of plain names as {"$kind": …}."""
    if isinstance(value, Tensor):
        while place in tensors:
            place += "'"
        tensors[place] = value.detach().cpu().clone().contiguous()
        return {"$tensor": place}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: _pack(v, f"{place}/{k}" if place else k, tensors) for k, v in value.items()}
        items = enumerate(value.items())
        return {"$items": [[_pack(k, "", {}), _pack(v, f"{place}/{i}", tensors)] for i, (k, v) in items]}
    if isinstance(value, list | tuple | set):
        packed = [_pack(v, f"{place}/{i}", tensors) for i, v in enumerate(value)]
        return packed if isinstance(value, list) else {f"${type(value).__name__}": packed}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if value is None or isinstance(value, str | bool | int):
        return value
    raise ValueError(
        f"Expected the state of a checkpoint to hold numbers, strings, tensors and containers of them but `{place}` is "
        f"a {type(value).__name__}."
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    kind = next(iter(value), "")
    if not kind.startswith("$"):
        return {k: _unpack(v, tensors) for k, v in value.items()}
    content = value[kind]
    if kind == "$tensor":
        return tensors[content]
    if kind == "$items":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
    if kind == "$float":
        return float(content)
    return {"$tuple": tuple, "$set": set}[kind](_unpack(content, tensors))


def _json(content: Any) -> str:
    return json.dumps(content, sort_keys=False, separators=(",", ":"), allow_nan=False)


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    text = json.dumps(dict(metadata), sort_keys=True) + state_sha256(dict(tensors))
    return hashlib.sha256(text.encode()).hexdigest()


def _differences(saved: Any, wanted: Any, name: str = "") -> list[str]:
    """Which fields differ, each with both values."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = dict.fromkeys([*saved, *wanted])
        inner = [_differences(saved.get(k), wanted.get(k), f"{name}.{k}" if name else k) for k in keys]
        return [line for lines in inner for line in lines]
    return [] if saved == wanted else [f"it has {name} = {saved!r} and here it is {wanted!r}"]
