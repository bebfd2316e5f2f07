"""What prompt methods share: the query of an image, and a network whose prompts depend on the query.

Letters: B batch, D width, L prompt length, M prompts of a pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_fmlora.modules.feature_cache import FeatureCache
from avalanche_fmlora.modules.head import IncrementalHead
from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.modules.prefixes import takes_prefix
from avalanche_fmlora.modules.vit import TimmViT, forward_features, forward_tokens


@torch.no_grad()
def query_features(vit: TimmViT, images: Tensor) -> Tensor:
    """q(x) of images [B, 3, H, W]: the class token after the final norm, [B, D], no prompt, no autograd.

    A model without class token gives its pooled features; one that normalises after pooling (`fc_norm`) gives the
    class token through that norm.
    """
    tokens, _ = forward_tokens(vit, images)
    if vit.cls_token is None:
        return vit.forward_head(tokens, pre_logits=True)
    return vit.fc_norm(tokens[:, 0])


def cosines(query: Tensor, keys: Tensor) -> Tensor:
    """cos(q_b, k_m), from [B, D] and [M, D] to [B, M].

    >>> cosines(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
    tensor([[ 0.6000, -0.8000]])
    """
    return F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).T


def uniform(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """U(−1, 1), the start of prompts and keys of L2P and DualPrompt."""
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float32) * 2 - 1


def task_generator(seed: int, task: int) -> torch.Generator:
    """Random numbers of one task: the same whether drawn in advance, as tasks come, or after a reload."""
    return torch.Generator().manual_seed((seed * 1_000_003 + task + 1) % 2**63)


def check_blocks(vit: TimmViT, blocks: Sequence[int], option: str) -> tuple[int, ...]:
    """The blocks, if the model has them all and their attention takes a prefix.

    Raises:
        ValueError: that names the blocks that are missing, or no plain attention, and the model's depth.
    """
    depth = len(vit.blocks)
    missing = [i for i in blocks if not 0 <= i < depth]
    if missing:
        raise ValueError(
            f"Expected a ViT with blocks {tuple(blocks)} for `{option}` but block {', '.join(map(str, missing))} is "
            f"missing: the model has depth {depth} (blocks 0..{depth - 1}). Use a deeper ViT or other `{option}`."
        )
    if len(set(blocks)) < len(blocks):
        raise ValueError(f"Expected `{option}` to be different blocks but got {tuple(blocks)}.")
    other = [i for i in blocks if not takes_prefix(getattr(vit.blocks[i], "attn", None), vit.embed_dim)]
    if other:
        raise ValueError(
            f"Expected blocks with timm's `Attention`, `AttentionRope` or `EvaAttention`, as wide as the model, for "
            f"`{option}` but blocks {other} have none: use a ViT of timm's plain blocks, or a method without prefixes."
        )
    return tuple(blocks)


class PromptPool(nn.Module):
    """Base of the prompt modules: from queries to prompts, with one task an experience.

    A subclass gives `forward` (queries [B, D] -> what its network puts into the ViT) and `trained`.

    Attributes:
        begin_keeps_features: whether :meth:`begin` changes no prompt of any image.
    """

    begin_keeps_features: ClassVar[bool] = True

    def __getstate__(self) -> dict[str, Any]:
        """Without what is known of the latest queries: it hangs on a graph, which can be neither copied nor pickled."""
        return {name: None if name.startswith("last_") else value for name, value in self.__dict__.items()}

    def begin(self) -> None:
        """Open the next task; while one is open, nothing."""

    def end(self) -> None:
        """Close the task."""

    def discard(self) -> None:
        """Let go of an open task, as if it had not begun; prompts that all tasks share stay as trained."""

    def trained(self) -> list[nn.Parameter]:
        """What trains now."""
        raise NotImplementedError

    def stored_parameters(self) -> int:
        """Numbers kept between experiences."""
        raise NotImplementedError

    def extra_loss(self) -> Tensor | None:
        """Term of the loss, of the latest queries."""
        return None

    def _load_active(self, state_dict: dict[str, Any], prefix: str, buffers: Iterable[str]) -> None:
        """Before loading: take the sizes of saved buffers, and of the `active_…` parameters, which may be none."""
        for name in buffers:
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape != own.shape:
                setattr(self, name, torch.empty_like(saved, dtype=own.dtype, device=own.device))
        reference = next(self.buffers())
        for name in [n for n in self._parameters if n.startswith("active_")]:
            saved, held = state_dict.get(prefix + name), self._parameters[name]
            if saved is not None and held is not None and held.shape == saved.shape:
                continue  # the optimizer has it
            fresh = None if saved is None else nn.Parameter(saved.detach().clone().to(reference.device))
            setattr(self, name, fresh)


class PromptedNetwork(ContinualNetwork):
    """Frozen ViT read twice: without prompts for the query, then with the prompts that the query asks for.

    There is one backbone; the query runs in evaluation mode and without autograd. The pool's prefixes go into
    attention; a method with prompts elsewhere overrides `prompted_features`.

    Args:
        vit: frozen here.
        head: the classifier.
        pool: from queries to prefixes by block.
        cache_queries: whether queries of training images whose input repeats are kept for the experience.
    """

    pool: PromptPool
    queries: FeatureCache

    def __init__(self, vit: TimmViT, head: IncrementalHead, pool: PromptPool, cache_queries: bool = True) -> None:
        super().__init__(vit, head)
        self.pool = pool
        self.queries = FeatureCache(cache_queries)
        self._open = False

    def query(self, images: Tensor) -> Tensor:
        """q(x), shape [B, D], without autograd; while an experience trains, from the cache where it holds the image."""
        if self.training and self._open:
            return self.queries.lookup(images, self._encode)
        return self._encode(images)

    @torch.compiler.disable
    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D]; never compiled: prefixes and cache are no fixed graph."""
        query = self.query(images)
        # Distances are not taken in half precision, though the query itself may be; at test time nothing trains.
        with (
            torch.autocast(images.device.type, enabled=False),
            torch.set_grad_enabled(self.training and torch.is_grad_enabled()),
        ):
            prompts = self.pool(query)
        return self.prompted_features(images, prompts)

    def prompted_features(self, images: Tensor, prompts: Any) -> Tensor:
        """The second pass, [B, D] (wider with another `pooling`), with what the pool gave."""
        return forward_features(self.vit, images, prefixes=prompts, pooling=self.pooling)

    @property
    def adapts(self) -> bool:
        """Prompts train."""
        return True

    @property
    def begin_keeps_features(self) -> bool:
        """As the pool's."""
        return self.pool.begin_keeps_features

    def extra_loss(self) -> Tensor | None:
        """The pool's own term."""
        return self.pool.extra_loss()

    def begin(self, classes: Iterable[int]) -> None:
        """Open an experience: one task of the pool."""
        self.queries.clear()
        self._open = True
        self.pool.begin()
        super().begin(classes)

    def end(self, core_step: float = 1.0) -> None:
        """Close the task; cached queries go."""
        super().end(core_step)
        self.pool.end()
        self._open = False
        self.queries.clear()

    def discard(self) -> None:
        """Let go of a task that was broken off; see :meth:`PromptPool.discard`."""
        super().discard()
        self.pool.discard()
        self._open = False
        self.queries.clear()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What trains now: prompt (with its keys) and head."""
        groups = {"prompt": self.pool.trained(), "head": super().parameter_groups()["head"]}
        return {name: [p for p in ps if p.requires_grad] for name, ps in groups.items()}

    def stored_parameters(self) -> int:
        """Numbers that the pool keeps."""
        return self.pool.stored_parameters()

    def _encode(self, images: Tensor) -> Tensor:
        return query_features(self.vit, images).to(self.head.rows.dtype)
