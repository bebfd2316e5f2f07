"""A strategy that leaves resizing to the device learns what one learns that does not, to the bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from avalanche.training.plugins import ReplayPlugin
from PIL import Image
from torchvision.transforms import v2

from avalanche_fmlora.data import device_transforms
from avalanche_fmlora.data.base import ImageSet, class_incremental
from avalanche_fmlora.data.device_transforms import Crops, resizes_on
from avalanche_fmlora.data.presets import Preset, stored_side
from avalanche_fmlora.data.store import stored_images
from avalanche_fmlora.data.transforms import make_transforms
from avalanche_fmlora.strategies import loading as strategy_loading

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
SHAPES = [(18, 18), (18, 27), (40, 18), (16, 16), (9, 12), (18, 90), (60, 80)]


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Stored images of several shapes: 24 of 4 classes."""

    def encoded(row: int) -> bytes:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(row).integers(0, 256, (*SHAPES[row % len(SHAPES)], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    folder: Path = tmp_path_factory.mktemp("stored")
    names = [f"{row}.png" for row in range(24)]
    stored = stored_images("0", names, encoded, stored_side("published", 16), title="noise", cache_dir=folder)
    assert len({tuple(shape) for shape in stored.shapes.tolist()}) > 3
    return ImageSet(stored, np.arange(24) % 4)


def trained(make_strategy: Any, data: ImageSet, transforms: Any, on_device: bool, **options: Any) -> tuple[Any, Any]:
    """The trained model's state and what the loaders delivered."""
    torch.manual_seed(3)
    workers = options.pop("num_workers", 0)
    benchmark = class_incremental("noise", data, data, list("abcd"), n_experiences=2, transforms=transforms)
    strategy = make_strategy("fm_lora", train_epochs=2, train_mb_size=5, seed=0, **options)
    strategy.finishes_on_device = lambda: on_device
    delivered: list[type] = []
    unpack = strategy._unpack_minibatch

    def noted() -> None:
        delivered.append(type(strategy.mbatch[0]))
        unpack()

    strategy._unpack_minibatch = noted
    for experience in benchmark.train_stream:
        strategy.train(experience, num_workers=workers)
    strategy.eval(benchmark.test_stream)
    return strategy.model.state_dict(), set(delivered)


def assert_same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("preset", get_args(Preset))
def test_a_strategy_learns_the_same_to_the_bit(make_strategy: Any, ragged: ImageSet, preset: str) -> None:
    transforms = make_transforms(preset, 16, MEAN, STD)
    (want, plain), (got, left) = (trained(make_strategy, ragged, transforms, on) for on in (False, True))
    assert (plain, left) == ({torch.Tensor}, {Crops})
    assert_same(want, got)


def test_with_workers_and_with_replay_too(make_strategy: Any, ragged: ImageSet) -> None:
    transforms = make_transforms("published", 16, MEAN, STD)

    def run(on_device: bool, workers: int) -> tuple[Any, Any]:
        plugins = [ReplayPlugin(mem_size=6)]
        return trained(make_strategy, ragged, transforms, on_device, num_workers=workers, plugins=plugins)

    (want, _), (got, left), (helped, _) = run(False, 0), run(True, 0), run(True, 2)
    assert left == {Crops}
    assert_same(want, got)
    assert_same(want, helped)


def centre_of_16(image: torch.Tensor) -> torch.Tensor:
    return v2.functional.center_crop(image, [16, 16])


def test_transforms_of_the_users_own_come_as_they_did(make_strategy: Any, ragged: ImageSet) -> None:
    transforms = make_transforms("published", 16, MEAN, STD).replaced(centre_of_16, None)
    (want, _), (got, left) = (trained(make_strategy, ragged, transforms, on) for on in (False, True))
    assert left == {torch.Tensor, Crops}  # in training, in evaluation
    assert_same(want, got)


def test_a_device_that_cannot_resize_gets_resized_pixels(
    make_strategy: Any, ragged: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any, **options: Any) -> Any:
        raise NotImplementedError("aten::_upsample_bicubic2d_aa.out is not implemented for the MPS device")

    assert resizes_on(torch.device("cpu"))
    with monkeypatch.context() as patched:
        patched.setattr(device_transforms.v2.functional, "resize", missing)
        assert not resizes_on(torch.device("cpu"))
    monkeypatch.setattr(strategy_loading, "resizes_on", lambda device: False)
    transforms = make_transforms("published", 16, MEAN, STD)
    (want, _), (got, left) = (trained(make_strategy, ragged, transforms, on) for on in (False, True))
    assert left == {torch.Tensor}
    assert_same(want, got)
