"""Execute the notebooks top to bottom, each in an empty folder, and fail on the first error.

`python notebooks/run.py` leaves the committed files alone; with `--in-place` they get the new outputs.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

HERE = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(notebook: nbformat.NotebookNode, limit_s: float) -> None:
    """Execute in place; what the notebook writes goes into a temporary folder.

    Args:
        notebook: gets new outputs, and metadata that don't depend on this machine.
        limit_s: seconds that all its cells may take together.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
        TimeoutError: if it takes too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        start = time.perf_counter()
        try:
            asyncio.run(asyncio.wait_for(client.async_execute(), limit_s))
        except (asyncio.TimeoutError, DeadKernelError) as error:  # stopped at the limit, it may look dead first
            if time.perf_counter() - start < limit_s:
                raise
            raise TimeoutError(f"Expected a notebook to take at most {limit_s:g} s: it was stopped.") from error
    notebook.metadata = nbformat.from_dict(METADATA)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="files; all beside this script if left out")
    parser.add_argument("--in-place", action="store_true", help="keep the outputs")
    parser.add_argument("--limit-s", type=float, default=600.0, help="seconds that a notebook may take")
    arguments = parser.parse_args()
    for path in arguments.notebooks or sorted(HERE.glob("*.ipynb")):
        print(path.name, end=": ", flush=True)
        notebook = nbformat.read(path, as_version=4)
        start = time.perf_counter()
        execute(notebook, arguments.limit_s)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
        if arguments.in_place:
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
