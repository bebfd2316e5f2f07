"""DualPrompt (arXiv 2204.04799): prefixes shared by all tasks in early blocks, a task's own in the next."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.modules.prompt_pool import (
    PromptedNetwork,
    PromptPool,
    check_blocks,
    cosines,
    task_generator,
    uniform,
)
from avalanche_fmlora.modules.vit import TimmViT
from avalanche_fmlora.strategies.config import Schedule, Structural
from avalanche_fmlora.strategies.prompting import PromptConfig, PromptStrategy
from avalanche_fmlora.strategies.registry import register


class DualPromptConfig(PromptConfig):
    """Options of DualPrompt."""

    g_length: Structural[int] = Field(5, ge=1)
    """Length L_G of the general prompt, of keys and of values each."""
    e_length: Structural[int] = Field(5, ge=1)
    """Length L_E of a task's expert prompt, of keys and of values each (20 for ImageNet-R and CUB)."""
    g_blocks: Structural[tuple[int, ...]] = (0, 1)
    """Blocks with the general prompt."""
    e_blocks: Structural[tuple[int, ...]] = (2, 3, 4)
    """Blocks with the expert prompts."""
    pull_weight: float = Field(1.0, ge=0)
    """Weight λ of the cosine between queries and the task's key, which the loss subtracts."""
    n_tasks: Structural[int | None] = Field(None, ge=1)
    """Expert prompts made in advance; null makes one as each experience begins. More experiences add more anyway."""
    restrict_to_seen: Structural[bool] = True
    """At test time only keys of tasks seen compete; else also those of the tasks of `n_tasks` still to come."""
    lr_prompt: float = Field(0.00375, ge=0)
    """Learning rate of prompts and keys: 0.03·batch/256 at the batch size of 32. It is not scaled for another."""
    lr_head: float = Field(0.00375, ge=0)
    """Learning rate of the classifier's rows, published as that of the prompts."""
    lr_schedule: Schedule = "constant"
    """Course of all rates within an experience: half-cosine to zero, constant, or CODA-Prompt's by epoch.
    Without effect on an optimizer or scheduler that is passed in."""
    clip_grad_norm: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient of all that trains; none if null."""


class DualPromptPool(PromptPool):
    """General prefixes for some blocks, and for others one expert prefix and one key a task.

    Index 0 of the axis of size 2 is the prefix of the keys, index 1 that of the values. The expert prompt and key in
    training are parameters, all others buffers: no optimizer can move them.

    Args:
        dim: D.
        g_blocks: blocks with the general prompt.
        e_blocks: blocks with expert prompts, none of them in `g_blocks`.
        g_length: L_G.
        e_length: L_E.
        n_tasks: expert prompts made in advance; None makes each as its task begins.
        pull_weight: λ.
        restrict_to_seen: whether only keys of tasks seen compete.
        seed: of the experts' first values.

    Attributes:
        g: shape [blocks, 2, L_G, D].
        experts: shape [T, blocks, 2, L_E, D].
        keys: shape [T, D].
        active_expert, active_key: those in training, shapes [blocks, 2, L_E, D] and [D], or None.
        experiences: tasks begun so far.
        last_index: the task chosen for each of the latest queries, shape [B]; None before there is one.
        last_cosines: of queries and chosen keys, shape [B].
    """

    experts: Tensor
    keys: Tensor
    experiences: Tensor
    active_expert: nn.Parameter | None
    active_key: nn.Parameter | None
    begin_keeps_features: ClassVar[bool] = False  # images of the task in training no longer choose their expert

    def __init__(
        self,
        dim: int,
        g_blocks: tuple[int, ...] = (0, 1),
        e_blocks: tuple[int, ...] = (2, 3, 4),
        g_length: int = 5,
        e_length: int = 5,
        n_tasks: int | None = None,
        pull_weight: float = 1.0,
        restrict_to_seen: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        both = sorted(set(g_blocks) & set(e_blocks))
        if both:
            raise ValueError(f"Expected `g_blocks` and `e_blocks` without common blocks but both have {both}.")
        self.g_blocks, self.e_blocks = tuple(g_blocks), tuple(e_blocks)
        self.pull_weight = pull_weight
        self.restrict_to_seen = restrict_to_seen
        self.seed = seed
        self.g = nn.Parameter(uniform((len(g_blocks), 2, g_length, dim)))
        self.register_buffer("experts", torch.zeros(0, len(e_blocks), 2, e_length, dim, dtype=torch.float32))
        self.register_buffer("keys", torch.zeros(0, dim, dtype=torch.float32))
        self.register_buffer("experiences", torch.tensor(0))
        self.register_parameter("active_expert", None)
        self.register_parameter("active_key", None)
        self.last_index: Tensor | None = None
        self.last_cosines: Tensor | None = None
        self.grow(n_tasks or 0)

    @torch.no_grad()
    def grow(self, n_tasks: int) -> None:
        """Make expert prompts and keys up to a number of tasks, U(−1, 1) each."""
        for task in range(len(self.keys), n_tasks):
            generator = task_generator(self.seed, task)
            expert = uniform(self.experts.shape[1:], generator)
            key = uniform(self.keys.shape[1:], generator)
            self.experts = torch.cat([self.experts, expert[None].to(self.experts)])
            self.keys = torch.cat([self.keys, key[None].to(self.keys)])

    @torch.no_grad()
    def begin(self) -> None:
        """Open the next task: its expert starts as the one before it, its key at random. While one is open, nothing."""
        if self.active_key is not None:
            return
        task = int(self.experiences)
        self.grow(task + 1)
        if task > 0:
            self.experts[task] = self.experts[task - 1]
        self.active_expert = nn.Parameter(self.experts[task].clone())
        self.active_key = nn.Parameter(self.keys[task].clone())
        self.experiences += 1

    @torch.no_grad()
    def end(self) -> None:
        """Close the task: its expert and key join the others."""
        if self.active_expert is None or self.active_key is None:
            return
        task = int(self.experiences) - 1
        self.experts[task] = self.active_expert
        self.keys[task] = self.active_key
        self.register_parameter("active_expert", None)
        self.register_parameter("active_key", None)

    def discard(self) -> None:
        """Let go of the open task's expert and key; the general prompt stays as trained."""
        if self.active_key is not None:
            self.experiences -= 1
            self.register_parameter("active_expert", None)
            self.register_parameter("active_key", None)

    def forward(self, query: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Queries [B, D] -> keys' and values' prefixes by block: [L_G, D] or [L_E, D] if shared, else [B, L_E, D].

        In training the task is known; at test time, and between tasks, the nearest key chooses it for each sample.
        """
        general = (
            self.g if torch.is_grad_enabled() else self.g.detach()
        )  # a view made without autograd requires it still
        prefixes = {block: (g[0], g[1]) for block, g in zip(self.g_blocks, general, strict=True)}
        if self.training and self.active_expert is not None and self.active_key is not None:
            self.last_index = (self.experiences - 1).expand(len(query))
            self.last_cosines = cosines(query, self.active_key[None])[:, 0]
            return prefixes | {b: (e[0], e[1]) for b, e in zip(self.e_blocks, self.active_expert, strict=True)}
        self.last_index = self.last_cosines = None
        keys = self._allowed_keys()
        if not len(keys):
            return prefixes
        self.last_cosines, self.last_index = cosines(query, keys).max(1)
        chosen = self._current(self.experts, self.active_expert)[self.last_index]
        return prefixes | {b: (chosen[:, i, 0], chosen[:, i, 1]) for i, b in enumerate(self.e_blocks)}

    def extra_loss(self) -> Tensor | None:
        """−λ · (1/B) · Σ_b cos(q_b, k_t)."""
        return None if self.last_cosines is None else -self.pull_weight * self.last_cosines.mean()

    def trained(self) -> list[nn.Parameter]:
        """The general prompt, and expert and key of the task that is open."""
        return [self.g, *(p for p in (self.active_expert, self.active_key) if p is not None)]

    def stored_parameters(self) -> int:
        """General prompt, experts and keys."""
        return self.g.numel() + self.experts.numel() + self.keys.numel()

    def _allowed_keys(self) -> Tensor:
        keys = self._current(self.keys, self.active_key)
        return keys[: int(self.experiences)] if self.restrict_to_seen else keys

    def _current(self, stored: Tensor, active: Tensor | None) -> Tensor:
        if active is None:
            return stored
        return stored.index_copy(0, (self.experiences - 1)[None], active[None].detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """There are as many experts as the saved pool has met tasks."""
        self._load_active(state_dict, prefix, ("experts", "keys"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@register
class DualPromptStrategy(PromptStrategy):
    """DualPrompt (Wang et al., ECCV 2022, arXiv 2204.04799) for a timm ViT.

    Options are the fields of :class:`DualPromptConfig`, arguments of the frame in :class:`ContinualStrategy`.

    >>> import timm
    >>> vit = timm.create_model("test_vit", num_classes=0)
    >>> strategy = DualPromptStrategy(model=vit, n_tasks=10, e_blocks=(2, 3), evaluator=None)
    >>> strategy.model.stored_parameters()  # 2·2·5·64 general, 10·(2·2·5·64 + 64) of the tasks
    14720
    """

    method: ClassVar[str] = "dual_prompt"
    summary: ClassVar[str] = "shared prefixes and one a task, chosen by the image"
    paper: ClassVar[str] = "arXiv 2204.04799"
    config_class = DualPromptConfig
    config: DualPromptConfig

    def build_network(self, vit: TimmViT) -> ContinualNetwork:
        """General and expert prefixes in attention."""
        c = self.config
        g_blocks, e_blocks = check_blocks(vit, c.g_blocks, "g_blocks"), check_blocks(vit, c.e_blocks, "e_blocks")
        pool = DualPromptPool(
            vit.embed_dim,
            g_blocks,
            e_blocks,
            c.g_length,
            c.e_length,
            c.n_tasks,
            c.pull_weight,
            c.restrict_to_seen,
            c.seed,
        )
        return PromptedNetwork(vit, self.build_head(vit), pool, c.cache_queries)
