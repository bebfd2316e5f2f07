"""The command line: one module for each group of commands, each of which imports the heavy packages it needs."""

from __future__ import annotations

import click

from avalanche_fmlora import __version__
from avalanche_fmlora.cli import compare, methods, results, run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fmlora")
def main() -> None:
    """Continual learning of pretrained vision transformers: FM-LoRA and its rivals in a fair comparison."""


for _command in (run.run, compare.compare, results.table, results.plot, results.report, methods.list_):
    main.add_command(_command)
