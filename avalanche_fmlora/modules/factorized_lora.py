"""F-LoRA: updates of frozen linear maps inside one shared low-rank subspace, ``h = W₀x + s · A C B x``.

The bases A, B are shared by all experiences, so the sum of all updates is one RxR core C a map, whatever their number.
While an experience trains, ``C + M diag(m) Nᵀ`` takes the place of C; `absorb` then writes it into C and drops M, N.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from avalanche_fmlora.modules import functional
from avalanche_fmlora.modules.adapted_linear import AdaptedLinear, AdaptedMaps

Bases = Literal["first_experience", "pretrained_svd", "random_orthonormal", "slow", "sequential"]
"""Where A and B come from; ``sequential`` is no shared subspace but a plain LoRA that trains on in every experience."""


class FactorizedLinear(AdaptedLinear):
    """A frozen `nn.Linear` and a low-rank update of some of its output slices.

    Args:
        base: the map; its weight [D_out, D_in] is frozen and never written to.
        slices: the (start, stop) of the output rows that are adapted, P of them, of equal size.
        rank: R.
        scale: s.

    Attributes:
        up: A of each slice, shape [P, D_part, R].
        down: B, shape [P, R, D_in].
        core: C, shape [P, R, R].
        left, right: M and N, shape [P, R, R], only while an experience trains.
        mask: m, shape [R], set from outside; None is all ones.
    """

    opened = ("left", "right", "mask")
    core: Tensor
    left: nn.Parameter | None
    right: nn.Parameter | None

    def __init__(self, base: nn.Linear, slices: Sequence[tuple[int, int]], rank: int, scale: float = 1.0) -> None:
        super().__init__(base, slices, rank)
        self.scale = scale
        like: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        parts = len(slices)
        self.up = nn.Parameter(torch.zeros(parts, self.part_features, rank, **like), requires_grad=False)
        self.down = nn.Parameter(torch.zeros(parts, rank, base.in_features, **like), requires_grad=False)
        self.register_buffer("core", torch.zeros(parts, rank, rank, **like))
        self.register_parameter("left", None)
        self.register_parameter("right", None)
        self.mask: Tensor | None = None
        self.use_update = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy made while ranks are searched has the mask's values; its graph can't be copied."""
        return {**self.__dict__, "mask": None if self.mask is None else self.mask.detach()}

    def effective_core(self) -> Tensor:
        """C, or C + M diag(m) Nᵀ while an experience trains: shape [P, R, R]."""
        if not self.use_update:
            return self.core
        return functional.update_core(self.core, self.left, self.right, self.mask)

    def up_projection(self) -> Tensor:
        """s · A C of all slices as one map from the P·R down-projections to the outputs: shape [D_out, P·R]."""
        return self.place(self.scale * self.up @ self.effective_core())

    def down_projection(self) -> Tensor:
        """B of all slices: shape [P·R, D_in]."""
        return self.down.reshape(-1, self.base.in_features)

    @torch.no_grad()
    def set_bases(self, kind: Bases, generator: torch.Generator | None = None) -> None:
        """Give A and B their first values; the update stays zero.

        ``pretrained_svd`` and ``random_orthonormal`` are frozen orthonormal bases with C = 0: the leading singular
        vectors of W₀, or random ones. The other kinds start as a plain LoRA does: A = 0, B random, C = I.
        """
        eye = torch.eye(self.rank, device=self.core.device, dtype=self.core.dtype)
        for p, (start, stop) in enumerate(self.slices):
            if kind == "pretrained_svd":
                u, _, vh = torch.linalg.svd(self.base.weight[start:stop].double(), full_matrices=False)
                self.up[p], self.down[p] = u[:, : self.rank], vh[: self.rank]
            elif kind == "random_orthonormal":
                self.up[p] = _orthonormal(stop - start, self.rank, generator)
                self.down[p] = _orthonormal(self.base.in_features, self.rank, generator).T
            else:
                self.up[p] = 0
                bound = self.base.in_features**-0.5
                self.down[p] = torch.empty(self.rank, self.base.in_features).uniform_(
                    -bound, bound, generator=generator
                )
                self.core[p] = eye

    @torch.no_grad()
    def begin_update(self, generator: torch.Generator | None = None) -> None:
        """Start an experience's update: M orthogonal, N = 0, so it begins at zero with a gradient that is not."""
        left = torch.stack([_orthonormal(self.rank, self.rank, generator) for _ in self.slices]).to(self.core)
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(torch.zeros_like(left))

    @torch.no_grad()
    def absorb(self, step: float = 1.0) -> None:
        """C ← C + step · M diag(m) Nᵀ; M and N are dropped. With step 1 no output changes."""
        if self.left is not None:
            new = functional.update_core(self.core, self.left, self.right, self.mask)
            self.core.copy_(functional.slow_step(self.core, new, step))
            self.left = self.right = None
        self.mask = None

    @torch.no_grad()
    def rebase(self) -> None:
        """Make the bases orthonormal and the core diagonal, by the SVD of A C B; no output changes."""
        for p in range(len(self.slices)):
            bases = functional.svd_bases(self.up[p].double(), self.down[p].double(), self.core[p].double())
            self.up[p], self.core[p], self.down[p] = bases

    def extra_repr(self) -> str:
        return f"rank={self.rank}, slices={self.slices}, scale={self.scale}"


