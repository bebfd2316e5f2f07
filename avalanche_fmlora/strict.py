"""Configurations that take nothing that they do not know, and YAML that says nothing twice."""

from __future__ import annotations

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
