"""CODA-Prompt (arXiv 2211.13218): prefixes that are sums of components, weighted by the image, some new each task."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.modules.prompt_pool import PromptedNetwork, PromptPool, check_blocks, task_generator
from avalanche_fmlora.modules.vit import TimmViT
from avalanche_fmlora.strategies.config import MethodConfig, Schedule, Structural
from avalanche_fmlora.strategies.prompting import PromptConfig, PromptStrategy
from avalanche_fmlora.strategies.registry import register

_LOG = logging.getLogger(__name__)


class CODAPromptConfig(PromptConfig):
    """Options of CODA-Prompt."""

    pool_size: Structural[int] = Field(100, ge=1)
    """Components M of all tasks together, a multiple of `n_tasks`."""
    n_tasks: Structural[int] = Field(10, ge=1)
    """Experiences T that the pool is for; each gets M/T components."""
    prompt_length: Structural[int] = Field(8, ge=2, multiple_of=2)
    """Length L of a component: the first half goes to the keys, the second to the values."""
    blocks: Structural[tuple[int, ...]] = (0, 1, 2, 3, 4)
    """Blocks with prompts."""
    ortho_weight: float = Field(0.0, ge=0)
    """Weight μ of the orthogonality loss on components, keys and attention vectors (published: 0)."""
    lr_prompt: float = Field(1e-3, ge=0)
    """Learning rate of components, keys and attention vectors."""
    lr_head: float = Field(1e-3, ge=0)
    """Learning rate of the classifier's rows, published as that of the prompts."""
    lr_schedule: Schedule = "coda"
    """Course of all rates within an experience: half-cosine to zero, constant, or CODA-Prompt's by epoch.
    Without effect on an optimizer or scheduler that is passed in."""

    def planned_for(self, n_experiences: int) -> MethodConfig:
        """See :meth:`MethodConfig.planned_for`; a `pool_size` that was not given becomes the nearest that divides."""
        planned = super().planned_for(n_experiences)
        if planned is self or "pool_size" in self.model_fields_set:
            return planned
        return planned.model_copy(update={"pool_size": nearest_size(self.pool_size, n_experiences)})


def nearest_size(size: int, n_tasks: int) -> int:
    """The size of a pool nearest to `size` that so many tasks share evenly.

    >>> nearest_size(100, 6)
    102
    """
    return max(1, round(size / n_tasks)) * n_tasks


def component_weights(query: Tensor, keys: Tensor, attention: Tensor) -> Tensor:
    """``w_m = cos(q ⊙ A_m, K_m)``: no softmax, may be negative.

    Args:
        query: shape [B, D].
        keys: K, shape [..., M, D].
        attention: A, shape [..., M, D].

    Returns:
        Shape [..., B, M].

    >>> component_weights(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 2.0]]), torch.ones(1, 2)).item().__round__(4)
    -0.7071
    """
    # (q⊙A)·K = q·(A⊙K) and |q⊙A|² = q²·A²: matrix products in the place of a tensor [B, M, D].
    dots = query @ (attention * F.normalize(keys, dim=-1)).transpose(-1, -2)
    squares = query.square() @ attention.square().transpose(-1, -2)
    return dots / squares.clamp_min(1e-24).sqrt()


def orthogonality(rows: Tensor) -> Tensor:
    """``mean((X Xᵀ − I)²)`` over the last two axes of X [..., M, D], summed over the others."""
    gram = rows @ rows.transpose(-1, -2)
    return (gram - torch.eye(gram.shape[-1]).to(gram)).square().mean((-2, -1)).sum()


