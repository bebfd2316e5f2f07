"""`fmlora list`: methods and their options, and backbones."""

from __future__ import annotations

import logging

import click

from avalanche_fmlora.cli.common import messages, user_errors


@click.command("list")
@click.argument("name", metavar="[METHOD | backbones]", required=False)
def list_(name: str | None) -> None:
    """List methods, the options of METHOD, or the short names of backbones."""
    with user_errors(), messages(logging.WARNING):
        if name == "backbones":
            _list_backbones()
            return
        from avalanche_fmlora.strategies.registry import method, methods

        if name is None:
            for known, strategy in methods().items():
                click.echo(f"{known:14} {strategy.summary} ({strategy.paper})")
            return
        for option, field in method(name).config_class.model_fields.items():
            click.echo(f"{option} = {field.default!r}\n    {field.description}")


def _list_backbones() -> None:
    from avalanche_fmlora.backbones import known_backbones

    def channels(values: tuple[float, ...]) -> str:
        return ", ".join(f"{v:.3g}" for v in values)

    for known in known_backbones():
        patch = f"patch {known.patch}, " if known.patch else ""
        click.echo(f"{known.name} = {known.tag}")
        click.echo(f"    width {known.width}, depth {known.depth}, {patch}{known.image_size} px, ", nl=False)
        click.echo(f"mean ({channels(known.mean)}), std ({channels(known.std)})")
    click.echo("Any other timm ViT as architecture.tag. --image-size takes any multiple of the patch.")
