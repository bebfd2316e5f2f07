"""Small image files for tests of `image_folder`: folders and zips of them, and one item of a benchmark read back."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image


def encoded(
    color: Any = (200, 100, 50), size: tuple[int, int] = (12, 10), kind: str = "PNG", mode: str = "RGB"
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, kind)
    return buffer.getvalue()


def save(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def class_files(n_classes: int = 4, per: int = 2, top: str = "") -> dict[str, bytes]:
    """Class c is drawn in the colour (20 c, 0, image index)."""
    return {
        f"{top}{split}/c{c}/{i}.png": encoded((20 * c, 0, i))
        for split in ("train", "test")
        for c in range(n_classes)
        for i in range(per)
    }


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def raw(experience: Any, index: int) -> tuple[list[int], int]:
    """The middle pixel as 0..255 and the label of an item of a benchmark with mean 0 and std 1."""
    image, label, *_ = experience.dataset[index]
    return [round(float(v) * 255) for v in image[:, 4, 4]], int(label)


UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
