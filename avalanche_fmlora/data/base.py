"""Decoded images -> Avalanche benchmark: what all data sets of this package share.

Every data set file ends in a call of :func:`class_incremental` or :func:`domain_incremental`. The result is an ordinary
Avalanche benchmark with one more attribute, ``info`` (:class:`BenchmarkInfo`), which goes into the result record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from avalanche_fmlora.data.store import StoredImages
from avalanche_fmlora.data.transforms import ImageTransform, Transform, Transforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSet:
    """Decoded images with their labels.

    Args:
        images: uint8, shape [M, H, W, 3]; or M stored images of any shapes.
        labels: int64, shape [M], the index into the data set's list of class names.

    Raises:
        ValueError: if the shapes or the dtype are others.
    """

    images: np.ndarray | StoredImages
    labels: np.ndarray

    def __post_init__(self) -> None:
        if isinstance(self.images, np.ndarray) and (
            self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3
        ):
            raise ValueError(
                f"Expected `images` to be uint8 of shape [M, H, W, 3] but got {self.images.dtype} of shape "
                f"{self.images.shape}: convert to RGB and keep 0..255."
            )
        if self.labels.shape != (len(self.images),):
            raise ValueError(
                f"Expected one label for each of the {len(self.images)} images but got shape {self.labels.shape}."
            )

    def digest(self) -> str:
        """sha256 of images and labels, in order: 64 hexadecimal digits."""
        images = self.images
        digest = hashlib.sha256(images.digest().encode() if isinstance(images, StoredImages) else images.tobytes())
        digest.update(self.labels.astype(np.int64).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Domain:
    """One domain of a domain-incremental data set: the same classes as the others, its own images."""

    name: str
    train: ImageSet
    test: ImageSet


@dataclass(frozen=True)
class BenchmarkInfo:
    """What a result record says about the data. ``class_order[k]`` is the original index of the class with label k."""

    name: str
    kind: str
    experience_names: tuple[str, ...]
    class_names: tuple[str, ...]
    class_order: tuple[int, ...]
    class_order_seed: int | None
    image_size: int
    split_hash: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    n_train: tuple[int, ...]
    n_test: tuple[int, ...]
    extra: dict[str, Any] = field(default_factory=dict)


class _TensorImages(Dataset[tuple[Tensor, int]]):
    """An item is (image uint8 [3, H, W], label). The images stay where they are: a mapped file is never read whole."""

    def __init__(self, images: np.ndarray | StoredImages, labels: np.ndarray) -> None:
        self.images = images
        self.targets: list[int] = labels.astype(np.int64).tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        # A copy, which stored images give anyway, since a mapped file is read-only.
        owned = image if isinstance(self.images, StoredImages) else np.array(image)
        # A view of [H, W, 3], since torchvision resizes that fastest.
        return torch.from_numpy(owned).permute(2, 0, 1), self.targets[index]


def default_transform(mean: Sequence[float], std: Sequence[float], augment: Sequence[Transform] = ()) -> ImageTransform:
    """uint8 [3, H, W] -> the augmentations, then float32 in [0, 1], then (x - mean) / std."""
    return ImageTransform(augment, mean, std)


def order_of(count: int, seed: int | None) -> tuple[int, ...]:
    """A permutation of 0..count-1 drawn with `seed`; None keeps the order.

    >>> order_of(3, None)
    (0, 1, 2)
    >>> order_of(5, 0) == order_of(5, 0)
    True
    """
    if seed is None:
        return tuple(range(count))
    return tuple(int(i) for i in np.random.default_rng(seed).permutation(count))


def require_division(name: str, n_classes: int, n_experiences: int) -> None:
    """Refuse a number of experiences that can't be of equal size.

    Raises:
        ValueError: that names those that can.
    """
    if n_experiences < 1 or n_classes % n_experiences:
        raise ValueError(
            f"Expected `n_experiences` to divide the {n_classes} classes of {name} but got {n_experiences}: "
            f"choose one of {[d for d in range(1, n_classes + 1) if n_classes % d == 0]}."
        )


def class_incremental(
    name: str,
    train: ImageSet,
    test: ImageSet,
    class_names: Sequence[str],
    *,
    n_experiences: int,
    class_order_seed: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    augment: Sequence[Transform] = (),
    transforms: Transforms | None = None,
    extra: dict[str, Any] | None = None,
) -> Any:
    """Split the classes over `n_experiences` of equal size, in an order drawn with `class_order_seed`.

    Args:
        name: of the benchmark, for the record.
        train: all training images.
        test: all test images.
        class_names: one for each original label.
        n_experiences: must divide the number of classes.
        class_order_seed: seeds the class order; None keeps the order of `class_names`.
        mean: of each channel in [0, 1], subtracted.
        std: of each channel, divided by.
        augment: transforms of a uint8 image [3, H, W], for training images only.
        transforms: all of that at once (:func:`avalanche_fmlora.data.transforms.make_transforms`), instead of `mean`,
            `std` and `augment`; needed for stored images, whose shapes differ.
        extra: further facts for the record.

    Returns:
        An Avalanche benchmark without task labels whose labels are 0..C-1 in order of appearance, with ``info``.

    Raises:
        ValueError: if the classes can't be divided evenly or one has no image in a split, or without `transforms` for
            stored images.
    """
    from avalanche.benchmarks import nc_benchmark

    n_classes = len(class_names)
    require_division(name, n_classes, n_experiences)
    _require_all_classes(name, "train", train.labels, class_names)
    _require_all_classes(name, "test", test.labels, class_names)
    chosen = _transforms(train, mean, std, augment, transforms)
    order = order_of(n_classes, class_order_seed)
    to_label = np.empty(n_classes, dtype=np.int64)
    to_label[list(order)] = np.arange(n_classes)
    benchmark = nc_benchmark(
        _TensorImages(train.images, to_label[train.labels]),
        _TensorImages(test.images, to_label[test.labels]),
        n_experiences=n_experiences,
        task_labels=False,
        shuffle=False,
        fixed_class_order=list(range(n_classes)),
        class_ids_from_zero_from_first_exp=True,
        train_transform=chosen.train,
        eval_transform=chosen.eval,
    )
    names = [class_names[i] for i in order]
    step = n_classes // n_experiences
    benchmark.info = BenchmarkInfo(
        name=name,
        kind="class_incremental",
        experience_names=tuple(f"{names[t * step]} … {names[(t + 1) * step - 1]}" for t in range(n_experiences)),
        class_names=tuple(names),
        class_order=order,
        class_order_seed=class_order_seed,
        image_size=chosen.image_size,
        split_hash=split_hash(train.digest(), test.digest()),
        mean=chosen.mean,
        std=chosen.std,
        n_train=tuple(len(e.dataset) for e in benchmark.train_stream),
        n_test=tuple(len(e.dataset) for e in benchmark.test_stream),
        extra=dict(extra or {}),
    )
    return benchmark


def domain_incremental(
    name: str,
    domains: Sequence[Domain],
    class_names: Sequence[str],
    *,
    class_order_seed: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    augment: Sequence[Transform] = (),
    transforms: Transforms | None = None,
    whole: bool = True,
    extra: dict[str, Any] | None = None,
) -> Any:
    """One experience a domain, all with the same classes; `class_order_seed` draws the order of the domains.

    Arguments, result and errors are those of :func:`class_incremental`; labels are the indices into `class_names`.
    With `whole` false a domain may lack images of some classes, as DomainNet's do, as long as another one has them.
    """
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.scenarios import with_classes_timeline
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.benchmarks.utils.transform_groups import DefaultTransformGroups, TransformGroups

    if len(domains) < 2:
        raise ValueError(f"Expected at least two domains for {name} but got {[d.name for d in domains]}.")
    for split in ("train", "test"):
        parts = {f"{d.name}/{split}": getattr(d, split).labels for d in domains}
        for place, labels in (parts if whole else {split: np.concatenate(list(parts.values()))}).items():
            _require_all_classes(name, place, labels, class_names)
    order = order_of(len(domains), class_order_seed)
    ordered = [domains[i] for i in order]
    chosen = _transforms(ordered[0].train, mean, std, augment, transforms)
    train_groups = {"train": chosen.train, "eval": chosen.eval}

    def wrap(images: ImageSet, train: bool) -> Any:
        groups = TransformGroups(train_groups) if train else DefaultTransformGroups(train_groups["eval"])
        data = _TensorImages(images.images, images.labels)
        return as_classification_dataset(data, transform_groups=groups)

    benchmark = with_classes_timeline(
        benchmark_from_datasets(
            train=[wrap(d.train, True) for d in ordered], test=[wrap(d.test, False) for d in ordered]
        )
    )
    benchmark.info = BenchmarkInfo(
        name=name,
        kind="domain_incremental",
        experience_names=tuple(d.name for d in ordered),
        class_names=tuple(class_names),
        class_order=tuple(range(len(class_names))),
        class_order_seed=class_order_seed,
        image_size=chosen.image_size,
        split_hash=split_hash(*(d for domain in domains for d in (domain.train.digest(), domain.test.digest()))),
        mean=chosen.mean,
        std=chosen.std,
        n_train=tuple(len(d.train.labels) for d in ordered),
        n_test=tuple(len(d.test.labels) for d in ordered),
        extra=dict(extra or {}),
    )
    return benchmark


def _transforms(
    images: ImageSet,
    mean: Sequence[float],
    std: Sequence[float],
    augment: Sequence[Transform],
    transforms: Transforms | None,
) -> Transforms:
    if transforms is not None:
        return transforms
    if isinstance(images.images, StoredImages):
        raise ValueError("Expected `transforms` for stored images, which differ in shape: see make_transforms().")
    size = images.images.shape[1]
    train, evaluate = default_transform(mean, std, augment), default_transform(mean, std)
    return Transforms("none", size, train, evaluate, "as given")


def _require_all_classes(name: str, split: str, labels: np.ndarray, class_names: Sequence[str]) -> None:
    missing = sorted(set(range(len(class_names))) - set(labels.tolist()))
    if missing:
        shown = ", ".join(repr(class_names[i]) for i in missing[:5]) + (" …" if len(missing) > 5 else "")
        raise ValueError(
            f"{name}: {len(missing)} of {len(class_names)} classes have no image in {split}: {shown}. "
            "Add images of them or leave the classes out of every split."
        )


def split_hash(*digests: str) -> str:
    """One sha256 of several."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()
