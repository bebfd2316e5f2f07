"""SD-LoRA (arXiv 2501.13198): directions of past updates stay, their magnitudes are learned again in each experience.

While experience t trains, a map computes ``W₀x + Σ_{s<t} a_s B_s A_s x / (‖B_s‖ ‖A_s‖) + a_t B_t A_t x`` with Frobenius
norms. B_t, A_t and all a_s train; a_s is one number an experience, shared by all maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from avalanche_fmlora.modules.adapted_linear import AdaptedLinear, AdaptedMaps
from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.modules.vit import Target, TimmViT, replace_linears
from avalanche_fmlora.strategies.base import ContinualStrategy
from avalanche_fmlora.strategies.config import MethodConfig, Structural
from avalanche_fmlora.strategies.registry import register


def direction_scales(ups: Tensor, downs: Tensor) -> Tensor:
    """1 / (‖B‖ ‖A‖) with Frobenius norms; 0 for an update that is zero and so has no direction.

    Args:
        ups: B, shape [..., D_part, R].
        downs: A, shape [..., R, D_in].

    Returns:
        Shape [...].
    """
    norms = torch.linalg.matrix_norm(ups) * torch.linalg.matrix_norm(downs)
    return torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)


class Magnitudes(nn.Module):
    """a_1 … a_T: one number an experience for all maps of a model.

    Attributes:
        values: shape [T].
    """

    values: nn.Parameter

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(like.new_zeros(0), requires_grad=False)
        self._before = self.values.detach()

    def begin(self, start: float) -> None:
        """One number more, and all of them at `start` again."""
        self._before = self.values.detach()
        self.values = nn.Parameter(self._before.new_full((len(self._before) + 1,), start))

    def discard(self) -> None:
        """Those of before :meth:`begin`, none of which trains."""
        self.values = nn.Parameter(self._before, requires_grad=False)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        saved = state_dict.get(prefix + "values")
        if saved is not None and saved.shape != self.values.shape:
            self.values = nn.Parameter(self.values.detach().new_empty(saved.shape), self.values.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class SDLoRALinear(AdaptedLinear):
    """A frozen linear map with one low-rank update an experience and shared magnitudes.

    The latest update counts as it was trained, with its own norms, until the next experience begins: from then on its
    direction alone is kept.

    Args:
        base, slices, rank: as in :class:`AdaptedLinear`.
        magnitudes: shared by all maps; its owner registers it.

    Attributes:
        downs: A_s of closed experiences, shape [S, P, R, D_in].
        ups: B_s, shape [S, P, D_part, R].
        down, up: A_t [P, R, D_in] and B_t [P, D_part, R], only while an experience trains.
        scales: 1 / (‖B_s‖ ‖A_s‖), and 1 for the latest while none trains: shape [S, P], not saved.
    """

    growing = ("downs", "ups")
    opened = ("down", "up")
    downs: Tensor
    ups: Tensor
    scales: Tensor
    down: nn.Parameter | None
    up: nn.Parameter | None

    def __init__(self, base: nn.Linear, slices: Sequence[tuple[int, int]], rank: int, magnitudes: Magnitudes) -> None:
        super().__init__(base, slices, rank)
        parts, like = len(slices), base.weight
        self.register_buffer("downs", like.new_zeros(0, parts, rank, base.in_features))
        self.register_buffer("ups", like.new_zeros(0, parts, self.part_features, rank))
        self.register_buffer("scales", like.new_zeros(0, parts), persistent=False)
        self.register_parameter("down", None)
        self.register_parameter("up", None)
        self._magnitudes = (magnitudes,)  # in a tuple, so that it is no submodule of every map

    @property
    def magnitudes(self) -> Tensor:
        """a, shape [T]."""
        return self._magnitudes[0].values

    def up_projection(self) -> Tensor:
        """All B_s with their factors, side by side: shape [D_out, P·T·R]."""
        magnitudes, closed = self.magnitudes, len(self.ups)
        factors = magnitudes[:closed, None] * self.scales
        ups = (factors[..., None, None] * self.ups).permute(1, 2, 0, 3).flatten(2)
        if self.up is not None:
            ups = torch.cat([ups, magnitudes[closed] * self.up], -1)
        return self.place(ups)

    def down_projection(self) -> Tensor:
        """All A_s, slice by slice: shape [P·T·R, D_in]."""
        downs = self.downs.transpose(0, 1).flatten(1, 2)
        return (downs if self.down is None else torch.cat([downs, self.down], 1)).flatten(0, 1)

    @torch.no_grad()
    def begin(self, generator: torch.Generator | None = None) -> None:
        """A new update as a LoRA starts, A random and B = 0; the updates of the past become directions."""
        _, parts, rank, width = self.downs.shape
        down = torch.empty(parts, rank, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
        self.down = nn.Parameter(down.to(self.downs))
        self.up = nn.Parameter(self.ups.new_zeros(self.ups.shape[1:]))
        self.rescale()

    @torch.no_grad()
    def close(self) -> None:
        """A_t and B_t join the past; no output changes."""
        assert self.down is not None, "an experience is open"
        assert self.up is not None
        self.downs = torch.cat([self.downs, self.down.detach()[None]])
        self.ups = torch.cat([self.ups, self.up.detach()[None]])
        self.down = self.up = None
        self.rescale()

    def rescale(self) -> None:
        """What each update of the past counts, now that one is open or none is."""
        self.scales = direction_scales(self.ups, self.downs)
        if self.up is None:
            self.scales[-1:] = 1

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(*args, **kwargs)
        self.rescale()


class SDLoRA(AdaptedMaps[SDLoRALinear]):
    """All maps of a model under SD-LoRA.

    Args:
        layers: by name.
        magnitudes: the one that the maps share.
        start: every a_s at the begin of an experience.
        seed: of every A_t.
    """

    begin_keeps_features: ClassVar[bool] = False  # magnitudes start again, the latest update is normalised

    def __init__(
        self, layers: Mapping[str, SDLoRALinear], magnitudes: Magnitudes, start: float = 0.8, seed: int = 0
    ) -> None:
        super().__init__(layers)
        self.magnitudes = magnitudes
        self.start = start
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn_from = self._generator.get_state()

    def begin(self) -> None:
        """Open an experience: a new update, and all magnitudes back at their start."""
        if self.active:
            return
        self.active = True
        self.magnitudes.begin(self.start)
        self._drawn_from = self._generator.get_state()
        for layer in self.layers:
            layer.begin(self._generator)

    def absorb(self, step: float = 1.0) -> None:
        """Close the experience; `step` has no meaning here."""
        if not self.active:
            return
        self.active = False
        self.experiences += 1
        self.magnitudes.values.requires_grad_(False)
        for layer in self.layers:
            layer.close()

    def discard(self) -> None:
        """See :meth:`AdaptedMaps.discard`; the latest update counts with its own norms again."""
        if self.active:
            self.magnitudes.discard()
            self._generator.set_state(self._drawn_from)
        super().discard()
        for layer in self.layers:
            layer.rescale()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """A_t, B_t of every map and all magnitudes are `lora`."""
        factors = [p for x in self.layers for p in (x.up, x.down) if p is not None]
        return {"lora": [*factors, self.magnitudes.values]}

    def stored_parameters(self) -> int:
        """All A_s, B_s and a_s: they grow with every experience by P·R·(D_in + D_part) a map, and one number."""
        return sum(x.downs.numel() + x.ups.numel() for x in self.layers) + self.magnitudes.values.numel()


class SDLoRAConfig(MethodConfig):
    """Options of SD-LoRA."""

    rank: Structural[int] = Field(10, ge=1)
    """Rank of each experience's update."""
    targets: Structural[tuple[Target, ...]] = ("q", "v")
    """Adapted maps: q, k, v, proj, fc1, fc2."""
    blocks: Structural[tuple[int, ...] | None] = None
    """Adapted blocks, from 0; null means all."""
    magnitude: float = 0.8
    """Value of every magnitude a_s when an experience begins."""
    lr_lora: float = Field(5e-4, ge=0)
    """Learning rate of A, B and the magnitudes."""


