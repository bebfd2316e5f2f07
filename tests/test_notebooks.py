"""The committed notebooks as a reader sees them; `make notebooks` is what executes them."""

from __future__ import annotations

import ast
import base64
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "01_quickstart",
    "02_compare_strategies",
    "03_rank_and_prompt",
    "04_domain_incremental",
    "05_your_own_images",
    "06_add_a_method",
)
MOST_BYTES = 300_000
Notebook = nbformat.NotebookNode


def path_of(name: str) -> Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def notebook(name: str) -> Notebook:
    return nbformat.read(path_of(name), as_version=4)


def code_cells(notebook: Notebook) -> list[Notebook]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Notebook) -> Iterator[Notebook]:
    for cell in code_cells(notebook):
        yield from cell.outputs


def pictures(notebook: Notebook) -> list[bytes]:
    """The data of PNG and JPEG outputs."""
    data = [output.get("data", {}) for output in outputs(notebook)]
    return [base64.b64decode(d[kind]) for d in data for kind in ("image/png", "image/jpeg") if kind in d]


def imports(notebook: Notebook) -> Iterator[tuple[str, str | None]]:
    """(module, name) of each import of this package; the name is None for `import module`."""
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "avalanche_fmlora":
                yield from ((str(node.module), alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((a.name, None) for a in node.names if a.name.split(".")[0] == "avalanche_fmlora")


def test_there_are_six_and_the_readme_names_each() -> None:
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == list(NAMES)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(notebooks/(\w+)\.ipynb\)", readme) == list(NAMES)


def test_a_notebook_is_valid_and_of_no_machine(name: str, notebook: Notebook) -> None:
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells), "no times of execution"
    assert path_of(name).stat().st_size < MOST_BYTES


def test_it_opens_with_what_the_reader_will_learn(notebook: Notebook) -> None:
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "**What you will learn:**" in first.source
    assert 'pip install ".[notebooks]"' in first.source


def test_it_was_executed_from_top_to_bottom_without_an_error_or_a_warning(notebook: Notebook) -> None:
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.output_type for output in outputs(notebook)} <= {"stream", "display_data", "execute_result"}
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []
    printed = "".join(output.text for output in outputs(notebook) if output.output_type == "stream")
    assert len(printed.splitlines()) <= 40
    assert "Warning" not in printed


def test_it_shows_pictures_that_are_small(notebook: Notebook) -> None:
    found = pictures(notebook)
    assert found
    assert all(data.startswith((b"\x89PNG", b"\xff\xd8")) for data in found)
    assert max(map(len, found)) < 100_000
    for data in found:
        if data.startswith(b"\x89PNG"):
            assert 200 <= int.from_bytes(data[16:20], "big") <= 1000, "wide enough to read, no wider than a page"


def test_its_outputs_name_no_folder_of_a_machine(notebook: Notebook) -> None:
    said = [json.dumps({k: v for k, v in o.get("data", {}).items() if "image" not in k}) for o in outputs(notebook)]
    said += [output.text for output in outputs(notebook) if output.output_type == "stream"]
    for text in [*said, *(cell.source for cell in notebook.cells)]:
        assert not re.search(r"(?<![\w.~])/(work|tmp|home|root|usr|opt|Users)\b|[A-Z]:\\\\|0x[0-9a-f]{6}", text), text


def test_it_takes_a_gpu_if_there_is_one(notebook: Notebook) -> None:
    source = "\n".join(cell.source for cell in code_cells(notebook))
    assert 'device = "cuda" if torch.cuda.is_available() else "cpu"' in source
    assert re.search(r"\bdevice=device\b|\"device\": device", source)


def test_what_it_imports_is_there(notebook: Notebook) -> None:
    found = list(imports(notebook))
    assert found
    for module, attribute in found:
        owner = importlib.import_module(module)
        if attribute is not None and not hasattr(owner, attribute):
            importlib.import_module(f"{module}.{attribute}")


def test_notebooks_that_are_named_exist(notebook: Notebook) -> None:
    text = "\n".join(cell.source for cell in notebook.cells)
    assert set(re.findall(r"`(0\d_\w+)`", text)) <= set(NAMES)
