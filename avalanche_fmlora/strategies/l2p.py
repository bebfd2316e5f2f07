"""L2P, Learning to Prompt (arXiv 2112.08654): a pool of input prompts, of which each image's query picks some."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from avalanche_fmlora.modules.head import IncrementalHead
from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.modules.prompt_pool import PromptedNetwork, PromptPool, cosines, uniform
from avalanche_fmlora.modules.vit import TimmViT, feature_dim, last_tokens, with_complement
from avalanche_fmlora.strategies.config import Schedule, Structural
from avalanche_fmlora.strategies.prompting import PromptConfig, PromptStrategy
from avalanche_fmlora.strategies.registry import register

Position = Literal["cls", "none"]


class L2PConfig(PromptConfig):
    """Options of L2P."""

    pool_size: Structural[int] = Field(10, ge=1)
    """Prompts M in the pool."""
    prompt_length: Structural[int] = Field(5, ge=1)
    """Tokens L of a prompt."""
    top_k: Structural[int] = Field(5, ge=1)
    """Prompts K that an image picks."""
    pull_weight: float = Field(0.1, ge=0)
    """Weight λ of the cosines between queries and the keys picked, which the loss subtracts."""
    prompt_position: Structural[Position] = "cls"
    """Position added to prompt tokens: the class token's, as in the PyTorch port, or none, as in the JAX original."""
    batchwise: Structural[bool] = False
    """All images of a batch take the K prompts most of them pick, as published; leaks task identity at test time."""
    lr_prompt: float = Field(0.00375, ge=0)
    """Learning rate of prompts and keys: 0.03·batch/256 at the batch size of 32. It is not scaled for another."""
    lr_head: float = Field(0.00375, ge=0)
    """Learning rate of the classifier's rows, published as that of the prompts."""
    lr_schedule: Schedule = "constant"
    """Course of all rates within an experience: half-cosine to zero, constant, or CODA-Prompt's by epoch.
    Without effect on an optimizer or scheduler that is passed in."""
    clip_grad_norm: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient of all that trains; none if null."""


class L2PPool(PromptPool):
    """M prompts with a key each; a query gets the K prompts of the nearest keys.

    Args:
        size: M.
        length: L.
        top_k: K ≤ M.
        dim: D.
        pull_weight: λ.
        batchwise: one choice for the whole batch, by majority.

    Attributes:
        prompts: shape [M, L, D].
        keys: shape [M, D]; they learn from the pull term only.
        last_index: prompts picked for the latest queries, nearest first, shape [B, K].
        last_cosines: of queries and picked keys, shape [B, K].

    Raises:
        ValueError: if K > M.
    """

    def __init__(
        self, size: int, length: int, top_k: int, dim: int, pull_weight: float = 0.1, batchwise: bool = False
    ) -> None:
        super().__init__()
        if top_k > size:
            raise ValueError(
                f"Expected `top_k` to be at most `pool_size` but got {top_k} > {size}: raise it or lower `top_k`."
            )
        self.top_k = top_k
        self.pull_weight = pull_weight
        self.batchwise = batchwise
        self.prompts = nn.Parameter(uniform((size, length, dim)))
        self.keys = nn.Parameter(uniform((size, dim)))
        self.last_index: Tensor | None = None
        self.last_cosines: Tensor | None = None

    def select(self, similarity: Tensor) -> Tensor:
        """Cosines [B, M] -> indices [B, K] of the prompts, each sample's own or the batch's by majority."""
        index = similarity.topk(self.top_k, dim=1).indices
        if not self.batchwise:
            return index
        votes = torch.bincount(index.flatten(), minlength=similarity.shape[1])
        return votes.argsort(descending=True, stable=True)[: self.top_k].expand(len(index), -1)

    def forward(self, query: Tensor) -> Tensor:
        """Queries [B, D] -> prompt tokens [B, K·L, D]."""
        similarity = cosines(query, self.keys)
        self.last_index = self.select(similarity.detach())
        self.last_cosines = similarity.gather(1, self.last_index)
        return self.prompts[self.last_index].flatten(1, 2)

    def extra_loss(self) -> Tensor | None:
        """−λ · (1/B) · Σ_b Σ_j cos(q_b, k_j) over the picked keys."""
        if self.last_cosines is None:
            return None
        return -self.pull_weight * self.last_cosines.sum(1).mean()

    def trained(self) -> list[nn.Parameter]:
        """Prompts and keys, in every experience."""
        return [self.prompts, self.keys]

    def stored_parameters(self) -> int:
        """M·L·D + M·D."""
        return self.prompts.numel() + self.keys.numel()


class L2PNetwork(PromptedNetwork):
    """Prompts as tokens behind class and register tokens; the feature is the mean of their outputs.

    Args:
        vit: the model.
        head: the classifier.
        pool: the prompts.
        position: what is added to prompt tokens at the input.
        cache_queries: see :class:`PromptedNetwork`.
    """

    def __init__(
        self,
        vit: TimmViT,
        head: IncrementalHead,
        pool: L2PPool,
        position: Position,
        cache_queries: bool = True,
    ) -> None:
        super().__init__(vit, head, pool, cache_queries)
        self.position = position

    def prompted_features(self, images: Tensor, prompts: Tensor) -> Tensor:
        """Mean of the prompts' outputs after the final norm, [B, D]; models that normalise after pooling do so here.

        With `token_and_mean` it stands in the class token's place, beside the mean of the patch tokens: [B, 2D]; with
        `multi_layer` so it does in each of the last blocks.
        """
        vit: Any = self.vit
        has_position = vit.cls_token is not None and vit.pos_embed is not None and not vit.no_embed_class
        if self.position == "cls" and has_position:
            prompts = prompts + vit.pos_embed[:, :1]
        parts = []
        for tokens, outputs in last_tokens(vit, images, prompts, pooling=self.pooling):
            assert outputs is not None
            features = vit.fc_norm(outputs.mean(1))
            parts.append(features if self.pooling == "model" else with_complement(vit, features, tokens))
        return torch.cat(parts, -1)


@register
class L2PStrategy(PromptStrategy):
    """L2P (Wang et al., CVPR 2022, arXiv 2112.08654) for a timm ViT.

    Options are the fields of :class:`L2PConfig`, arguments of the frame in :class:`ContinualStrategy`.

    >>> import timm
    >>> vit = timm.create_model("test_vit", num_classes=0)
    >>> L2PStrategy(model=vit, evaluator=None).model.stored_parameters()  # 10 prompts of 5 tokens and 10 keys, D = 64
    3840
    """

    method: ClassVar[str] = "l2p"
    summary: ClassVar[str] = "pool of input prompts, picked by the image"
    paper: ClassVar[str] = "arXiv 2112.08654"
    config_class = L2PConfig
    config: L2PConfig

    def build_network(self, vit: TimmViT) -> ContinualNetwork:
        """The pool in front of the ViT.

        Raises:
            ValueError: for a model whose pooling makes features wider than its tokens.
        """
        if (width := feature_dim(vit)) != vit.embed_dim:
            raise ValueError(
                "Expected a model with features as wide as its tokens, since L2P's are means of its prompts' outputs, "
                f"but got {width} for {vit.embed_dim}: make it with another `global_pool` (a merged model: from a "
                "strategy with pooling='model')."
            )
        c = self.config
        pool = L2PPool(c.pool_size, c.prompt_length, c.top_k, vit.embed_dim, c.pull_weight, c.batchwise)
        return L2PNetwork(vit, self.build_head(vit), pool, c.prompt_position, c.cache_queries)
