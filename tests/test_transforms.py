"""The presets' numbers, against torchvision and PIL on known images."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from avalanche_fmlora.data.presets import Preset, stored_side
from avalanche_fmlora.data.transforms import make_transforms

UNIT: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return (np.asarray(coarse).astype(int) + rng.integers(-9, 10, (height, width, 3))).clip(0, 255).astype(np.uint8)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def pixels(result: torch.Tensor) -> np.ndarray:
    """What a transform with mean 0 and std 1 gives, back as 0..255."""
    return (result * 255).round().to(torch.int64).permute(1, 2, 0).numpy()


def test_evaluation_as_published_is_resize_256_and_centre_crop() -> None:
    image = photo(300, 420)
    small = Image.fromarray(image).resize((int(256 * 420 / 300), 256), Image.BICUBIC)
    want = v2.CenterCrop(224)(v2.Resize(256, interpolation=InterpolationMode.BICUBIC)(Image.fromarray(image)))
    evaluate = make_transforms("published", 224, **UNIT).eval
    assert np.array_equal(pixels(evaluate(tensor(np.asarray(small)))), np.asarray(want))  # stored at 256: cut only
    assert np.abs(pixels(evaluate(tensor(image))) - np.asarray(want).astype(int)).max() <= 1
    assert evaluate(tensor(image)).dtype == torch.float32


def test_a_small_image_is_enlarged_by_the_transform_as_pil_would() -> None:
    image = photo(32, 32)
    want = v2.CenterCrop(224)(Image.fromarray(image).resize((256, 256), Image.BICUBIC))
    got = pixels(make_transforms("published", 224, **UNIT).eval(tensor(image)))
    assert np.abs(got - np.asarray(want).astype(int)).max() <= 1


@pytest.mark.parametrize(("preset", "scale"), [("published", (0.05, 1.0)), ("simple", (0.7, 1.0))])
def test_training_draws_as_torchvision_does(preset: str, scale: tuple[float, float]) -> None:
    image = tensor(photo(256, 341))
    crop, flip = v2.RandomResizedCrop(224, scale=scale, ratio=(3 / 4, 4 / 3)), v2.RandomHorizontalFlip(0.5)
    train = make_transforms(preset, 224, **UNIT).train
    for seed in range(5):
        torch.manual_seed(seed)
        want = flip(crop(image))
        torch.manual_seed(seed)
        assert np.array_equal(pixels(train(image)), want.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("preset", "smallest"), [("published", 0.05), ("simple", 0.7), ("crop_flip", 0.5)])
def test_areas_of_training_crops(preset: str, smallest: float) -> None:
    """On a ramp, the range of values that a crop shows says how much of the width and height it took."""
    side = 128
    ramp = np.linspace(0, 255, side).astype(np.uint8)
    image = tensor(np.stack([np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), np.zeros((side, side))], -1))
    train = make_transforms(preset, stored_side(preset, 112) if preset == "crop_flip" else 112, **UNIT).train
    torch.manual_seed(0)
    areas, ratios = [], []
    for _ in range(300):
        out = pixels(train(image.to(torch.uint8)))
        width, height = (np.ptp(out[..., c]) / 255 for c in (0, 1))
        areas.append(width * height)
        ratios.append(width / height)
    assert smallest - 0.04 <= min(areas) <= smallest + 0.1
    assert max(areas) > 0.9
    assert 0.68 < min(ratios) < 0.85
    assert 1.15 < max(ratios) < 1.45


def test_flip_none_and_resize() -> None:
    image = tensor(photo(40, 60))
    for preset in ("none", "flip"):
        both = make_transforms(preset, 32, **UNIT)
        plain = pixels(both.eval(image))
        assert np.array_equal(plain[:, ::-1], pixels(both.eval(image.flip(-1))))
        seen = {pixels(both.train(image)).tobytes() for _ in range(20)}
        flips = {plain.tobytes(), plain[:, ::-1].copy().tobytes()}
        assert seen == (flips if preset == "flip" else {plain.tobytes()})
    whole = pixels(make_transforms("resize", 32, **UNIT).eval(image))
    want = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 32), Image.BICUBIC)
    assert np.abs(whole - np.asarray(want).astype(int)).max() <= 1


@pytest.mark.parametrize("preset", get_args(Preset))
def test_a_square_of_the_stored_side_is_not_resampled_for_test(preset: str) -> None:
    side = stored_side(preset, 56)
    image = photo(side, side)
    result = make_transforms(preset, 56, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)).eval(tensor(image))
    if preset == "resize":
        assert result.shape == (3, 56, 56)
        return
    cut = (side - 56) // 2
    want = (image[cut : cut + 56, cut : cut + 56] / np.float32(255) - (0.5, 0.4, 0.3)) / (0.1, 0.2, 0.3)
    np.testing.assert_allclose(result.permute(1, 2, 0), want, atol=1e-5)
    assert result.is_contiguous()


@pytest.mark.parametrize(("size", "side"), [(224, 256), (384, 438), (112, 128), (32, 36)])
def test_the_stored_side_is_256_to_224(size: int, side: int) -> None:
    assert stored_side("published", size) == stored_side("simple", size) == stored_side("resize", size) == side
    assert stored_side("flip", size) == size


def test_facts_for_the_record_name_the_numbers() -> None:
    facts = make_transforms("published", 224, **UNIT).facts()
    assert facts["augment"] == "published"
    for said in ("scale 0.05 to 1", "256 px", "224 px", "horizontal flip"):
        assert said in facts["transforms"]


def test_wrong_names_and_sizes_are_said() -> None:
    with pytest.raises(ValueError, match=r"`augment` to be one of .*'published'.* but got 'mirror'"):
        make_transforms("mirror", 224, **UNIT)
    with pytest.raises(ValueError, match=r"positive whole number of pixels but got 0"):
        make_transforms("published", 0, **UNIT)
