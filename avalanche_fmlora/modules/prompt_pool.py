"""What prompt methods share: the query of an image, its cache, and a network whose prompts depend on the query.

Letters: B batch, D width, L prompt length, M prompts of a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avalanche_fmlora.modules.head import IncrementalHead
from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.modules.vit import forward_features, forward_tokens

_WORDS = {1: torch.uint8, 2: torch.int16}


@torch.no_grad()
def query_features(vit: VisionTransformer, images: Tensor) -> Tensor:
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
    return torch.rand(tuple(shape), generator=generator) * 2 - 1


def task_generator(seed: int, task: int) -> torch.Generator:
    """Random numbers of one task: the same whether drawn in advance, as tasks come, or after a reload."""
    return torch.Generator().manual_seed((seed * 1_000_003 + task + 1) % 2**63)


def check_blocks(vit: VisionTransformer, blocks: Sequence[int], option: str) -> tuple[int, ...]:
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
    other = [i for i in blocks if not hasattr(getattr(vit.blocks[i], "attn", None), "qkv")]
    if other:
        raise ValueError(f"Expected blocks with timm's `Attention` for `{option}` but blocks {other} have none.")
    return tuple(blocks)


def image_hashes(images: Tensor, weights: Tensor) -> Tensor:
    """Two universal 64-bit hashes of each image's raw bits.

    Images that differ in any bit agree with probability below 2⁻⁶⁴ over the draw of the weights.

    Args:
        images: shape [B, ...], any dtype.
        weights: int64, random over its whole range, shape [2, words], a word being 4 bytes of an image (or one element
            where elements are smaller).

    Returns:
        int64, shape [B, 2].
    """
    words = _words(images)
    return torch.stack([(words * w).sum(1) for w in weights], 1)


def _words(images: Tensor) -> Tensor:
    return images.detach().contiguous().flatten(1).view(_WORDS.get(images.element_size(), torch.int32))


class QueryCache:
    """Queries of the current experience by image content: an image whose input repeats is encoded once.

    The key is the content of the input, so an augmented image never gets the query of another view of it. Entries are
    taken up in the first epoch only. After a later epoch without a single hit the inputs evidently change from epoch to
    epoch, and the cache is off for good.

    Attributes:
        enabled: whether it is in use.
        hits, misses: images found and not found in the current epoch.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.clear()

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Forget all queries: another experience begins."""
        self._rows: dict[tuple[int, int], Tensor] = {}
        self._weights: Tensor | None = None
        self._epochs = self.hits = self.misses = 0

    def end_epoch(self) -> None:
        """Take up no more; off if the second or a later epoch found nothing."""
        self._epochs += 1
        if self._epochs > 1 and self.hits == 0 and self.misses > 0:
            self.clear()
            self.enabled = False
        self.hits = self.misses = 0

    @torch.no_grad()
    def lookup(self, images: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Queries [B, D] of images [B, ...]; `encode` is called for those that are not known, if there are any."""
        if not self.enabled:
            return encode(images)
        keys = [(a, b) for a, b in self._hashes(images).tolist()]
        unknown = [i for i, key in enumerate(keys) if key not in self._rows]
        self.hits += len(keys) - len(unknown)
        self.misses += len(unknown)
        fresh: dict[tuple[int, int], Tensor] = {}
        if unknown:
            encoded = encode(images if len(unknown) == len(keys) else images[unknown])
            fresh = {keys[i]: row for i, row in zip(unknown, encoded, strict=True)}
            if self._epochs == 0:
                self._rows.update(fresh)
            if len(unknown) == len(keys):
                return encoded
        return torch.stack([fresh[key] if key in fresh else self._rows[key] for key in keys])

    def _hashes(self, images: Tensor) -> Tensor:
        size = images[0].numel() * max(1, images.element_size() // 4)
        if self._weights is None or self._weights.shape[1] != size:
            self._rows = {}
            limit = torch.iinfo(torch.int64)
            # Seeded by the size alone: the model's own random numbers are the same with and without a cache.
            generator = torch.Generator().manual_seed(size)
            weights = torch.randint(limit.min, limit.max, (2, size), generator=generator)
            self._weights = weights.to(images.device)
        return image_hashes(images, self._weights)


class PromptPool(nn.Module):
    """Base of the prompt modules: from queries to prompts, with one task an experience.

    A subclass gives `forward` (queries [B, D] -> what its network puts into the ViT) and `trained`.
    """

    def begin(self) -> None:
        """Open the next task."""

    def end(self) -> None:
        """Close the task."""

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
            saved = state_dict.get(prefix + name)
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
    queries: QueryCache

    def __init__(
        self, vit: VisionTransformer, head: IncrementalHead, pool: PromptPool, cache_queries: bool = True
    ) -> None:
        super().__init__(vit, head)
        self.pool = pool
        self.queries = QueryCache(cache_queries)

    def query(self, images: Tensor) -> Tensor:
        """q(x), shape [B, D], without autograd; while training, from the cache where it holds the image."""
        if self.training:
            return self.queries.lookup(images, self._encode)
        return self._encode(images)

    @torch.compiler.disable
    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D]; never compiled: prefixes and cache are no fixed graph."""
        query = self.query(images)
        # Which prompt is chosen shall not hang on half precision, and at test time nothing trains.
        with (
            torch.autocast(images.device.type, enabled=False),
            torch.set_grad_enabled(self.training and torch.is_grad_enabled()),
        ):
            prompts = self.pool(query)
        return self.prompted_features(images, prompts)

    def prompted_features(self, images: Tensor, prompts: Any) -> Tensor:
        """The second pass, [B, D], with what the pool gave."""
        return forward_features(self.vit, images, prefixes=prompts)

    def extra_loss(self) -> Tensor | None:
        """The pool's own term."""
        return self.pool.extra_loss()

    def begin(self, classes: Iterable[int]) -> None:
        """Open an experience: one task of the pool."""
        self.queries.clear()
        self.pool.begin()
        super().begin(classes)

    def end(self, core_step: float = 1.0) -> None:
        """Close the task; cached queries go."""
        super().end(core_step)
        self.pool.end()
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
