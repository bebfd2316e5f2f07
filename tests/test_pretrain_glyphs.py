"""`benchmarks/pretrain_glyphs.py` ends where it ended."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner


def test_called_again_after_its_end_it_exports_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    script = importlib.import_module("pretrain_glyphs")
    monkeypatch.setattr(script, "accuracy", lambda *_: 0.5)
    sizes = ["--images", "2", "--batch-size", "1", "--threads", "1"]
    places = ["--out", f"{tmp_path}", "--log", f"{tmp_path / 'log.csv'}", "--checkpoint", f"{tmp_path / 'c.pt'}"]
    exports = []
    for _ in range(2):
        assert CliRunner().invoke(script.main, [*sizes, *places], catch_exceptions=False).exit_code == 0
        exports.append((json.loads((tmp_path / "glyph_vit.json").read_text()), (tmp_path / "log.csv").read_text()))
    assert exports[0] == exports[1]
    assert exports[0][0]["images"] == 2
