"""Tiny vision transformers, tiny benchmarks and short training runs that the tests of the frame share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from avalanche_fmlora.data.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Domain,
    ImageSet,
    _TensorImages,
    class_incremental,
    default_transform,
    domain_incremental,
)

torch.set_num_threads(1)

IMAGE_SIZE = 16


def _tiny_vit(
    *, seed: int = 0, kind: Any = VisionTransformer, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    arguments |= {"num_classes": 0, **options}
    vit = kind(**arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.ndim == 1 and name.endswith(("weight", "gamma"))
            parameter.copy_(1 + 0.1 * noise if is_scale else 0.25 * noise)
    return vit.to(dtype)


@pytest.fixture(scope="session")
def make_vit() -> Callable[..., Any]:
    """A ViT with 4 patches, width 16 and 2 blocks; every weight is random, so that no zero hides a term."""
    return _tiny_vit


def _image_set(classes: Sequence[int], per_class: int, rng: np.random.Generator, shift: int = 0) -> ImageSet:
    prototypes = np.random.default_rng(123).integers(0, 256, (32, IMAGE_SIZE, IMAGE_SIZE, 3))
    labels = np.repeat(np.asarray(classes), per_class)
    noise = rng.normal(0, 30, (len(labels), IMAGE_SIZE, IMAGE_SIZE, 3))
    images = np.roll(prototypes[labels], shift, axis=(1, 2)) + noise
    return ImageSet(images.clip(0, 255).astype(np.uint8), labels.astype(np.int64))


def _class_benchmark(n_classes: int = 6, n_experiences: int = 3, per_class: int = 8) -> Any:
    rng = np.random.default_rng(0)
    train, test = (_image_set(range(n_classes), n, rng) for n in (per_class, 4))
    names = [f"class {i}" for i in range(n_classes)]
    return class_incremental("tiny", train, test, names, n_experiences=n_experiences, class_order_seed=1)


def _domain_benchmark(n_classes: int = 3, n_domains: int = 3, per_class: int = 6) -> Any:
    rng = np.random.default_rng(1)
    domains = [
        Domain(f"shift {k}", *(_image_set(range(n_classes), n, rng, 3 * k) for n in (per_class, 4)))
        for k in range(n_domains)
    ]
    return domain_incremental("tiny domains", domains, [f"class {i}" for i in range(n_classes)])


@pytest.fixture(scope="session")
def make_class_benchmark() -> Callable[..., Any]:
    """Makes class-incremental benchmarks: noisy copies of one random image a class; labels in lists, no task labels."""
    return _class_benchmark


@pytest.fixture(scope="session")
def class_benchmark() -> Any:
    """6 classes in 3 experiences, 8 training and 4 test images a class."""
    return _class_benchmark()


@pytest.fixture(scope="session")
def domain_benchmark() -> Any:
    """3 classes in 3 domains (the prototypes, rolled); labels in sets, no task labels."""
    return _domain_benchmark()


@pytest.fixture(scope="session")
def task_benchmark() -> Any:
    """As `class_benchmark` with 4 classes in 2 experiences, made by Avalanche's own function, with task labels."""
    from avalanche.benchmarks import nc_benchmark

    rng = np.random.default_rng(2)
    train, test = (_image_set(range(4), n, rng) for n in (8, 4))
    return nc_benchmark(
        *(_TensorImages(s.images, s.labels) for s in (train, test)),
        n_experiences=2,
        task_labels=True,
        shuffle=False,
        train_transform=default_transform(IMAGENET_MEAN, IMAGENET_STD),
        eval_transform=default_transform(IMAGENET_MEAN, IMAGENET_STD),
    )


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """5 random images, float32 [5, 3, 16, 16]."""
    return torch.randn(5, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 4 classes of flat colours, 6 training and 3 test images each, 32 pixels wide."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k, name in enumerate(("ant", "bee", "cat", "dog")):
        for split, count in (("train", 6), ("test", 3)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(60 * k + rng.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


_SMALL = {"rank": 4}
_SMALL_OF = {
    "dual_prompt": {"g_blocks": (0,), "e_blocks": (1,)},
    "coda_prompt": {"blocks": (0, 1), "pool_size": 20},
}


@pytest.fixture(scope="session")
def make_strategy() -> Callable[..., Any]:
    """A registered method around a fresh tiny ViT, with short training; keywords go to the strategy."""
    from avalanche_fmlora.strategies.registry import method

    def make(name: str, vit: Any = None, **options: Any) -> Any:
        cls = method(name)
        defaults = {"train_mb_size": 8, "train_epochs": 4, "evaluator": None}
        defaults |= {k: v for k, v in _SMALL.items() if k in cls.config_class.model_fields}
        defaults |= _SMALL_OF.get(name, {})
        if "config" in options:
            defaults = {k: v for k, v in defaults.items() if k not in cls.config_class.model_fields}
        return cls(model=_tiny_vit() if vit is None else vit, **{**defaults, **options})

    return make


@pytest.fixture(scope="session")
def train() -> Callable[..., Any]:
    """Trains a strategy on a benchmark, one experience at a time (a joint method: all at once), from a fixed seed."""

    def run(strategy: Any, benchmark: Any, *, n: int | None = None, after: Any = None, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        experiences = list(benchmark.train_stream)[:n]
        for step in [experiences] if strategy.joint else experiences:
            strategy.train(step, **kwargs)
            if after is not None:
                after(strategy)
        return strategy

    return run


@pytest.fixture
def passes() -> Any:
    """Counts the images that go through a ViT's last block, and the passes."""

    class Counter:
        def __init__(self) -> None:
            self.images: list[int] = []

        def watch(self, vit: Any) -> Counter:
            vit.blocks[-1].register_forward_hook(lambda module, args, output: self.images.append(len(args[0])))
            return self

        def take(self) -> list[int]:
            taken, self.images = self.images, []
            return taken

    return Counter()
