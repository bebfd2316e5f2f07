"""Configurations that take nothing that they do not know, and YAML that says nothing twice."""

from __future__ import annotations

import re
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class StrictModel(BaseModel):
    """Frozen, refuses unknown fields and truth values for numbers, and takes the text under a field as its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = types_in(cls.model_fields[str(info.field_name)].annotation)
        values = value if isinstance(value, list | tuple) else [value]
        if bool not in kinds and (int in kinds or float in kinds) and any(isinstance(v, bool) for v in values):
            raise ValueError("expected a number, not a truth value (YAML reads yes, no, on and off as such)")
        return value


def types_in(annotation: Any) -> list[Any]:
    """An annotation and all that it is made of.

    >>> types_in(int | None)
    [int | None, <class 'int'>, <class 'NoneType'>]
    """
    return [annotation, *(inner for part in getattr(annotation, "__args__", ()) for inner in types_in(part))]


def load_yaml(text: str) -> Any:
    """What a YAML text says, but a field that stands there twice is an error: YAML itself drops the first in silence.

    >>> load_yaml("a: 1")
    {'a': 1}

    Raises:
        yaml.YAMLError: if it is no YAML, or has a field twice.
    """
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2: 1:30 is no 90 and 010 no 8, but text, which a number's field refuses."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    said = f"`{key.value}` stands there a second time: write it once, with all that belongs below it"
                    raise yaml.MarkedYAMLError(None, None, said, key.start_mark)
                seen.add((key.tag, key.value))
        return node


_NUMBERS = {
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))"
        r"|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _firsts) in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_firsts))
