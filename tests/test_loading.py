"""What a loader gives: the same draws with any number of workers, pixels finished on the device, waiting measured."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import ReplayPlugin
from torch.utils.data import ConcatDataset, DataLoader

from avalanche_fmlora.data.base import Domain, ImageSet, class_incremental, domain_incremental
from avalanche_fmlora.data.device_transforms import Crops
from avalanche_fmlora.data.loading import CountedIndices, LoaderItems, TimedLoader, finish_of
from avalanche_fmlora.data.transforms import Finish, make_transforms

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def benchmark(preset: str = "published", domains: bool = False) -> Any:
    """Two experiences of 12 images: with task labels inside Avalanche if classes are split, without if domains are."""
    images = np.random.default_rng(0).integers(0, 256, (24, 20, 26, 3), dtype=np.uint8)
    data = ImageSet(images, np.arange(24) % 4)
    transforms = make_transforms(preset, 16, MEAN, STD)
    if domains:
        halves = [ImageSet(images[i : i + 12], data.labels[i : i + 12]) for i in (0, 12)]
        parts = [Domain(name, half, half) for name, half in zip("xy", halves, strict=True)]
        return domain_incremental("noise", parts, list("abcd"), transforms=transforms)
    return class_incremental("noise", data, data, list("abcd"), n_experiences=2, transforms=transforms)


def batches(items: LoaderItems, **options: Any) -> list[torch.Tensor]:
    return [batch[0] for batch in DataLoader(items, batch_size=5, collate_fn=items.collate, **options)]


def test_plain_items_are_normalised_floats_whatever_a_loader_did() -> None:
    dataset = benchmark().train_stream[0].dataset
    items = LoaderItems(dataset, finish=finish_of(dataset))
    assert items[0][0].dtype == torch.uint8
    image, label, *_ = dataset[0]
    assert (image.dtype, image.shape, label) == (torch.float32, (3, 16, 16), 0)
    test = benchmark().test_stream[0].dataset[0][0]
    assert test.min() < -0.5


def test_batches_do_not_depend_on_workers_nor_on_what_was_drawn_before() -> None:
    dataset = benchmark().train_stream[0].dataset
    items = LoaderItems(dataset, seeds=(7, 0))
    want = batches(items)
    torch.manual_seed(3)
    torch.rand(5)
    before = torch.get_rng_state()
    items[3]
    assert torch.equal(torch.get_rng_state(), before)
    for got, expected in zip(batches(items, num_workers=2), want, strict=True):
        assert torch.equal(got, expected)


def test_draws_change_with_epoch_experience_seed_and_item() -> None:
    images = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 20, 26, 3), dtype=np.uint8), 4, axis=0)
    data = ImageSet(images, np.array([0, 0, 1, 1]))
    transforms = make_transforms("published", 16, MEAN, STD)
    one = class_incremental("same", data, data, list("ab"), n_experiences=1, transforms=transforms)
    dataset = one.train_stream[0].dataset
    views = []
    for seeds in ((0, 0), (1, 0), (0, 1)):
        items = LoaderItems(dataset, seeds=seeds)
        for epoch in range(2):
            items.epoch.fill_(epoch)
            views += [items[i][0] for i in range(4)]
    assert len({view.numpy().tobytes() for view in views}) == len(views) == 24


def test_workers_that_outlive_an_epoch_see_the_next_one() -> None:
    items = LoaderItems(benchmark().train_stream[0].dataset, seeds=(0, 0))
    loader = DataLoader(items, batch_size=12, num_workers=1, persistent_workers=True, collate_fn=items.collate)
    first = next(iter(loader))[0]
    items.epoch.fill_(1)
    second = next(iter(loader))[0]
    assert torch.equal(second, batches(items)[0].new_tensor(np.stack([items[i][0] for i in range(12)])))
    assert not torch.equal(first, second)


def test_finished_on_the_device_is_finished_in_the_loader() -> None:
    dataset = benchmark().train_stream[0].dataset
    finish = finish_of(dataset)
    assert finish == Finish(MEAN, STD)
    raw = batches(LoaderItems(dataset, seeds=(0, 0), finish=finish))
    done = batches(LoaderItems(dataset, seeds=(0, 0)))
    assert {batch.dtype for batch in raw} == {torch.uint8}
    for left, ready in zip(raw, done, strict=True):
        assert torch.equal(finish(left), ready)


def test_other_data_in_the_batch_keep_it_float() -> None:
    """Items of another normalisation, or of other data, are never normalised a second time."""
    ours = benchmark().train_stream[0].dataset
    theirs = [(torch.full((3, 16, 16), 0.25), 1)]
    items = LoaderItems([*(ours[i] for i in range(0)), *theirs], finish=Finish(MEAN, STD))
    assert finish_of(theirs) is None
    mixed = items.collate([items[0], (torch.full((3, 16, 16), 255, dtype=torch.uint8), 0)])
    assert torch.equal(mixed[0][0], theirs[0][0])
    torch.testing.assert_close(mixed[0][1][:, 0, 0], (1 - torch.tensor(MEAN)) / torch.tensor(STD))
    other = LoaderItems(ours, finish=Finish((0.0,) * 3, (1.0,) * 3))
    assert other[0][0].dtype == torch.float32


class Seen:
    """Notes the images of each training forward pass, and the types of images that the loaders delivered."""

    def __init__(self, strategy: Any) -> None:
        self.images: list[torch.Tensor] = []
        self.delivered: set[type] = set()
        forward = strategy.forward

        def noted() -> Any:
            if strategy.is_training:
                self.images.append(strategy.mb_x.clone())
            return forward()

        unpack = strategy._unpack_minibatch

        def noted_unpack() -> None:
            self.delivered.add(type(strategy.mbatch[0]))
            unpack()

        strategy.forward, strategy._unpack_minibatch = noted, noted_unpack


def train(
    make_strategy: Any, make_vit: Any, preset: str = "published", domains: bool = False, **options: Any
) -> tuple[Any, Seen]:
    torch.manual_seed(11)
    strategy = make_strategy("seq_lora", make_vit(), train_epochs=2, train_mb_size=5, seed=0)
    if options.pop("on_device", False):
        strategy.finishes_on_device = lambda: True
    seen = Seen(strategy)
    data = benchmark(preset, domains)
    for experience in data.train_stream:
        strategy.train(experience, **options)
    strategy.eval(data.test_stream)
    return strategy, seen


@pytest.mark.parametrize(("preset", "domains"), [("published", False), ("published", True), ("none", False)])
def test_a_strategy_trains_on_the_same_batches_with_workers(
    make_strategy: Any, make_vit: Any, preset: str, domains: bool
) -> None:
    (alone, want), (helped, got) = (train(make_strategy, make_vit, preset, domains, num_workers=n) for n in (0, 2))
    assert len(want.images) == 2 * 2 * 3
    for one, other in zip(want.images, got.images, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(alone.model.head.rows, helped.model.head.rows)


def test_epochs_and_experiences_differ_in_their_draws(make_strategy: Any, make_vit: Any) -> None:
    _, seen = train(make_strategy, make_vit)
    views = torch.cat(seen.images)
    assert len({view.numpy().tobytes() for view in views}) == len(views) == 48


@pytest.mark.parametrize("domains", [False, True])
def test_a_strategy_that_finishes_on_the_device_learns_the_same(
    make_strategy: Any, make_vit: Any, domains: bool
) -> None:
    (alone, want), (there, got) = (
        train(make_strategy, make_vit, domains=domains, on_device=on) for on in (False, True)
    )
    assert (want.delivered, got.delivered) == ({torch.Tensor}, {Crops})
    after = torch.get_rng_state()
    for one, other in zip(want.images, got.images, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)
    assert torch.equal(alone.model.head.rows, there.model.head.rows)
    accuracies = [s.evaluator.get_last_metrics() for s in (alone, there)]
    assert accuracies[0] == accuracies[1]
    train(make_strategy, make_vit, domains=domains)
    assert torch.equal(torch.get_rng_state(), after)  # neither way draws more than the other


def test_waiting_is_measured_at_the_loader_only() -> None:
    class Slow:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            for i in range(3):
                time.sleep(0.03)
                yield i

    waits: list[float] = []
    timed = TimedLoader(Slow(), waits.append)
    assert len(timed) == 3
    for _ in timed:
        time.sleep(0.3)  # what is done with a batch is not waited for, on a busy machine either
    assert 0.09 <= sum(waits) < 0.6
    assert len(waits) == 4


def test_a_slow_transform_shows_in_the_strategys_waiting(make_strategy: Any, make_vit: Any) -> None:
    def slow(image: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return image

    images = np.zeros((8, 16, 16, 3), dtype=np.uint8)
    data = ImageSet(images, np.arange(8) % 2)
    lazy = class_incremental("slow", data, data, list("ab"), n_experiences=1, augment=[slow])
    strategy = make_strategy("linear_probe", make_vit(), train_epochs=3, train_mb_size=4)
    start = time.perf_counter()
    strategy.train(lazy.train_stream[0])
    assert 0.24 <= strategy.data_wait_s <= time.perf_counter() - start


def test_images_are_read_with_one_thread_and_trained_on_with_all() -> None:
    reading: list[int] = []
    seen: list[tuple[int, int]] = []

    def images() -> Iterator[int]:
        for number in range(2):
            reading.append(torch.get_num_threads())
            yield number
        raise OSError("the image is damaged")

    def consume() -> None:
        for number in TimedLoader(images(), lambda seconds: None):
            seen.append((number, torch.get_num_threads()))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(OSError, match="damaged"):
            consume()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [(0, 2), (1, 2)]
    assert reading == [1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_comes_again_in_an_epoch_is_drawn_anew(workers: int) -> None:
    """As replay repeats its few images; whichever worker reads it first."""
    items = LoaderItems(benchmark().train_stream[0].dataset, seeds=(0, 0))
    order = [[0, 1, 0], [2, 0], [1, 2], [0, 3]]
    loader = DataLoader(
        ConcatDataset([items, items]),
        batch_sampler=CountedIndices([[i + len(items) for i in batch] for batch in order]),
        collate_fn=items.collate,
        num_workers=workers,
    )
    seen = torch.cat([batch[0] for batch in loader])
    assert len({view.numpy().tobytes() for view in seen}) == len(seen) == 9
    assert torch.equal(seen[1], items[1][0]), "the first time it is as in a loader without repeats"
    assert torch.equal(torch.cat([batch[0] for batch in loader]), seen)


def test_replayed_images_are_drawn_anew(make_strategy: Any) -> None:
    views: list[bytes] = []

    class Watch(SupervisedPlugin):
        def before_forward(self, strategy: Any, **kwargs: Any) -> None:
            if strategy.experience.current_experience == 1:
                views.extend(image.numpy().tobytes() for image in strategy.mb_x)

    stream = benchmark().train_stream
    strategy = make_strategy("seq_lora", train_epochs=1, plugins=[ReplayPlugin(mem_size=2), Watch()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for experience in stream:
            strategy.train(experience)
    assert len(views) > len(stream[1].dataset) + 2, "the memory's two images come again and again"
    assert len(set(views)) == len(views)
