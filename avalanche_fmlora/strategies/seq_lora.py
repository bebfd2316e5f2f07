"""One LoRA (arXiv 2106.09685) that trains on from experience to experience: strong if its rate is tuned."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from avalanche_fmlora.modules.factorized_lora import FactorizedLoRA
from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.modules.vit import Target, TimmViT, adapt_linears
from avalanche_fmlora.strategies.base import ContinualStrategy
from avalanche_fmlora.strategies.config import MethodConfig, Structural
from avalanche_fmlora.strategies.registry import register


class SeqLoRAConfig(MethodConfig):
    """Options of sequential LoRA."""

    rank: Structural[int] = Field(10, ge=1)
    """Rank of the LoRA."""
    targets: Structural[tuple[Target, ...]] = ("q", "v")
    """Adapted maps: q, k, v, proj, fc1, fc2."""
    blocks: Structural[tuple[int, ...] | None] = None
    """Adapted blocks, from 0; null means all."""
    scale: Structural[float] = Field(1.0, gt=0)
    """Scale of the update (α/r of the LoRA paper)."""
    lr_lora: float = Field(2e-4, ge=0)
    """Learning rate of A and B."""


@register
class SeqLoRAStrategy(ContinualStrategy):
    """Sequential fine-tuning of one LoRA (Hu et al., arXiv 2106.09685), with nothing against forgetting.

    Options are the fields of :class:`SeqLoRAConfig`, arguments of the frame in :class:`ContinualStrategy`.
    """

    method: ClassVar[str] = "seq_lora"
    summary: ClassVar[str] = "one LoRA, trained on and on"
    paper: ClassVar[str] = "arXiv 2106.09685"
    config_class = SeqLoRAConfig
    config: SeqLoRAConfig

    def build_network(self, vit: TimmViT) -> ContinualNetwork:
        """A LoRA in the chosen maps."""
        config, head = self.config, self.build_head(vit)
        layers = adapt_linears(vit, config.targets, config.blocks, config.rank, config.scale)
        return ContinualNetwork(vit, head, FactorizedLoRA(layers, "sequential", config.seed))

    def rates(self) -> dict[str, float]:
        """Rates of the LoRA and the head."""
        return {"bases": self.config.lr_lora, "head": self.config.lr_head}
