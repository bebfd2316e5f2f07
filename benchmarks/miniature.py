"""Make miniature trees of CIFAR-100, ImageNet-R, CUB-200 and DomainNet in their true layouts, to try commands with.

    python benchmarks/miniature.py FOLDER

Every class is a colour and a shape, so that something can be learned; nothing of the real data sets is in them.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


def draw(label: int, number: int, size: tuple[int, int] = (72, 64), style: int = 0) -> Image.Image:
    """Image `number` of a class: its polygon in its colour, moved, on noise of a brightness that follows `style`."""
    rng = np.random.default_rng([label, number, style])
    noise = rng.normal(60 + 25 * style, 20, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(noise)
    radius = min(size) / 3.5
    centre = [float(side / 2 + rng.uniform(-1, 1) * radius / 3) for side in size]
    colour = tuple(int(v) for v in np.random.default_rng(label).integers(0, 256, 3))
    ImageDraw.Draw(image).regular_polygon((*centre, radius), 3 + label % 5, int(rng.integers(0, 360)), fill=colour)
    return image


def write_cifar100(folder: Path, n_classes: int = 4, train: int = 12, test: int = 4) -> Path:
    """`cifar-100-python/` with the pickles `train`, `test` and `meta`."""
    root = folder / "cifar-100-python"
    root.mkdir(parents=True, exist_ok=True)
    for split, count, first in (("train", train, 0), ("test", test, 10_000)):
        labels = [label for label in range(n_classes) for _ in range(count)]
        images = [draw(label, first + i, (32, 32)) for i, label in enumerate(labels)]
        data = np.stack([np.asarray(image).transpose(2, 0, 1).reshape(-1) for image in images])
        content = {"fine_labels": labels, "coarse_labels": [label // 5 for label in labels], "data": data}
        (root / split).write_bytes(pickle.dumps(content, protocol=2))
    names = {"fine_label_names": [f"class{i:02d}" for i in range(n_classes)], "coarse_label_names": ["all"]}
    (root / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return root


def write_imagenet_r(folder: Path, n_classes: int = 4, per_class: int = 15) -> Path:
    """`imagenet-r/<wnid>/<kind>_<number>.jpg` and a README.txt."""
    root = folder / "imagenet-r"
    root.mkdir(parents=True, exist_ok=True)
    wnids = [f"n{10_000_000 + label}" for label in range(n_classes)]
    (root / "README.txt").write_text("".join(f"{wnid} class {i}\n" for i, wnid in enumerate(wnids)))
    for label, wnid in enumerate(wnids):
        for number in range(per_class):
            _save(root / wnid / f"{('art', 'sketch', 'toy')[number % 3]}_{number}.jpg", draw(label, number))
    return root


def write_cub200(folder: Path, n_classes: int = 4, train: int = 12, test: int = 4) -> Path:
    """`CUB_200_2011/` with its lists and `images/<class>/<image>`."""
    root = folder / "CUB_200_2011"
    rows = list(_cub_rows(n_classes, train, test))
    for number, (label, name, _) in enumerate(rows):
        _save(root / "images" / name, draw(label, number))
    lists = {
        "images.txt": [f"{i} {name}" for i, (_, name, _) in enumerate(rows, 1)],
        "train_test_split.txt": [f"{i} {is_train}" for i, (_, _, is_train) in enumerate(rows, 1)],
        "image_class_labels.txt": [f"{i} {label + 1}" for i, (label, _, _) in enumerate(rows, 1)],
        "classes.txt": [f"{label + 1} {_species(label)}" for label in range(n_classes)],
    }
    for file, lines in lists.items():
        (root / file).write_text("\n".join(lines) + "\n")
    return root


def _cub_rows(n_classes: int, train: int, test: int) -> Iterator[tuple[int, str, int]]:
    for label in range(n_classes):
        for number in range(train + test):
            yield label, f"{_species(label)}/Bird_{label:04d}_{number:04d}.jpg", int(number < train)


def _species(label: int) -> str:
    return f"{label + 1:03d}.Bird_{label}"


def write_domainnet(folder: Path, n_classes: int = 4, train: int = 12, test: int = 4) -> Path:
    """`domainnet/<domain>/<class>/<domain>_<class>_<number>.jpg` and the lists of each domain."""
    root = folder / "domainnet"
    for style, domain in enumerate(DOMAINS):
        lists: dict[str, list[str]] = {"train": [], "test": []}
        for label in range(n_classes):
            for number in range(train + test):
                name = f"{domain}/class_{label}/{domain}_{label + 1:03d}_{number + 1:06d}.jpg"
                _save(root / name, draw(label, number, style=style))
                lists["train" if number < train else "test"].append(f"{name} {label}")
        for split, lines in lists.items():
            (root / f"{domain}_{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def _save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=90)


def main() -> None:
    """Write all four and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the four trees")
    parser.add_argument("--classes", type=int, default=4, help="classes of each data set [4]")
    arguments = parser.parse_args()
    for write in (write_cifar100, write_imagenet_r, write_cub200, write_domainnet):
        print(write(arguments.folder, arguments.classes))


if __name__ == "__main__":
    main()
