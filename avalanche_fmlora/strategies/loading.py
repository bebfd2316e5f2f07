"""How strategies read their data: the same batches with any number of workers, images resized on the device."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from avalanche.benchmarks.utils.data_loader import MultiDatasetDataLoader
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor
from torch.utils.data import DataLoader

from avalanche_fmlora.data.device_transforms import resizes_on
from avalanche_fmlora.data.loading import CountedIndices, LoaderItems, TimedLoader, finish_of, own_collate
from avalanche_fmlora.data.transforms import Finish

_LOADER_ARGUMENTS = frozenset(inspect.signature(DataLoader.__init__).parameters) - {"self", "dataset", "collate_fn"}


class DataLoading(SupervisedTemplate):
    """Avalanche's template, its loaders and those of its plugins reading :class:`LoaderItems`.

    Attributes:
        data_wait_s: seconds that training has waited for batches so far.
    """

    dataloader: Any
    data_wait_s: float = 0.0
    _num_workers: int = 0

    def finishes_on_device(self) -> bool:
        """Whether the loader leaves resizing, flips and conversion to float to the device, a batch at a time."""
        return bool(self.device.type != "cpu")

    def make_train_dataloader(self, num_workers: int = 0, **kwargs: Any) -> None:
        """Arguments as in Avalanche, passed to ``train``.

        Raises:
            ValueError: if there are no images.
        """
        if not len(self.adapted_dataset):
            number = getattr(self.experience, "_current_experience", None)
            raise ValueError(
                f"Expected images to train on but experience {'' if number is None else number} has none: leave it out "
                "of the stream, or have the plugin that chose among its images keep some."
            )
        self._num_workers = num_workers
        super().make_train_dataloader(num_workers=num_workers, **kwargs)
        made: Any = self.dataloader
        if isinstance(made, DataLoader):  # its data set can't be replaced, so it is made anew
            self.plain_train_dataloader(num_workers, **kwargs)

    def plain_train_dataloader(self, num_workers: int = 0, **kwargs: Any) -> None:
        """torch's own loader of all images that train; arguments as in Avalanche."""
        self._num_workers = num_workers
        known = {name: value for name, value in kwargs.items() if name in _LOADER_ARGUMENTS}
        known |= {name: CountedIndices(known[name]) for name in ("sampler", "batch_sampler") if known.get(name)}
        arguments = {"num_workers": num_workers, "shuffle": True, "batch_size": self.train_mb_size, **known}
        items = self._items(self.adapted_dataset, self._seeds(True), self._finish(self.adapted_dataset))
        self.dataloader = self._loader(items, **arguments)

    def make_eval_dataloader(self, **kwargs: Any) -> None:
        """Arguments as in Avalanche, passed to ``eval``, which draws nothing from the generator of training."""
        super().make_eval_dataloader(**kwargs)
        self._wrap(seeded=False)
        self.dataloader.loader_kwargs["generator"] = torch.Generator()

    def training_epoch(self, **kwargs: Any) -> None:
        """Avalanche's epoch, with seeds for its items and a clock at its loader."""
        self._wrap(seeded=True)
        for items in _items_of(self.dataloader):
            items.epoch.fill_(self.clock.train_exp_epochs)
        untimed = self.dataloader
        self.dataloader = cast(Any, TimedLoader(untimed, self._add_wait))
        try:
            super().training_epoch(**kwargs)
        finally:
            self.dataloader = untimed

    def gradient_mb_size(self) -> int:
        """Images a batch of a pass with gradients: what fits into a step fits there."""
        return min(self.train_mb_size, self.eval_mb_size)

    def batches(self, dataset: Any, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of a data set on the device, in order, for a pass during training.

        Args:
            dataset: any.
            batch_size: images a batch; as in an evaluation if None.
        """
        items = self._items(dataset, None, self._finish(dataset))
        # A generator of its own: a pass draws nothing from the global one, so that training's batches stay as they are.
        own = torch.Generator()
        size = batch_size or self.eval_mb_size
        loader = self._loader(items, batch_size=size, num_workers=self._num_workers, generator=own)
        for images, labels, *_ in TimedLoader(loader, self._add_wait):
            yield (
                items.finished(images.to(self.device, non_blocking=True)),
                labels.to(self.device, torch.long, non_blocking=True),
            )

    def _wrap(self, *, seeded: bool) -> None:
        """In place, since Avalanche's loaders make torch's anew each epoch from the data sets they hold."""
        loader = self.dataloader
        if isinstance(loader, MultiDatasetDataLoader) and not _items_of(loader):
            finishes = [self._finish(dataset) for dataset in loader.datasets]
            loader.datasets = [  # one batch holds items of all: what is left to the device is the same or nothing
                self._items(dataset, self._seeds(seeded, i), finishes[0] if finishes[i] == finishes[0] else None)
                for i, dataset in enumerate(loader.datasets)
            ]
            loader.loader_kwargs["collate_fn"] = loader.datasets[0].collate
            made: Any = loader
            made._make_pytorch_loader = functools.partial(_counted, loader._make_pytorch_loader)

    def _seeds(self, seeded: bool, part: int = 0) -> tuple[int, int, int] | None:
        return (torch.initial_seed(), self.clock.train_exp_counter, part) if seeded else None

    def _finish(self, dataset: Any) -> Finish | None:
        """What is left to the device; nothing where a data set has a `collate_fn` of its own: it gets whole items."""
        return finish_of(dataset) if self.finishes_on_device() and own_collate(dataset) is None else None

    def _items(self, dataset: Any, seeds: tuple[int, int, int] | None, finish: Finish | None) -> LoaderItems:
        return LoaderItems(dataset, seeds, finish, crops=finish is not None and resizes_on(self.device))

    def _loader(self, items: LoaderItems, **arguments: Any) -> DataLoader[Any]:
        return DataLoader(items, collate_fn=items.collate, **self._obtain_common_dataloader_parameters(**arguments))

    def _unpack_minibatch(self) -> None:
        super()._unpack_minibatch()
        self.mbatch[1] = self.mbatch[1].long()  # torch reads uint8 as a mask
        for items in _items_of(self.dataloader)[:1]:
            self.mbatch[0] = items.finished(self.mbatch[0])

    def _add_wait(self, seconds: float) -> None:
        self.data_wait_s += seconds


def _counted(make: Callable[..., Any], datasets: Any, batch_sampler: Any) -> Any:
    """Avalanche's loader of several data sets, which repeats small ones, telling apart how often an image has come."""
    return make(datasets, CountedIndices(batch_sampler))


def _items_of(loader: Any) -> list[LoaderItems]:
    """What a loader reads, as far as it is this package's."""
    held = getattr(loader, "datasets", None) or [getattr(loader, "dataset", None)]
    return [items for items in held if isinstance(items, LoaderItems)]
