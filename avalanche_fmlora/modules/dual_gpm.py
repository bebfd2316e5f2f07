"""DualGPM (Liang and Li, CVPR 2023): which directions of a map's inputs the past uses, and which are free.

The memory of a map is an orthonormal basis of the span of its past inputs or, where that is smaller, of the complement.
InfLoRA (arXiv 2404.00228) takes the directions of a new update from what the memory leaves free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from avalanche_fmlora.modules.adapted_linear import AdaptedLinear

ROUNDING = 1e-12
"""Shares of energy that differ by less are the same: where a threshold is met exactly, rounding must not decide."""


def project_moment(moment: Tensor, basis: Tensor, retain: bool) -> Tensor:
    """The part of the inputs' second moment that a new experience may use.

    Args:
        moment: E[x xᵀ], shape [D, D].
        basis: M, orthonormal columns, shape [D, K].
        retain: M spans what is free (M Mᵀ is applied), else what is taken (I − M Mᵀ).

    Returns:
        Shape [D, D], projected from the left only, hence not symmetric.
    """
    inside = basis @ (basis.T @ moment)
    return inside if retain else moment - inside


def design_down(moment: Tensor, basis: Tensor, retain: bool, rank: int) -> Tensor:
    """A_t: the leading left singular vectors of the projected moment, divided by √3.

    Rows for which no free direction is left are zero, not the arbitrary vectors that an SVD gives for a null space:
    those would lie in the span of the past.

    Args:
        moment: E[x xᵀ] of the new experience, shape [D, D].
        basis: as in :func:`project_moment`.
        retain: as in :func:`project_moment`.
        rank: R.

    Returns:
        Shape [R, D].
    """
    left, values, _ = torch.linalg.svd(project_moment(moment, basis, retain))
    floor = torch.finfo(moment.dtype).eps * len(moment) * torch.linalg.matrix_norm(moment)
    return torch.where(values[:rank, None] > floor, left[:, :rank].T, 0.0) / math.sqrt(3)


def update_memory(basis: Tensor, retain: bool, moment: Tensor, threshold: float) -> tuple[Tensor, bool]:
    """The memory after an experience: it covers the share `threshold` of the moment's squared singular values.

    A basis of the span grows; one of the complement shrinks. A span of more than D/2 directions is replaced by its
    complement. Before the first experience the basis is empty; then, as published, it takes the directions whose
    cumulated share stays below the threshold, at least one.

    Args:
        basis: M, shape [D, K].
        retain: whether M spans the complement.
        moment: E[x xᵀ] of the experience under the model that it left, shape [D, D].
        threshold: in (0, 1].

    Returns:
        The new basis and whether it spans the complement.
    """
    total = moment.square().sum()
    left, values, _ = torch.linalg.svd(project_moment(moment, basis, retain))
    shares = values.square() / total
    before = shares.cumsum(0) - shares
    if retain:
        taken = int((shares.sum() - before >= 1 - threshold - ROUNDING).sum())
        taken = min(taken, basis.shape[1])
        if taken:
            rest = basis - left[:, :taken] @ (left[:, :taken].T @ basis)
            basis = torch.linalg.svd(rest, full_matrices=False)[0][:, : basis.shape[1] - taken]
        return basis, True
    if basis.shape[1] == 0:
        taken = max(1, int((shares.cumsum(0) < threshold - ROUNDING).sum()))
    else:
        taken = int((1 - shares.sum() + before < threshold - ROUNDING).sum())
    basis = torch.cat([basis, left[:, :taken]], 1)[:, : len(basis)]
    if basis.shape[1] <= len(basis) / 2:
        return basis, False
    return torch.linalg.svd(basis)[0][:, basis.shape[1] :], True


class InputMoments:
    """Inside, every forward pass adds to the second moments of the inputs of some maps.

    Args:
        layers: the maps.
    """

    def __init__(self, layers: Sequence[AdaptedLinear]) -> None:
        self.layers = list(layers)
        self._sums: list[Tensor] = []
        self._counts: list[int] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> InputMoments:
        self._sums = [torch.zeros(x.in_features, x.in_features, dtype=torch.float64) for x in self.layers]
        self._counts = [0] * len(self.layers)
        for i, layer in enumerate(self.layers):
            self._hooks.append(layer.register_forward_pre_hook(lambda _, args, i=i: self._add(i, args[0])))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _add(self, i: int, inputs: Tensor) -> None:
        with torch.autocast(inputs.device.type, enabled=False):
            weight = self.layers[i].base.weight.dtype
            x = inputs.reshape(-1, inputs.shape[-1]).to(torch.promote_types(weight, torch.float32))
            self._sums[i] += (x.T @ x).cpu().double()
            self._counts[i] += len(x)

    def values(self) -> list[Tensor]:
        """E[x xᵀ] of every map over all tokens of all images, shape [D_in, D_in], float64 on the CPU.

        Raises:
            ValueError: if no image has passed.
        """
        if not all(self._counts):
            raise ValueError("Expected at least one image to measure the inputs' second moment but none has passed.")
        return [total / n for total, n in zip(self._sums, self._counts, strict=True)]
