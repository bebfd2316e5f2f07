"""What a loader leaves to the device: to the bit what the transforms do item by item, and nothing that waits for it."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision.transforms import v2

from avalanche_fmlora.data.device_transforms import Crop, Crops, Cut, Resize, planned
from avalanche_fmlora.data.loading import LoaderItems, finish_of
from avalanche_fmlora.data.presets import Preset, stored_side
from avalanche_fmlora.data.transforms import Finish, ImageTransform, make_transforms

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
SIZE = 28
SHAPES = [(32, 32), (32, 32), (32, 47), (51, 32), (28, 28), (28, 33), (9, 12), (12, 9), (32, 200), (60, 80), (60, 80)]


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 [3, height, width], a view of [height, width, 3] as the data sets give it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)


class Transformed(Dataset[Any]):
    """Images of the shapes above, transformed when they are read."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform
        self.images = [noise(*shape, seed) for seed, shape in enumerate(SHAPES)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), index


def batches(items: LoaderItems, batch_size: int = 4, **options: Any) -> tuple[list[torch.Tensor], set[type]]:
    """Finished images, and the types that were delivered."""
    loaded = list(DataLoader(items, batch_size=batch_size, collate_fn=items.collate, **options))
    assert torch.cat([labels for _, labels in loaded]).tolist() == list(range(len(items)))
    return [items.finished(images) for images, _ in loaded], {type(images) for images, _ in loaded}


def transform_of(preset: str, which: str) -> ImageTransform:
    transform: ImageTransform = getattr(make_transforms(preset, SIZE, MEAN, STD), which)
    return transform


@pytest.mark.parametrize("which", ["train", "eval"])
@pytest.mark.parametrize("preset", get_args(Preset))
def test_a_batch_is_that_of_the_item_by_item_path_to_the_bit(preset: str, which: str) -> None:
    data = Transformed(transform_of(preset, which))
    for epoch in range(3):
        plain, left = LoaderItems(data, (0, 1)), LoaderItems(data, (0, 1), finish_of(data), crops=True)
        plain.epoch.fill_(epoch)
        left.epoch.fill_(epoch)
        (want, _), (got, delivered) = batches(plain), batches(left)
        assert delivered == {Crops}
        for one, other in zip(want, got, strict=True):
            assert (other.dtype, other.stride()) == (torch.float32, one.stride())
            assert torch.equal(one, other)


@pytest.mark.parametrize("preset", ["published", "crop_flip"])
def test_workers_pack_the_same_batches(preset: str) -> None:
    data = Transformed(transform_of(preset, "train"))
    plain, left = LoaderItems(data, (0, 1)), LoaderItems(data, (0, 1), finish_of(data), crops=True)
    (want, _), *others = batches(plain), *(batches(left, num_workers=n) for n in (1, 2))
    for got, delivered in others:
        assert delivered == {Crops}
        assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))


@pytest.mark.parametrize("preset", get_args(Preset))
def test_a_plan_draws_what_the_transform_draws(preset: str) -> None:
    transform = transform_of(preset, "train")
    for seed, shape in enumerate(SHAPES):
        image = noise(*shape)
        torch.manual_seed(seed)
        want = transform.shaped(image)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        crop = planned(transform.geometry, image)
        assert crop is not None
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(Crops.packed([crop]).finished()[0], want)


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_a_plan_flips_as_often_as_the_transform(probability: float) -> None:
    flip, image = v2.RandomHorizontalFlip(probability), noise(4, 5)
    for seed in range(30):
        torch.manual_seed(seed)
        want = flip(image)
        torch.manual_seed(seed)
        crop = planned([flip], image)
        assert crop is not None
        assert torch.equal(Crops.packed([crop]).finished()[0], want)


def test_a_stored_image_is_cut_on_the_host_and_resized_once_on_the_device() -> None:
    side = stored_side("published", SIZE)
    image = noise(side, side + 9)
    torch.manual_seed(0)
    train = planned(transform_of("published", "train").geometry, image)
    test = planned(transform_of("published", "eval").geometry, image)
    assert train is not None
    assert test is not None
    assert [type(step) for step in train.steps] == [Resize]
    assert train.pixels.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()  # a slice, no copy
    assert (train.pixels.shape[1] < side, test.steps, test.pixels.shape) == (True, (), (3, SIZE, SIZE))
    packed = Crops.packed([train, test])
    assert packed.pixels.numel() == train.pixels.numel() + test.pixels.numel() < 2 * image.numel()


