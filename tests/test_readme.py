"""What the README shows is what runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from avalanche_fmlora.cli import main
from avalanche_fmlora.cli.common import SHORT, read_flags
from avalanche_fmlora.grid import expand
from avalanche_fmlora.strategies.registry import methods

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_pipeline_runs_and_is_short(tmp_path: Path) -> None:
    code, _ = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    check = (
        "\nassert type(vit).__name__ == 'VisionTransformer' and vit.head is not None\nprint('learned', vit.num_classes)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # beside other tests, two threads wait for each other
    done = subprocess.run(
        [sys.executable, "-c", code + check], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "learned 100"


def test_the_pipeline_with_checkpoints_goes_on(
    make_strategy: Any, class_benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, code = blocks("python")
    monkeypatch.chdir(tmp_path)
    names = {"benchmark": class_benchmark, "glyph_vit": lambda: None}
    names["FMLoRAStrategy"] = lambda model, plugins: make_strategy("fm_lora", plugins=plugins, train_epochs=1)
    for start in (0, len(class_benchmark.train_stream)):
        done: dict[str, Any] = dict(names)
        exec(code, done)
        assert done["start"] == start
        assert done["strategy"].model.head.seen.all()
    assert len(list((tmp_path / "runs" / "mine").iterdir())) == 2


def commands() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("fmlora ")]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_known(words: list[str]) -> None:
    command, *rest = words[1:]
    if command == "list":
        assert CliRunner().invoke(main, [command, *rest]).exit_code == 0
        return
    assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0
    own = {o: 1 if getattr(p, "is_flag", False) else 2 for p in main.commands[command].params for o in p.opts}
    extra, i = [], 0
    while i < len(rest):
        if rest[i] in own:
            i += own[rest[i]]
        elif rest[i].startswith("--"):
            extra += rest[i : i + 2]
            i += 2
        else:
            i += 1
    expand({"methods": ["fm_lora"]}, [(SHORT.get(name, name), value) for name, value in read_flags(extra)])


def test_every_method_is_in_the_table() -> None:
    for name in methods():
        assert f"| `{name}` |" in README


def test_files_that_are_linked_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def _anchors(markdown: str) -> set[str]:
    """GitHub's names of a page's headings: small letters, spaces as hyphens, other signs left out."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_sections_that_are_linked_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([\w/.]*)#([^)]+)\)", text)
    assert links
    for file, anchor in links:
        target = (ROOT / page).parent / file if file else ROOT / page
        assert anchor in _anchors(target.read_text(encoding="utf-8")), (file, anchor)


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE):
        assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE)
