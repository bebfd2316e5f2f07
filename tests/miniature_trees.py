"""`benchmarks/miniature.py`, a script, as a module for tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

_SPEC = importlib.util.spec_from_file_location(
    "miniature", Path(__file__).resolve().parents[1] / "benchmarks" / "miniature.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
miniature: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(miniature)