@pytest.mark.parametrize(("shape", "size"), [((9, 8), (4, 5)), ((4, 5), (9, 8)), ((3, 20), (8, 7)), ((7, 7), (7, 2))])
def test_a_centre_crop_starts_where_torchvisions_does(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image, centre = noise(*shape), v2.CenterCrop(size)
    crop = planned([centre], image)
    assert crop is not None
    assert torch.equal(crop.pixels, centre(image))


class Mirror(v2.RandomHorizontalFlip):
    """A transform that we know nothing about."""


@pytest.mark.parametrize(
    "geometry",
    [
        [],
        [lambda image: image],
        [Mirror()],
        [v2.RandomHorizontalFlip(), v2.CenterCrop(8)],
        [v2.RandomResizedCrop(8), v2.ColorJitter(0.5)],
        [v2.Resize(8, max_size=9)],
        [v2.Compose([v2.CenterCrop(8)])],
    ],
)
def test_other_transforms_give_their_pixels_as_they_did(geometry: list[Any]) -> None:
    before = torch.get_rng_state()
    assert planned(geometry, noise(12, 12)) is None
    assert torch.equal(torch.get_rng_state(), before)
    data = [(ImageTransform([*geometry, v2.Resize((8, 8))], MEAN, STD), noise(12, 12))]

    class Own(Dataset[Any]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return data[0][0](data[0][1]), index

    plain = LoaderItems(Own(), (5,))
    left = LoaderItems(Own(), (5,), finish_of(Own()), crops=True)
    (want, _), (got, delivered) = batches(plain), batches(left)
    assert delivered == ({torch.Tensor} if geometry else {Crops})
    assert torch.equal(want[0], got[0])


def test_crops_uint8_and_float_images_share_a_batch() -> None:
    finish = Finish(MEAN, STD)
    items = LoaderItems([], finish=finish, crops=True)
    crop, image = Crop(noise(9, 7), (Resize(8, 8, "bilinear", True),), flip=True), noise(8, 8, seed=1)
    pixels = v2.functional.resize(crop.pixels, [8, 8]).flip(-1)
    both = items.collate([(crop, 0), (image, 1)])[0]
    assert isinstance(both, Crops)
    want = torch.stack([finish(pixels), finish(image)])
    assert torch.equal(items.finished(both), want)
    mixed, labels = items.collate([(crop, 0), (image, 1), (torch.zeros(3, 8, 8), 2)])
    assert torch.equal(mixed, torch.cat([want, torch.zeros(1, 3, 8, 8)]))
    assert labels.tolist() == [0, 1, 2]
    assert items.finished(mixed) is mixed


def test_transforms_after_ours_get_whole_images() -> None:
    data = Transformed(transform_of("published", "train"))

    class Brighter(Transformed):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            image, label = super().__getitem__(index)
            return image + 1, label

    assert finish_of(data) == Finish(MEAN, STD)
    assert finish_of(Brighter(data.transform)) is None
    assert finish_of([]) is None


class HostCopies(TorchDispatchMode):
    """Counts what is copied from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        self.count += isinstance(result, torch.Tensor) and result.is_meta and any(not t.is_meta for t in tensors)
        return result


def test_nothing_waits_for_the_device() -> None:
    """On torch's meta device, reading a value is an error; and but for the batch itself nothing is moved."""
    data = Transformed(transform_of("crop_flip", "train"))
    items = LoaderItems(data, (0,), finish_of(data), crops=True)
    crops = items.collate([items[i] for i in range(len(data))])[0]
    with HostCopies() as copies:
        there = items.finished(crops.to("meta", non_blocking=True))
    assert (there.shape, there.dtype, there.device.type) == ((len(data), 3, SIZE, SIZE), torch.float32, "meta")
    assert copies.count == 2
    with pytest.raises(RuntimeError, match="meta"):
        there.sum().item()


def test_a_loader_pins_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    crops = Crops.packed([Crop(noise(4, 5)), Crop(noise(4, 5), (Cut(0, 0, 4, 5),))])
    copied = pin_memory([crops, torch.zeros(2)])[0]
    assert isinstance(copied, Crops)
    assert (len(copied), copied.runs, len(pinned)) == (2, crops.runs, 3)
    assert pinned[0] is crops.pixels
    assert pinned[1] is crops.flips
