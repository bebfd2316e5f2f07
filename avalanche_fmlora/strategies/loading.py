"""How strategies read their data: the same batches with any number of workers, pixels finished on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from avalanche.benchmarks.utils.data_loader import MultiDatasetDataLoader
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor
from torch.utils.data import DataLoader

from avalanche_fmlora.data.loading import LoaderItems, TimedLoader, finish_of
from avalanche_fmlora.data.transforms import Finish


class DataLoading(SupervisedTemplate):
    """Avalanche's template, its loaders and those of its plugins reading :class:`LoaderItems`.

    Attributes:
        data_wait_s: seconds that training has waited for batches so far.
    """

    dataloader: Any
    data_wait_s: float = 0.0
    _num_workers: int = 0

    def finishes_on_device(self) -> bool:
        """Whether pixels become float on the device, a batch at a time, instead of in the loader."""
        return bool(self.device.type != "cpu")

    def make_train_dataloader(self, num_workers: int = 0, **kwargs: Any) -> None:
        """Arguments as in Avalanche, passed to ``train``."""
        self._num_workers = num_workers
        super().make_train_dataloader(num_workers=num_workers, **kwargs)
        made: Any = self.dataloader
        if isinstance(made, DataLoader):  # its data set can't be replaced, so it is made anew
            arguments = {"num_workers": num_workers, "shuffle": True, "batch_size": self.train_mb_size, **kwargs}
            arguments.pop("ffcv_args", None)
            items = LoaderItems(self.adapted_dataset, self._seeds(True), self._finish(self.adapted_dataset))
            self.dataloader = self._loader(items, **arguments)

    def make_eval_dataloader(self, **kwargs: Any) -> None:
        """Arguments as in Avalanche, passed to ``eval``."""
        super().make_eval_dataloader(**kwargs)
        self._wrap(seeded=False)

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

    def batches(self, dataset: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of a data set on the device, in order, for a pass during training."""
        items = LoaderItems(dataset, finish=self._finish(dataset))
        # A generator of its own: a pass draws nothing from the global one, so that training's batches stay as they are.
        own = torch.Generator()
        loader = self._loader(items, batch_size=self.eval_mb_size, num_workers=self._num_workers, generator=own)
        for images, labels, *_ in TimedLoader(loader, self._add_wait):
            yield items.finished(images.to(self.device)), labels.to(self.device)

    def _wrap(self, *, seeded: bool) -> None:
        """In place, since Avalanche's loaders make torch's anew each epoch from the data sets they hold."""
        loader = self.dataloader
        if isinstance(loader, MultiDatasetDataLoader) and not _items_of(loader):
            finish = self._finish(loader.datasets[0])
            loader.datasets = [LoaderItems(d, self._seeds(seeded, i), finish) for i, d in enumerate(loader.datasets)]
            loader.loader_kwargs["collate_fn"] = loader.datasets[0].collate

    def _seeds(self, seeded: bool, part: int = 0) -> tuple[int, int, int] | None:
        return (torch.initial_seed(), self.clock.train_exp_counter, part) if seeded else None

    def _finish(self, dataset: Any) -> Finish | None:
        return finish_of(dataset) if self.finishes_on_device() else None

    def _loader(self, items: LoaderItems, **arguments: Any) -> DataLoader[Any]:
        return DataLoader(items, collate_fn=items.collate, **self._obtain_common_dataloader_parameters(**arguments))

    def _unpack_minibatch(self) -> None:
        super()._unpack_minibatch()
        for items in _items_of(self.dataloader)[:1]:
            self.mbatch[0] = items.finished(self.mbatch[0])

    def _add_wait(self, seconds: float) -> None:
        self.data_wait_s += seconds


def _items_of(loader: Any) -> list[LoaderItems]:
    """What a loader reads, as far as it is this package's."""
    held = getattr(loader, "datasets", None) or [getattr(loader, "dataset", None)]
    return [items for items in held if isinstance(items, LoaderItems)]
