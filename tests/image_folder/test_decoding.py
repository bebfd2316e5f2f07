"""image_folder: formats, modes, orientation, resizing, and images that are cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import class_files, encoded, save, write
from PIL import Image, ImageFile
from torchvision.transforms.v2 import functional

from avalanche_fmlora.data.decode import _warn_once, decode_image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_formats(kind: str) -> None:
    pixels = decode_image(encoded(kind=kind), 4)
    assert pixels.shape == (4, 4, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - [200, 100, 50]).max() <= 4


def test_modes_become_rgb() -> None:
    def pixel(image: Image.Image, kind: str = "PNG", **options: Any) -> list[int]:
        return [int(v) for v in decode_image(save(image, kind, **options), 1)[0, 0]]

    assert pixel(Image.new("RGBA", (2, 2), (200, 0, 0, 0))) == [255, 255, 255]
    assert pixel(Image.new("RGBA", (2, 2), (100, 0, 0, 51))) == [224, 204, 204]
    assert pixel(Image.new("LA", (2, 2), (0, 0))) == [255, 255, 255]
    assert pixel(Image.new("L", (2, 2), 7)) == [7, 7, 7]
    assert pixel(Image.new("1", (2, 2), 1)) == [255, 255, 255]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(palette) == [10, 20, 30]
    assert pixel(palette, transparency=1) == [255, 255, 255]
    assert pixel(Image.fromarray(np.full((2, 2), 257 * 77, np.uint16))) == [77, 77, 77]
    assert pixel(Image.fromarray(np.full((2, 2), 257 * 77, np.int32)), "TIFF") == [77, 77, 77]
    assert pixel(Image.new("I;16", (2, 2), 0)) == [0, 0, 0]
    for kind, dtype in (("TIFF", np.int32), ("TIFF", np.uint16), ("PNG", np.uint16)):
        with pytest.raises(ValueError, match="pixels up to 255 may mean 8 bits or a dark image: save it with 8"):
            pixel(Image.fromarray(np.full((2, 2), 77, dtype)), kind)
    assert pixel(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF") == [255, 0, 0]
    with pytest.raises(ValueError, match="floating-point"):
        pixel(Image.new("F", (2, 2), 0.5), "TIFF")
    with pytest.raises(ValueError, match="exceed"):
        pixel(Image.new("I", (2, 2), 70_000), "TIFF")


def test_images_of_twelve_bits_in_sixteen_are_named_once(caplog: Any) -> None:
    _warn_once.cache_clear()
    for value in (4000, 3999, 40_000):
        decode_image(save(Image.fromarray(np.full((2, 2), value, np.uint16)), "PNG"), 1)
    (record,) = caplog.records
    assert "none above 4095: if its camera has 12 bits, it is nearly black" in record.getMessage()


def test_first_frame_of_a_gif() -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 0, 255))]
    assert decode_image(save(frames[0], "GIF", save_all=True, append_images=frames[1:]), 2)[0, 0].tolist() == [
        255,
        0,
        0,
    ]


def test_orientation_is_applied() -> None:
    image = Image.fromarray(np.repeat(np.array([[[255] * 3], [[0] * 3]], np.uint8), 2, 1))
    exif = Image.Exif()
    exif[0x0112] = 3
    assert decode_image(save(image), 2)[:, 0, 0].tolist() == [255, 0]
    assert decode_image(save(image, exif=exif), 2)[:, 0, 0].tolist() == [0, 255]


def test_ghostscript_is_never_started() -> None:
    with pytest.raises(OSError, match="cannot identify"):
        decode_image(save(Image.new("RGB", (4, 4)), "EPS"), 2)


@pytest.mark.parametrize("size", [(40, 25), (25, 40), (9, 7), (31, 31), (16, 16)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_same_pixels_as_torchvisions_resize_and_crop(size: tuple[int, int], interpolation: str) -> None:
    noise = np.random.default_rng(0).integers(96, 160, (size[1], size[0], 3), dtype=np.uint8)  # no overshoot to clip
    image, side = Image.fromarray(noise), 16
    resized = functional.resize(image, side, functional.InterpolationMode(interpolation))
    expected = np.asarray(functional.center_crop(resized, [side])).astype(int)
    assert np.abs(decode_image(save(image), side, interpolation) - expected).max() <= 1


def test_truncated_images_are_refused_even_if_the_program_lets_pil_fill_them(
    tmp_path: Path, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    torn = {"train/c0/0.png": save(photo, "JPEG")[:-400]}
    with pytest.raises(ValueError, match=r"'train/c0/0.png' \(.*truncated"):
        build(write(tmp_path / "pets", class_files() | torn), n_experiences=2)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
