"""`fmlora list`: methods and their options, benchmarks, backbones."""

from __future__ import annotations

import logging
import textwrap
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import click

from avalanche_fmlora.cli.common import messages, user_errors

if TYPE_CHECKING:
    from pydantic import BaseModel


@click.command("list")
@click.argument("name", metavar="[METHOD | benchmarks | backbones]", required=False)
def list_(name: str | None) -> None:
    """List methods, the options of METHOD, benchmarks with the options of data, or the short names of backbones."""
    with user_errors(), messages(logging.WARNING):
        if name == "backbones":
            _list_backbones()
            return
        if name == "benchmarks":
            from avalanche_fmlora.data.config import BenchmarkConfig

            _list_options(BenchmarkConfig, "benchmark.")
            return
        from avalanche_fmlora.strategies.registry import method, methods

        if name is None:
            for known, strategy in methods().items():
                click.echo(f"{known:14} {strategy.summary} ({strategy.paper})")
            return
        _list_options(method(name).config_class)


def _list_options(config: type[BaseModel], prefix: str = "") -> None:
    """A line an option, with its default and what it can be, and below it what it means; those of a part after it."""
    for option, field in config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        parts = [part for part in _kinds(field.annotation) if hasattr(part, "model_fields")]
        kinds = " | ".join("{…}" if kind in parts else _kind(kind) for kind in _kinds(field.annotation))
        click.echo(f"{prefix}{option} = {'{…}' if parts and default is not None else _yaml(default)}  ({kinds})")
        click.echo(textwrap.indent(textwrap.fill(" ".join((field.description or "").split()), 108), "    "))
        for part in parts:
            _list_options(part, f"{prefix}{option}.")


def _kinds(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type, the values of a Literal among them: ``int | None`` -> int, NoneType."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for inner in get_args(annotation):
            yield from _kinds(inner)
    elif origin is Literal:
        yield from get_args(annotation)
    else:
        yield annotation


def _kind(kind: Any) -> str:
    """A type or a value as one writes it in YAML."""
    if get_origin(kind) in (tuple, list):
        inner = [" | ".join(map(_kind, _kinds(part))) for part in get_args(kind) if part is not Ellipsis]
        return f"[{', '.join(inner)}{', …' if Ellipsis in get_args(kind) or get_origin(kind) is list else ''}]"
    if get_origin(kind) is dict or kind is dict:
        return "{…}"
    names = {bool: "true | false", int: "whole number", float: "number", str: "text", type(None): "null"}
    return names.get(kind) or (kind.__name__.lower() if isinstance(kind, type) else _yaml(kind))


def _yaml(value: Any) -> str:
    """On one line, without the end mark that YAML puts after a single value."""
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    return str(yaml.safe_dump(plain, default_flow_style=True, width=1000)).splitlines()[0]


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
