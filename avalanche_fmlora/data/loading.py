"""Items for a data loader: random transforms that don't depend on its workers, float conversion left to the device.

A loader reads :class:`LoaderItems` instead of the data set itself. Each item's transforms draw from a seed of the run,
the experience, the epoch and the item's index, so batches are the same with any number of workers. With `finish`, items
stay uint8 and the strategy converts and normalises a whole batch where it trains; a quarter of the bytes is moved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from avalanche_fmlora.data.transforms import Finish, leaves_finish


class LoaderItems(Dataset[Any]):
    """The items of `dataset`, their random draws seeded one by one.

    Args:
        dataset: items (image, label, …).
        seeds: further numbers that the draws depend on, as a run's seed; None leaves them to the global generator.
        finish: what is left to the device, see :func:`finish_of`; None leaves nothing.

    Attributes:
        epoch: int64 [1] in shared memory, so that workers that outlive an epoch see it too; draws depend on it.
    """

    def __init__(self, dataset: Any, seeds: Sequence[int] | None = None, finish: Finish | None = None) -> None:
        self.dataset = dataset
        self.seeds = None if seeds is None else tuple(seeds)
        self.finish = finish
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        token = leaves_finish.set(self._leaves)
        try:
            if self.seeds is None:
                return self.dataset[index]
            entropy = [*self.seeds, int(self.epoch), int(index)]
            with drawn_from(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])):
                return self.dataset[index]
        finally:
            leaves_finish.reset(token)

    def finished(self, images: Tensor) -> Tensor:
        """A batch of this loader as the network takes it, wherever it lies."""
        return images if self.finish is None or images.dtype != torch.uint8 else self.finish(images)

    def _leaves(self, finish: Finish) -> bool:
        return finish == self.finish

    def collate(self, items: list[Any]) -> Any:
        """A batch; where other data's float images are among the items, the rest become float here."""
        if self.finish is not None and len({item[0].dtype for item in items}) > 1:
            finish = self.finish
            items = [(finish(item[0]) if item[0].dtype == torch.uint8 else item[0], *tuple(item)[1:]) for item in items]
        return default_collate([tuple(item) for item in items])


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """torch's CPU generator starts from `seed` inside and goes on where it was after it."""
    generator = torch.random.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def finish_of(dataset: Any) -> Finish | None:
    """What the transform of the first item ends with, None if that is no transform of this package."""
    heard: list[Finish] = []
    token = leaves_finish.set(heard.append)
    try:
        with drawn_from(0):
            dataset[0]
    finally:
        leaves_finish.reset(token)
    return heard[0] if heard else None


class TimedLoader:
    """`loader`, which says how many seconds each of its batches was waited for: `add` is called with them."""

    def __init__(self, loader: Iterable[Any], add: Callable[[float], None]) -> None:
        self._loader, self._add = loader, add

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
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