@register
class SDLoRAStrategy(ContinualStrategy):
    """SD-LoRA (Wu et al., ICLR 2025, arXiv 2501.13198) for a timm ViT.

    One forward pass an image; the stored factors grow with every experience. Options are the fields of
    :class:`SDLoRAConfig`, arguments of the frame in :class:`ContinualStrategy`.
    When an experience begins, the features change before any training: magnitudes start again and the latest update is
    normalised, as published.

    >>> import timm
    >>> strategy = SDLoRAStrategy(model=timm.create_model("test_vit", num_classes=0), rank=4, evaluator=None)
    >>> strategy.model.begin([0, 1])
    >>> strategy.model.trainable_parameters()
    6145
    """

    method: ClassVar[str] = "sd_lora"
    summary: ClassVar[str] = "directions of past LoRAs, their magnitudes learned again"
    paper: ClassVar[str] = "arXiv 2501.13198"
    config_class = SDLoRAConfig
    config: SDLoRAConfig

    def build_network(self, vit: TimmViT) -> ContinualNetwork:
        """SD-LoRA maps in the chosen places."""
        config, head = self.config, self.build_head(vit)
        magnitudes = Magnitudes(next(vit.parameters()))
        layers = replace_linears(
            vit, config.targets, config.blocks, lambda base, slices: SDLoRALinear(base, slices, config.rank, magnitudes)
        )
        return ContinualNetwork(vit, head, SDLoRA(layers, magnitudes, config.magnitude, config.seed))

    def rates(self) -> dict[str, float]:
        """Rates of LoRAs and magnitudes, and of the head."""
        return {"lora": self.config.lr_lora, "head": self.config.lr_head}