class FactorizedLoRA(AdaptedMaps[FactorizedLinear]):
    """All adapted maps of one model, moved together.

    Args:
        layers: by name, in the order of the forward pass.
        bases: where the shared subspace comes from (see :meth:`FactorizedLinear.set_bases`).
        seed: of every random start.

    Attributes:
        first_complexity: complexity of the first experience, where a rank selector has measured it, else −1.
    """

    first_complexity: Tensor

    def __init__(self, layers: dict[str, FactorizedLinear], bases: Bases, seed: int = 0) -> None:
        super().__init__(layers)
        if bases not in get_args(Bases):
            raise ValueError(f"Expected `bases` to be one of {get_args(Bases)} but got {bases!r}.")
        self.bases = bases
        self.register_buffer("first_complexity", torch.tensor(-1.0))
        self._first = True  # whether the open experience is: asked in every step, so no word to the device
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn_from = self._generator.get_state()
        for layer in self.layers:
            layer.set_bases(bases, self._generator)

    @property
    def trains_bases(self) -> bool:
        """Whether the current experience trains A and B themselves."""
        return self.active and (self.bases in ("slow", "sequential") or self._learns_bases_only)

    @property
    def _learns_bases_only(self) -> bool:
        return self.bases == "sequential" or (self._first and self.bases in ("first_experience", "slow"))

    @property
    def trains_core(self) -> bool:
        """Whether the current experience trains M and N."""
        return self.active and self.layers[0].left is not None

    def begin(self) -> None:
        """Open an experience: bases or M, N become trainable. A second call before `absorb` does nothing."""
        if self.active:
            return
        self.active, self._first = True, int(self.experiences) == 0
        self._drawn_from = self._generator.get_state()
        for layer in self.layers:
            if not self._learns_bases_only:
                layer.begin_update(self._generator)
            layer.up.requires_grad_(self.trains_bases)
            layer.down.requires_grad_(self.trains_bases)

    def absorb(self, step: float = 1.0) -> None:
        """Close the experience: C takes the update (its share `step`), bases that were trained become orthonormal."""
        if not self.active:
            return
        lasting = self.bases == "sequential"  # A and B go on training, so plugins that weigh parameters see them
        learned = self.trains_bases and not lasting
        for layer in self.layers:
            layer.absorb(step)
            layer.up.requires_grad_(lasting)
            layer.down.requires_grad_(lasting)
            if learned:
                layer.rebase()
        self.experiences += 1
        self.active = False

    def discard(self) -> None:
        """See :meth:`AdaptedMaps.discard`; bases that were in training stay where they are until others are loaded."""
        if self.active:
            self._generator.set_state(self._drawn_from)
        super().discard()
        for layer in self.layers:
            layer.up.requires_grad_(layer.up.requires_grad and self.bases == "sequential")
            layer.down.requires_grad_(layer.down.requires_grad and self.bases == "sequential")

    def set_mask(self, masks: Tensor) -> None:
        """Masks of one choice [1, R] for all layers, or of one choice a layer [layers, R]."""
        for i, layer in enumerate(self.layers):
            layer.mask = masks[i if len(masks) > 1 else 0]

    def masked_parameters(self) -> int:
        """Numbers of M and N that the masks leave without effect: 2·P·R·(R − rank) a map, 0 without masks."""
        updates = [(x.left, x.mask) for x in self.layers]
        masked = [(m.numel() // len(k), int((k == 0).sum())) for m, k in updates if m is not None and k is not None]
        return sum(2 * column * columns for column, columns in masked)

    def stability(self) -> Tensor:
        """Σ over maps of ‖M diag(m) Nᵀ‖²; with orthonormal bases the squared change of the weights, over `scale²`."""
        changes = [layer.effective_core() - layer.core for layer in self.layers]
        return torch.stack([c.square().sum() for c in changes]).sum()

    @contextmanager
    def before_update(self) -> Iterator[None]:
        """Inside, the maps are those of before the experience (M Nᵀ left out): the free teacher."""
        for layer in self.layers:
            layer.use_update = False
        try:
            yield
        finally:
            for layer in self.layers:
                layer.use_update = True

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """A and B are `bases`; M and N are `core`."""
        cores = [p for x in self.layers for p in (x.left, x.right) if p is not None]
        return {"bases": [p for x in self.layers for p in (x.up, x.down)], "core": cores}

    def stored_parameters(self) -> int:
        """Numbers kept between experiences: 2·D·R + R² a map, always the same; a plain LoRA has no core (C = I)."""
        cores = 0 if self.bases == "sequential" else sum(x.core.numel() for x in self.layers)
        return cores + sum(x.up.numel() + x.down.numel() for x in self.layers)


def _orthonormal(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return q * torch.sign(torch.diagonal(r)) if rows >= columns else q
