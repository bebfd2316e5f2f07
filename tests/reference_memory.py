"""DualGPM (arXiv 2404.00228) in numpy, literally: what the memory's tests and InfLoRA's compare with."""

from __future__ import annotations

from typing import Any

import numpy as np

from avalanche_fmlora.modules.dual_gpm import ROUNDING


def reference_memory(memory: np.ndarray | None, kind: str, moment: np.ndarray, threshold: float) -> tuple[Any, str]:
    """DualGPM with one direction looked at after the other."""
    size = len(moment)
    total = sum(s * s for s in np.linalg.svd(moment)[1])
    if memory is None:
        u, values, _ = np.linalg.svd(moment)
        count, share = 0, 0.0
        for s in values:
            share += s * s / total
            if share >= threshold - ROUNDING:
                break
            count += 1
        memory, kind = u[:, : max(count, 1)], "remove"
    elif kind == "remove":
        u, values, _ = np.linalg.svd(moment - memory @ memory.T @ moment)
        covered = 1 - sum(s * s for s in values) / total
        count = 0
        while count < size and covered < threshold - ROUNDING:
            covered += values[count] ** 2 / total
            count += 1
        memory = np.hstack([memory, u[:, :count]])
    else:
        u, values, _ = np.linalg.svd(memory @ memory.T @ moment)
        left = sum(s * s for s in values) / total
        count = 0
        while count < memory.shape[1] and left >= 1 - threshold - ROUNDING:
            left -= values[count] ** 2 / total
            count += 1
        if count:
            taken = u[:, :count]
            keep = memory.shape[1] - count
            memory = np.linalg.svd(memory - taken @ taken.T @ memory)[0][:, :keep]
    if kind == "remove" and memory.shape[1] > size / 2:
        memory, kind = np.linalg.svd(memory)[0][:, memory.shape[1] :], "retain"
    return memory, kind
