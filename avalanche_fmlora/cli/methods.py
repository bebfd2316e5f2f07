"""`fmlora list`: methods and their options."""

from __future__ import annotations

import logging

import click

from avalanche_fmlora.cli.common import prepare, user_errors


@click.command("list")
@click.argument("method", required=False)
def list_(method: str | None) -> None:
    """List methods, or the options of METHOD."""
    with user_errors():
        prepare(logging.WARNING)
        from avalanche_fmlora.strategies.registry import method as method_class
        from avalanche_fmlora.strategies.registry import methods

        if method is None:
            for name, strategy in methods().items():
                click.echo(f"{name:14} {strategy.summary} ({strategy.paper})")
            return
        for name, field in method_class(method).config_class.model_fields.items():
            click.echo(f"{name} = {field.default!r}\n    {field.description}")
