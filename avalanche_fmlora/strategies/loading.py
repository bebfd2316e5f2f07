"""How strategies read their data: the same batches with any number of workers, pixels finished on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor
from torch.utils.data import DataLoader

from avalanche_fmlora.data.loading import LoaderItems, TimedLoader, finish_of


class DataLoading(SupervisedTemplate):
    """Avalanche's template with this package's data loaders.

    Benchmarks with task labels, and loaders that plugins put in place of these, are read as Avalanche reads them.

    Attributes:
        data_wait_s: seconds that training has waited for batches so far.
    """

    data_wait_s: float = 0.0
    _num_workers: int = 0

    def finishes_on_device(self) -> bool:
        """Whether pixels become float on the device, a batch at a time, instead of in the loader."""
        return bool(self.device.type != "cpu")

    def make_train_dataloader(
        self,
        num_workers: int = 0,
        shuffle: bool = True,
        pin_memory: bool | None = None,
        persistent_workers: bool = False,
        drop_last: bool = False,
        **kwargs: Any,
    ) -> None:
        """Arguments as in Avalanche, passed to ``train``."""
        given: dict[str, Any] = {"num_workers": num_workers, "shuffle": shuffle, "pin_memory": pin_memory}
        given |= {"persistent_workers": persistent_workers, "drop_last": drop_last}
        self._num_workers = num_workers
        if hasattr(self.experience, "task_labels"):
            super().make_train_dataloader(**given, **kwargs)
            return
        seeds = (torch.initial_seed(), self.clock.train_exp_counter)
        self.dataloader = self._loader(LoaderItems(self.adapted_dataset, seeds), batch_size=self.train_mb_size, **given)

    def make_eval_dataloader(self, num_workers: int = 0, **kwargs: Any) -> None:
        """Arguments as in Avalanche, passed to ``eval``."""
        super().make_eval_dataloader(num_workers=num_workers, **kwargs)
        if self.finishes_on_device():
            items = LoaderItems(self.adapted_dataset)
            self.dataloader = self._loader(items, batch_size=self.eval_mb_size, num_workers=num_workers, **kwargs)

    def training_epoch(self, **kwargs: Any) -> None:
        """Avalanche's epoch, with a clock at the loader."""
        untimed = self.dataloader
        items = getattr(untimed, "dataset", None)
        if isinstance(items, LoaderItems):
            items.epoch.fill_(self.clock.train_exp_epochs)
        self.dataloader = cast(Any, TimedLoader(untimed, self._add_wait))
        try:
            super().training_epoch(**kwargs)
        finally:
            self.dataloader = untimed

    def batches(self, dataset: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of a data set on the device, in order, for a pass during training."""
        loader = self._loader(LoaderItems(dataset), batch_size=self.eval_mb_size, num_workers=self._num_workers)
        for images, labels, *_ in TimedLoader(loader, self._add_wait):
            yield _finished(images.to(self.device), loader.dataset), labels.to(self.device)

    def _loader(self, items: LoaderItems, **arguments: Any) -> DataLoader[Any]:
        if self.finishes_on_device():
            items.finish = finish_of(items.dataset)
        return DataLoader(items, collate_fn=items.collate, **self._obtain_common_dataloader_parameters(**arguments))

    def _unpack_minibatch(self) -> None:
        super()._unpack_minibatch()
        self.mbatch[0] = _finished(self.mbatch[0], getattr(self.dataloader, "dataset", None))

    def _add_wait(self, seconds: float) -> None:
        self.data_wait_s += seconds


def _finished(images: Tensor, items: Any) -> Tensor:
    raw = isinstance(items, LoaderItems) and items.finish is not None and images.dtype == torch.uint8
    return items.finish(images) if raw else images
