"""Items for a data loader: random transforms that don't depend on its workers, float conversion left to the device.

A loader reads :class:`LoaderItems` instead of the data set itself. Each item's transforms draw from a seed of the run,
the experience, the epoch, the item's index and how often it has come in this epoch (as replayed images do), so batches
are the same with any number of workers. With `finish`, items
stay uint8 and the strategy converts and normalises a whole batch where it trains; a quarter of the bytes is moved. With
`crops` the presets' items are cut only, and resized and flipped there as well.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from avalanche_fmlora.data.device_transforms import Crop, Crops, planned
from avalanche_fmlora.data.transforms import Finish, ImageTransform, application


class LoaderItems(Dataset[Any]):
    """The items of `dataset`, their random draws seeded one by one.

    Args:
        dataset: items (image, label, …).
        seeds: a run's seed, which a transform's own goes before, and further numbers that the draws depend on; None
            leaves them to the global generator.
        finish: what is left to the device, see :func:`finish_of`; None leaves nothing.
        crops: with `finish`, leave resizing and flips to the device too, of transforms that can be planned
            (:func:`~avalanche_fmlora.data.device_transforms.planned`); others give their uint8 pixels.

    Attributes:
        epoch: int64 [1] in shared memory, so that workers that outlive an epoch see it too; draws depend on it.
    """

    def __init__(
        self, dataset: Any, seeds: Sequence[int] | None = None, finish: Finish | None = None, crops: bool = False
    ) -> None:
        self.dataset = dataset
        self.seeds = None if seeds is None else tuple(seeds)
        self.finish = finish
        self.crops = crops
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if self.seeds is None:
            return self._read(index, self._apply)
        again = [index.visit] if isinstance(index, Again) else []
        run, place = self.seeds[0], (*self.seeds[1:], int(self.epoch), int(index), *again)

        def apply(transform: ImageTransform, image: Tensor) -> Any:
            with nullcontext() if transform.seed is None else drawn_from(transform.seed, *place):
                return self._apply(transform, image)

        with drawn_from(run, *place):
            return self._read(index, apply)

    def _read(self, index: int, apply: Callable[[ImageTransform, Tensor], Any]) -> Any:
        token = application.set(apply)
        try:
            return self.dataset[int(index)]
        finally:
            application.reset(token)

    def finished(self, images: Tensor | Crops) -> Tensor:
        """A batch of this loader as the network takes it, wherever it lies."""
        pixels = images.finished() if isinstance(images, Crops) else images
        return pixels if self.finish is None or pixels.dtype != torch.uint8 else self.finish(pixels)

    def collate(self, items: list[Any]) -> list[Any]:
        """A batch: its images (a tensor or :class:`~avalanche_fmlora.data.device_transforms.Crops`), labels, …"""
        own = own_collate(self.dataset)
        if own is not None:
            made: list[Any] = own(items)
            return made
        images, *others = zip(*(tuple(item) for item in items), strict=True)
        return [self._batch(images), *(default_collate(list(column)) for column in others)]

    def _apply(self, transform: ImageTransform, image: Tensor) -> Tensor | Crop:
        if transform.finish != self.finish:
            return transform.whole(image)
        crop = planned(transform.geometry, image) if self.crops else None
        return transform.shaped(image) if crop is None else crop

    def _batch(self, images: Sequence[Tensor | Crop]) -> Tensor | Crops:
        """Where other data's float images are among them, the rest become float here."""
        for image in images:
            if not isinstance(image, Tensor | Crop):
                raise ValueError(
                    f"Expected images as tensors but got {type(image).__name__}: give the data set a transform that "
                    "ends in one, `timm.data.create_transform(**timm.data.resolve_model_data_config(model))`, say."
                )
        raw = [isinstance(image, Crop) or image.dtype == torch.uint8 for image in images]
        if self.finish is not None and any(raw) and not all(raw):
            images = [self.finished(_alone(image)) for image in images]
        if any(isinstance(image, Crop) for image in images):
            return Crops.packed([image if isinstance(image, Crop) else Crop(image) for image in images])
        shapes = sorted({tuple(image.shape) for image in images if isinstance(image, Tensor)})
        if len(shapes) > 1:
            raise ValueError(
                f"Expected images of one shape in a batch but got {shapes[0]} and {shapes[1]}: give the data set a "
                "transform that resizes and crops, `Resize(size)` with `CenterCrop(size)`, say."
            )
        batch: Tensor = default_collate(list(images))
        return batch


class Again(int):
    """Index of an item that has come before in this epoch; it survives the subtraction that joined data sets do.

    >>> (Again.of(7, visit=2) - 3, (Again.of(7, visit=2) - 3).visit)
    (4, 2)
    """

    visit: int

    @classmethod
    def of(cls, index: int, visit: int) -> Again:
        """The index, with how often it has come."""
        made = cls(index)
        made.visit = visit
        return made

    def __sub__(self, other: int) -> Again:
        return Again.of(int(self) - other, self.visit)


class CountedIndices:
    """What a sampler or batch sampler gives, indices that come again in one pass over it as :class:`Again`.

    It counts where batches are put together, so workers, which read them in any order, draw the same.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        visits: Counter[int] = Counter()

        def counted(index: int) -> int:
            visits[index] += 1
            return index if visits[index] == 1 else Again.of(index, visits[index] - 1)

        for given in self.sampler:
            yield [counted(int(i)) for i in given] if isinstance(given, list | tuple) else counted(int(given))


def own_collate(dataset: Any) -> Callable[[list[Any]], Any] | None:
    """How a data set makes a batch of its items, where that is a way of its own."""
    found = getattr(dataset, "collate_fn", None)
    return None if found is default_collate else found


def _alone(image: Tensor | Crop) -> Tensor:
    """An image's pixels, what a crop has left to the device done here."""
    return Crops.packed([image]).finished()[0] if isinstance(image, Crop) else image


@contextmanager
def drawn_from(*seeds: int) -> Iterator[None]:
    """torch's CPU generator starts from `seeds` inside and goes on where it was after it."""
    generator = torch.random.default_generator
    state = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]))
    try:
        yield
    finally:
        generator.set_state(state)


def finish_of(dataset: Any) -> Finish | None:
    """What the first item's transform ends with; None if that is no transform of this package, or not the last one."""
    if not len(dataset):
        return None
    applied: list[tuple[Finish, Tensor]] = []

    def noted(transform: ImageTransform, image: Tensor) -> Tensor:
        applied.append((transform.finish, transform.whole(image)))
        return applied[-1][1]

    token = application.set(noted)
    try:
        with drawn_from(0):
            item = dataset[0]
    finally:
        application.reset(token)
    return applied[-1][0] if applied and item[0] is applied[-1][1] else None


class TimedLoader:
    """`loader`, which says how many seconds each of its batches was waited for: `add` is called with them."""

    def __init__(self, loader: Iterable[Any], add: Callable[[float], None]) -> None:
        self._loader, self._add = loader, add

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # not there yet: this is being copied
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        start = time.perf_counter()
        batches = iter(self._loader)
        while True:
            with one_thread():
                batch = next(batches, _NONE_LEFT)
            self._add(time.perf_counter() - start)
            if batch is _NONE_LEFT:
                return
            yield batch
            start = time.perf_counter()


_NONE_LEFT = object()


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread inside, as in a loader's workers: an image's transforms are too small to be shared
    out, and on busy cores the threads wait longer for each other than the work takes. No result depends on it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
