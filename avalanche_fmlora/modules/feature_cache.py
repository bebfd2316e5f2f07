"""Features of a model that rests while it is asked again and again, by image content: queries, the free teacher's.

Letters: B batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16}


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


def hash_weights(images: Tensor) -> Tensor:
    """Weights for :func:`image_hashes` of images of this shape and type, the same whenever they are drawn."""
    size = images[0].numel() * max(1, images.element_size() // 4)
    limit = torch.iinfo(torch.int64)
    # Seeded by the size alone: the model's own random numbers are the same with and without a cache.
    generator = torch.Generator().manual_seed(size)
    return torch.randint(limit.min, limit.max, (2, size), generator=generator).to(images.device)


class FeatureCache:
    """Features of the current experience by image content: an image whose input repeats is encoded once.

    The key is the content of the input, so an augmented image never gets the features of another view of it. Entries
    are taken up in the first epoch only. After a later epoch without a single hit the inputs evidently change from
    epoch to epoch, and the cache is off for good.

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
        """Forget all: another experience begins."""
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
        """Features [B, D] of images [B, ...]; `encode` is called for those that are not known, if there are any."""
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
            self._weights = hash_weights(images)
        return image_hashes(images, self._weights)


class KnownFeatures:
    """Features of a set of images, found again by their content without a word to the host: all stays on the device.

    Args:
        images: batches of a fixed order, each [B, ...], of one shape.
        features: their features, shape [M, D].
    """

    def __init__(self, images: Iterable[Tensor], features: Tensor) -> None:
        hashes: list[Tensor] = []
        for batch in images:
            if not hashes:
                self._weights = hash_weights(batch)
            hashes.append(image_hashes(batch, self._weights))
        keys = torch.cat(hashes)
        order = keys[:, 0].argsort()
        self._keys = keys[order]
        self._features = features[order]

    def find(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] of images [B, ...], and which of the images are known, bool [B] (others: any features)."""
        if images[0].numel() * max(1, images.element_size() // 4) != self._weights.shape[1]:
            return self._features[:1].expand(len(images), -1), torch.zeros(len(images), dtype=torch.bool).to(
                images.device
            )
        keys = image_hashes(images, self._weights)
        index = torch.searchsorted(self._keys[:, 0].contiguous(), keys[:, 0].contiguous()).clamp_max(
            len(self._keys) - 1
        )
        return self._features[index], (self._keys[index] == keys).all(1)
