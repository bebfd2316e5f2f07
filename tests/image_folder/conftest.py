"""`image_folder` with a small size and a cache of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from avalanche_fmlora.data.image_folder import image_folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def build(cache: Path) -> Any:
    def call(path: Path, **options: Any) -> Any:
        return image_folder(path, **({"image_size": 8, "cache_dir": cache} | options))

    return call