@torch.no_grad()
def orthonormal_rows(earlier: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Random rows, Gram-Schmidt'ed against all earlier rows and each other, then normalised.

    Earlier rows have trained and need not be orthogonal among themselves: what is taken off is the part in their span.
    Where they fill the whole space (more rows than dimensions) nothing would be left, and a row stays as it was drawn.

    Args:
        earlier: shape [S, D].
        count: rows wanted.
        generator: of the draws, on the CPU.

    Returns:
        Shape [count, D], in the type and on the device of `earlier`.

    >>> rows = orthonormal_rows(torch.tensor([[2.0, 0.0, 0.0]]), 2)
    >>> (rows @ rows.T - torch.eye(2)).abs().max().item() < 1e-6, rows[:, 0].abs().max().item() < 1e-6
    (True, True)
    """
    size = earlier.shape[1]
    past = earlier.double().cpu()
    basis = torch.zeros(min(size, len(past) + count), size, dtype=torch.float64)
    filled, made = 0, []
    for row in [*past, *torch.randn(count, size, generator=generator, dtype=torch.float32).double()]:
        unit = row / row.norm().clamp_min(1e-12)
        rest = unit
        for _ in range(2):  # once more against rounding
            rest = rest - basis[:filled].T @ (basis[:filled] @ rest)
        length = rest.norm()
        if filled < len(basis) and length > 1e-6:
            unit = basis[filled] = rest / length
            filled += 1
        made.append(unit)
    return torch.stack(made[len(past) :]).to(earlier)


class CODAPromptPool(PromptPool):
    """M components of prefixes, with a key and an attention vector each, for every prompted block.

    Those of the task that is open are parameters; those of tasks before it are buffers, which no optimizer can move;
    those of tasks to come are zero and take no part.

    Args:
        dim: D.
        blocks: the prompted blocks.
        size: M, a multiple of `n_tasks`.
        length: L, even.
        n_tasks: T.
        ortho_weight: μ.
        seed: of the components' first values.

    Attributes:
        prompts: P, shape [blocks, M, L, D].
        keys: K, shape [blocks, M, D].
        attention: A, shape [blocks, M, D].
        active_prompts, active_keys, active_attention: the M/T of each in training, or None.
        experiences: tasks begun so far.
        last_weights: w of the latest queries, shape [blocks, B, components].

    Raises:
        ValueError: if M is not a multiple of T, or when more than T tasks begin.
    """

    prompts: Tensor
    keys: Tensor
    attention: Tensor
    experiences: Tensor
    active_keys: nn.Parameter | None
    begin_keeps_features: ClassVar[bool] = False  # new components count at once

    def __init__(
        self,
        dim: int,
        blocks: tuple[int, ...] = (0, 1, 2, 3, 4),
        size: int = 100,
        length: int = 8,
        n_tasks: int = 10,
        ortho_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if size % n_tasks:
            raise ValueError(
                f"Expected `pool_size` to be a multiple of `n_tasks` but got {size} and {n_tasks}: each task has the "
                f"same number of components; take pool_size={nearest_size(size, n_tasks)}."
            )
        self.blocks = tuple(blocks)
        self.n_tasks = n_tasks
        self.share = size // n_tasks
        self.ortho_weight = ortho_weight
        self.seed = seed
        self.register_buffer("prompts", torch.zeros(len(blocks), size, length, dim, dtype=torch.float32))
        self.register_buffer("keys", torch.zeros(len(blocks), size, dim, dtype=torch.float32))
        self.register_buffer("attention", torch.zeros(len(blocks), size, dim, dtype=torch.float32))
        self.register_buffer("experiences", torch.tensor(0))
        self._begun = 0  # the same number: read in every step, so no word to the device
        for name in ("active_prompts", "active_keys", "active_attention"):
            self.register_parameter(name, None)
        self.last_weights: Tensor | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Open the next task: its components are drawn, orthonormal to all earlier ones. While one is open, nothing.

        Raises:
            ValueError: if all T tasks have been.
        """
        if self.active_keys is not None:
            return
        task = int(self.experiences)
        if task >= self.n_tasks:
            raise ValueError(
                f"Expected at most n_tasks={self.n_tasks} experiences but another one begins: build the strategy with "
                f"the number of experiences as `n_tasks` (`pool_size`, now {self.keys.shape[1]}, a multiple of it)."
            )
        generator = task_generator(self.seed, task)
        start, stop = task * self.share, (task + 1) * self.share
        for stored in (self.keys, self.attention, self.prompts):
            for rows in stored.flatten(2) if stored.ndim == 4 else stored:
                rows[start:stop] = orthonormal_rows(rows[:start], self.share, generator)
        self.active_prompts = nn.Parameter(self.prompts[:, start:stop].clone())
        self.active_keys = nn.Parameter(self.keys[:, start:stop].clone())
        self.active_attention = nn.Parameter(self.attention[:, start:stop].clone())
        self.experiences += 1
        self._begun += 1

    @torch.no_grad()
    def end(self) -> None:
        """Close the task: its components join the past."""
        stop = int(self.experiences) * self.share
        for name in ("prompts", "keys", "attention"):
            active = getattr(self, f"active_{name}")
            if active is not None:
                getattr(self, name)[:, stop - self.share : stop] = active
                self.register_parameter(f"active_{name}", None)

    def discard(self) -> None:
        """Let go of the open task's components."""
        if self.active_keys is not None:
            self.experiences -= 1
            self._begun -= 1
            for name in ("active_prompts", "active_keys", "active_attention"):
                self.register_parameter(name, None)

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """P, K, A of the tasks so far, [blocks, components, ...]; only those of the open task have a gradient."""
        stop = self._begun * self.share
        parts = []
        for name in ("prompts", "keys", "attention"):
            stored, active = getattr(self, name), getattr(self, f"active_{name}")
            parts.append(
                stored[:, :stop] if active is None else torch.cat([stored[:, : stop - self.share], active], dim=1)
            )
        return parts[0], parts[1], parts[2]

    def forward(self, query: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Queries [B, D] -> keys' and values' prefixes by block, each [B, L/2, D]; none before the first task."""
        prompts, keys, attention = self.components()
        if not keys.shape[1]:
            return {}
        self.last_weights = component_weights(query, keys, attention)
        mixed = (self.last_weights @ prompts.flatten(2)).unflatten(2, prompts.shape[2:])
        half = prompts.shape[2] // 2
        return {block: (p[:, :half], p[:, half:]) for block, p in zip(self.blocks, mixed, strict=True)}

    def extra_loss(self) -> Tensor | None:
        """μ · Σ_blocks [mean((KKᵀ−I)²) + mean((AAᵀ−I)²) + mean((PPᵀ−I)²)] over the components so far."""
        if not self.ortho_weight or not self._begun:
            return None
        prompts, keys, attention = self.components()
        loss = orthogonality(keys) + orthogonality(attention) + orthogonality(prompts.flatten(2))
        return self.ortho_weight * loss

    def trained(self) -> list[nn.Parameter]:
        """The components of the task that is open."""
        return [p for p in (self.active_prompts, self.active_keys, self.active_attention) if p is not None]

    def stored_parameters(self) -> int:
        """blocks · M · (L + 2) · D."""
        return self.prompts.numel() + self.keys.numel() + self.attention.numel()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """A task that was open when saved is open again."""
        self._load_active(state_dict, prefix, ())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._begun = int(self.experiences)


@register
class CODAPromptStrategy(PromptStrategy):
    """CODA-Prompt (Smith et al., CVPR 2023, arXiv 2211.13218) for a timm ViT.

    Options are the fields of :class:`CODAPromptConfig`, arguments of the frame in :class:`ContinualStrategy`.

    >>> import timm
    >>> vit = timm.create_model("test_vit", num_classes=0)
    >>> strategy = CODAPromptStrategy(model=vit, blocks=(0, 1), pool_size=20, evaluator=None)
    >>> strategy.model.stored_parameters()  # 2 blocks of 20 components, 8 + 1 + 1 vectors of width 64 each
    25600
    """

    method: ClassVar[str] = "coda_prompt"
    summary: ClassVar[str] = "prefixes as sums of components weighted by the image"
    paper: ClassVar[str] = "arXiv 2211.13218"
    config_class = CODAPromptConfig
    config: CODAPromptConfig

    def build_network(self, vit: TimmViT) -> ContinualNetwork:
        """Components for each prompted block."""
        c = self.config
        blocks = check_blocks(vit, c.blocks, "blocks")
        pool = CODAPromptPool(vit.embed_dim, blocks, c.pool_size, c.prompt_length, c.n_tasks, c.ortho_weight, c.seed)
        return PromptedNetwork(vit, self.build_head(vit), pool, c.cache_queries)

    def model_adaptation(self, model: ContinualNetwork | None = None) -> ContinualNetwork:
        """As the frame's; logs a warning when the stream has more experiences than the pool has room for."""
        length = _stream_length(self.experience)
        if self.is_training and not self.resources and length > self.config.n_tasks:
            _LOG.warning(
                "The stream has %d experiences but the pool is for n_tasks=%d and refuses more: give n_tasks=%d and a "
                "pool_size that is a multiple of it.", length, self.config.n_tasks, length,
            )  # fmt: skip
        return super().model_adaptation(model)


def _stream_length(experience: Any) -> int:
    """Experiences of the stream that an experience is from, 0 if that is not known or they are parts of experiences."""
    try:
        return 0 if hasattr(experience, "sub_stream_length") else len(experience.origin_stream)
    except (AttributeError, TypeError):
        return 0
