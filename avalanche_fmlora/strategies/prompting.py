"""What the strategies of prompt methods share: rates, the query cache's epochs, and no merging."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from avalanche_fmlora.modules.prompt_pool import PromptedNetwork
from avalanche_fmlora.modules.vit import TimmViT
from avalanche_fmlora.strategies.base import ContinualStrategy
from avalanche_fmlora.strategies.config import MethodConfig


class PromptConfig(MethodConfig):
    """Options of every method that chooses prompts by a query."""

    lr_prompt: float = Field(1e-3, ge=0)
    """Learning rate of prompts and keys."""
    cache_queries: bool = True
    """Keep the queries of training images whose input is the same in each epoch; no effect on results."""


class PromptStrategy(ContinualStrategy):
    """Base of L2P, DualPrompt and CODA-Prompt; their networks are a :class:`PromptedNetwork`."""

    config_class: ClassVar[type[MethodConfig]] = PromptConfig
    config: PromptConfig
    model: PromptedNetwork

    def rates(self) -> dict[str, float]:
        """Rates of the prompts (with their keys) and the head."""
        return {"prompt": self.config.lr_prompt, "head": self.config.lr_head}

    def merged_model(self) -> TimmViT:
        """There is none.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"Expected a method whose update can be put into the weights but the prompts of {self.method} depend on "
            "the image: use `strategy.model(images)`, and `strategy.save(path)` to keep it."
        )

    def _after_training_epoch(self, **kwargs: Any) -> None:
        self.model.queries.end_epoch()
        super()._after_training_epoch(**kwargs)
