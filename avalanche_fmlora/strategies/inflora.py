"""InfLoRA (arXiv 2404.00228): each experience trains in directions of its inputs that the past does not use.

A map gets one update ``B_s A_s`` an experience s. Before experience t the rows of A_t are set to the leading directions
of the map's inputs, as far as they lie outside the span of past inputs, and are frozen; B_t alone trains. What the past
uses is held by DualGPM (:mod:`modules.dual_gpm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from avalanche.core import BasePlugin, SupervisedPlugin
from pydantic import Field
from torch import Tensor, nn

from avalanche_fmlora.modules.adapted_linear import AdaptedLinear, AdaptedMaps
from avalanche_fmlora.modules.dual_gpm import InputMoments, design_down, update_memory
from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.modules.vit import Target, TimmViT, replace_linears
from avalanche_fmlora.plugins._passes import training_features
from avalanche_fmlora.strategies.base import ContinualStrategy
from avalanche_fmlora.strategies.config import MethodConfig, Structural
from avalanche_fmlora.strategies.registry import register


class InfLoRALinear(AdaptedLinear):
    """A frozen linear map with one low-rank update an experience; all slices share the A of an experience.

    Attributes:
        downs: A_s of closed experiences, shape [S, R, D_in].
        ups: B_s, shape [S, P, D_part, R].
        down: A_t, shape [R, D_in], frozen, only while an experience trains.
        up: B_t, shape [P, D_part, R], the only parameter, only while an experience trains.
        basis: DualGPM's orthonormal basis, shape [D_in, K].
        retain: whether it spans the directions that are free (else those that are taken).
    """

    growing = ("downs", "ups", "basis")
    opened = ("down", "up")
    downs: Tensor
    ups: Tensor
    down: Tensor | None
    up: nn.Parameter | None
    basis: Tensor
    retain: Tensor

    def __init__(self, base: nn.Linear, slices: Sequence[tuple[int, int]], rank: int) -> None:
        super().__init__(base, slices, rank)
        like = base.weight
        self.register_buffer("downs", like.new_zeros(0, rank, base.in_features))
        self.register_buffer("ups", like.new_zeros(0, len(slices), self.part_features, rank))
        self.register_buffer("basis", like.new_zeros(base.in_features, 0))
        self.register_buffer("retain", torch.zeros((), dtype=torch.bool, device=like.device))
        self.register_buffer("down", None)
        self.register_parameter("up", None)

    def up_projection(self) -> Tensor:
        """All B_s side by side, shape [D_out, S·R]."""
        past = self.ups.permute(1, 2, 0, 3).flatten(2)
        return self.place(past if self.up is None else torch.cat([past, self.up], -1), shared=True)

    def down_projection(self) -> Tensor:
        """All A_s, shape [S·R, D_in]."""
        past = self.downs.flatten(0, 1)
        return past if self.down is None else torch.cat([past, self.down])

    def forward(self, x: Tensor) -> Tensor:
        """[..., D_in] -> [..., D_out]; the updates of the past, which need no gradient, are added to W₀ first.

        So the cost of a step does not grow with the number of experiences as it would through their factors.
        """
        if self.merged_weight is not None or not len(self.ups):
            return super().forward(x)
        with torch.no_grad():
            past = self.place(self.ups.permute(1, 2, 0, 3).flatten(2), shared=True) @ self.downs.flatten(0, 1)
            weight = self.base.weight + past
        out = F.linear(x, weight, self.base.bias)
        if self.up is None or self.down is None:
            return out
        return out + F.linear(F.linear(x, self.down), self.place(self.up, shared=True))

    @torch.no_grad()
    def begin(self) -> None:
        """A new update: B_t = 0, and A_t = 0 until :meth:`set_directions` says where it may go."""
        self.down = self.downs.new_zeros(self.downs.shape[1:])
        self.up = nn.Parameter(self.ups.new_zeros(self.ups.shape[1:]))

    @torch.no_grad()
    def set_directions(self, moment: Tensor) -> None:
        """A_t from the second moment [D_in, D_in] of the experience's inputs; see :func:`design_down`."""
        assert self.down is not None, "an experience is open"
        basis = self.basis.cpu().to(moment.dtype)
        self.down.copy_(design_down(moment, basis, bool(self.retain), self.rank))

    @torch.no_grad()
    def remember(self, moment: Tensor, threshold: float) -> None:
        """Take the experience's inputs into the memory; see :func:`update_memory`."""
        basis, retain = update_memory(self.basis.cpu().to(moment.dtype), bool(self.retain), moment, threshold)
        self.basis = basis.to(self.basis)
        self.retain.fill_(retain)

    @torch.no_grad()
    def close(self) -> None:
        """A_t and B_t join the past; no output changes."""
        assert self.down is not None, "an experience is open"
        assert self.up is not None
        self.downs = torch.cat([self.downs, self.down[None]])
        self.ups = torch.cat([self.ups, self.up.detach()[None]])
        self.down = self.up = None


