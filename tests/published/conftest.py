"""Miniature trees of the published data sets in their true layouts, and how tests build benchmarks from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from miniature_trees import miniature

from avalanche_fmlora import domainnet

UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four trees with 4 classes; not to be changed."""
    folder = tmp_path_factory.mktemp("miniature")
    miniature.write_cifar100(folder, train=5, test=2)
    miniature.write_imagenet_r(folder, per_class=8)
    miniature.write_cub200(folder, train=3, test=2)
    miniature.write_domainnet(folder, train=3, test=2)
    return folder


@pytest.fixture
def tree(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one tree that a test may spoil."""
    return lambda name: shutil.copytree(originals / name, tmp_path / name)


@pytest.fixture
def build(tmp_path: Path) -> Any:
    def call(builder: Any, path: Path | None, **options: Any) -> Any:
        defaults = {"image_size": 16, "cache_dir": tmp_path / "cache", "subset": True, **UNIT}
        if builder is not domainnet:
            defaults["n_experiences"] = 2
        return builder(path, **(defaults | options))

    return call