class InfLoRA(AdaptedMaps[InfLoRALinear]):
    """All maps of a model under InfLoRA."""

    def begin(self) -> None:
        """Open an experience: B_t becomes trainable."""
        if self.active:
            return
        self.active = True
        for layer in self.layers:
            layer.begin()

    def absorb(self, step: float = 1.0) -> None:
        """Close the experience; `step` has no meaning here."""
        if not self.active:
            return
        self.active = False
        self.experiences += 1
        for layer in self.layers:
            layer.close()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """B_t of every map is `lora`."""
        return {"lora": [x.up for x in self.layers if x.up is not None]}

    def stored_parameters(self) -> int:
        """All A_s and B_s: they grow with every experience by R·(D_in + P·D_part) a map."""
        return sum(x.downs.numel() + x.ups.numel() for x in self.layers)

    def stored_statistics(self) -> int:
        """DualGPM's bases, at most D²/2 numbers a map: kept for later experiences, not read by the forward pass."""
        return sum(x.basis.numel() for x in self.layers)


class InfLoRAPlugin(SupervisedPlugin):
    """Two passes over an experience's images: one before it that fixes A_t, one after it for the memory.

    Args:
        threshold: share of the squared singular values that the memory covers in the first experience.
        n_tasks: experiences over which that share rises linearly towards 1; later ones keep the last one's.
    """

    def __init__(self, *, threshold: float, n_tasks: int) -> None:
        super().__init__()
        self.threshold = threshold
        self.n_tasks = n_tasks

    def share(self, experience: int) -> float:
        """The threshold of an experience, counted from 0."""
        return self.threshold + (1 - self.threshold) * min(experience, self.n_tasks - 1) / self.n_tasks

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """B_t is still zero, so the inputs are those of the model before the experience."""
        for layer, moment in zip(strategy.model.lora.layers, _moments(strategy), strict=True):
            layer.set_directions(moment)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Runs while B_t still counts as the current update; the memory takes the inputs of the trained model."""
        lora = strategy.model.lora
        threshold = self.share(int(lora.experiences))
        for layer, moment in zip(lora.layers, _moments(strategy), strict=True):
            layer.remember(moment, threshold)


@torch.no_grad()
def _moments(strategy: Any) -> list[Tensor]:
    with InputMoments(strategy.model.lora.layers) as moments:
        training_features(strategy)
    return moments.values()


class InfLoRAConfig(MethodConfig):
    """Options of InfLoRA."""

    rank: Structural[int] = Field(10, ge=1)
    """Rank of each experience's update."""
    targets: Structural[tuple[Target, ...]] = ("k", "v")
    """Adapted maps: q, k, v, proj, fc1, fc2."""
    blocks: Structural[tuple[int, ...] | None] = None
    """Adapted blocks, from 0; null means all."""
    threshold: float = Field(0.95, gt=0, le=1)
    """Share of the inputs that the memory covers after the first experience (0.98 on ImageNet-R)."""
    n_tasks: int = Field(10, ge=1)
    """Experiences over which `threshold` rises towards 1; in any further ones it stays."""
    lr_lora: float = Field(5e-4, ge=0)
    """Learning rate of B."""


@register
class InfLoRAStrategy(ContinualStrategy):
    """InfLoRA (Liang and Li, CVPR 2024, arXiv 2404.00228) for a timm ViT.

    One forward pass an image, two further passes over an experience's images for A_t and the memory. Options are the
    fields of :class:`InfLoRAConfig`, arguments of the frame in :class:`ContinualStrategy`.
    `stored_parameters` counts the factors, which grow with the experiences; DualGPM's bases are counted apart, in
    `stored_statistics`: training needs them, prediction does not.

    >>> import timm
    >>> strategy = InfLoRAStrategy(model=timm.create_model("test_vit", num_classes=0), rank=4, evaluator=None)
    >>> strategy.model.begin([0, 1])
    >>> strategy.model.trainable_parameters()
    3072
    """

    method: ClassVar[str] = "inflora"
    summary: ClassVar[str] = "a LoRA an experience, in directions that the past does not use"
    paper: ClassVar[str] = "arXiv 2404.00228"
    config_class = InfLoRAConfig
    config: InfLoRAConfig

    def build_network(self, vit: TimmViT) -> ContinualNetwork:
        """InfLoRA maps in the chosen places."""
        config, head = self.config, self.build_head(vit)
        layers = replace_linears(
            vit, config.targets, config.blocks, lambda base, slices: InfLoRALinear(base, slices, config.rank)
        )
        return ContinualNetwork(vit, head, InfLoRA(layers))

    def rates(self) -> dict[str, float]:
        """Rates of B and the head."""
        return {"lora": self.config.lr_lora, "head": self.config.lr_head}

    def build_plugins(self) -> list[BasePlugin]:
        """The memory is written before the experience is closed."""
        memory = InfLoRAPlugin(threshold=self.config.threshold, n_tasks=self.config.n_tasks)
        return [memory, *super().build_plugins()]
