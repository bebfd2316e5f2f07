"""What a run is: benchmark, backbone, method, training and seeds, from YAML and flags, validated."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, model_validator

from avalanche_fmlora.backbones import BackboneConfig, fetch_backbone
from avalanche_fmlora.data.config import BenchmarkConfig, last_name
from avalanche_fmlora.results.record import run_id
from avalanche_fmlora.strategies.config import MethodConfig, validate
from avalanche_fmlora.strategies.registry import method as method_class
from avalanche_fmlora.strict import StrictModel, load_yaml

_LOG = logging.getLogger(__name__)
DATA_ROOT_VARIABLE = "AVALANCHE_FMLORA_DATA"


class TrainingConfig(StrictModel):
    """Length and batches of training."""

    epochs: int = Field(5, ge=1)
    """Epochs an experience."""
    batch_size: int = Field(32, ge=1)
    """Training images a step."""
    eval_batch_size: int = Field(128, ge=1)
    """Images a step of evaluation."""
    num_workers: int = Field(0, ge=0)
    """Processes that read images beside the training. Batches do not depend on it, so it does not name a run."""


class RunConfig(StrictModel):
    """Everything that determines the result of one run."""

    method: str = "fm_lora"
    """Name of the method; `fmlora list` shows them."""
    method_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the method; `fmlora list METHOD` shows them."""
    benchmark: BenchmarkConfig = BenchmarkConfig()
    """The data."""
    backbone: BackboneConfig = BackboneConfig()
    """The frozen ViT."""
    training: TrainingConfig = TrainingConfig()
    """Epochs and batches."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of initial values and batches."""
    class_order_seed: int | None = Field(0, ge=0)
    """Seed of the order of classes (or domains); null keeps the data's own. Of the domains that
    `benchmark.domain_order` names, 0 and null keep the order given there, other numbers draw one."""
    label: str | None = None
    """Name of the row in tables; it does not change the run."""

    @model_validator(mode="before")
    @classmethod
    def _one_order(cls, values: Any) -> Any:
        benchmark = values.get("benchmark") if isinstance(values, dict) else None
        plain = benchmark.model_dump() if isinstance(benchmark, BenchmarkConfig) else benchmark
        if isinstance(plain, dict) and plain.get("domain_order") is not None:
            return {**values, "class_order_seed": values.get("class_order_seed") or None}
        return values

    def resolved_method(self) -> MethodConfig:
        """The method's whole configuration; its seed is the run's unless it is given.

        Raises:
            ValueError: for an unknown method or option.
        """
        cls = method_class(self.method).config_class
        for name in self.method_options:
            if name not in cls.model_fields:
                raise ValueError(f"{self.method} has no option `{name}`: {instead_of(name, self.method)}")
        return validate(cls, {"seed": self.seed, **self.method_options}, self.method)

    def identity(self) -> dict[str, Any]:
        """What a record keeps of this configuration, and is named by: all defaults filled in, paths without folders."""
        plain: dict[str, Any] = self.model_dump(mode="json", exclude={"method_options"})
        del plain["training"]["num_workers"]
        plain["method_options"] = self.resolved_method().model_dump(mode="json")
        plain["benchmark"] = self.benchmark.identity()
        if plain["backbone"]["weights"] is not None:
            plain["backbone"]["weights"] = last_name(plain["backbone"]["weights"])
        return plain


PARTS = {
    name: part
    for part, model in (("benchmark", BenchmarkConfig), ("backbone", BackboneConfig), ("training", TrainingConfig))
    for name in model.model_fields
}
"""The part of a run's configuration that each of their fields is in."""


def instead_of(name: str, *methods: str) -> str:
    """What to write instead of an option that neither a run nor one of these methods has."""
    if part := PARTS.get(name):
        return f"it belongs to `{part}`, so write {part}: {{{name}: …}}, or `--{part}.{name}` as a flag."
    if name.endswith("s") and name[:-1] in RunConfig.model_fields:
        return f"a run has one `{name[:-1]}`, several are for `fmlora compare`."
    own = {field for method in methods for field in method_class(method).config_class.model_fields}
    near = difflib.get_close_matches(name, sorted({*RunConfig.model_fields, *PARTS, *own}), n=1, cutoff=0.7)
    if near and near[0] not in {*RunConfig.model_fields, *own}:
        return f"did you mean `{near[0]}` of `{PARTS[near[0]]}`?"
    return (
        f"did you mean `{near[0]}`?"
        if near
        else f"`fmlora list {methods[0] if len(methods) == 1 else 'METHOD'}` shows the method's options."
    )


def make_run(options: dict[str, Any]) -> RunConfig:
    """Nested options -> a configuration whose method options are checked too.

    Raises:
        ValueError: that names each wrong field and the nearest right one.
    """
    name = options.get("method", RunConfig.model_fields["method"].default)
    unknown = set(options) - set(RunConfig.model_fields)
    own = method_class(name).config_class.model_fields if unknown and isinstance(name, str) else {}
    if misplaced := sorted(unknown & set(own)):
        raise ValueError(
            f"the configuration has no option `{misplaced[0]}`, but {name} has: write it below `method_options`."
        )
    if unknown and isinstance(name, str):
        first = min(unknown)
        raise ValueError(f"the configuration has no option `{first}`: {instead_of(first, name)}")
    config = validate(RunConfig, options, "the configuration")
    config.resolved_method()
    return config


def by_id(configs: Iterable[RunConfig]) -> dict[str, RunConfig]:
    """By what their records are named by, in which of a path only the last name counts.

    Two that differ in their labels alone are one run, under the first, and a warning says so.

    Raises:
        ValueError: if two that have one name read different files.
    """
    unique: dict[str, RunConfig] = {}
    for config in configs:
        first = unique.setdefault(run_id(config.identity()), config)
        if first.label != config.label:
            _LOG.warning(
                "Two runs of %s differ in nothing but their labels, %r and %r: it runs once, under the first.",
                config.method, first.label, config.label,
            )  # fmt: skip
        ours, others = _files(config), _files(first)
        if ours != others:
            a, b = next((a, b) for a, b in zip(ours, others, strict=True) if a != b)
            raise ValueError(
                f"{a} and {b} would have one record, since records keep of a path only its last name: rename one of "
                "them, or run them into different folders."
            )
    return unique


def _files(config: RunConfig) -> list[Path | None]:
    """What the record's name tells apart by last names alone; where a whole published data set lies does not count."""
    path = config.benchmark.path if config.benchmark.identity()["path"] is not None else None
    paths = [path, config.benchmark.split_file, config.backbone.weights]
    return [None if path is None else Path(path).expanduser() for path in paths]


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Options from a YAML file. Its field `base` names one or more files, relative to it, before which it goes.

    Args:
        path: the file.
        above: files that are being read and have this one as their base.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no YAML mapping, or is its own base.
    """
    if not path.is_file():
        wanted = f", a base of {above[-1]}" if above else ""
        raise FileNotFoundError(f"There is no configuration file {path}{wanted}.")
    if path.resolve() in above:
        raise ValueError(f"{path} is its own base, by way of {above[-1]}: take that `base` out.")
    try:
        options = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"Expected {path} to hold `field: value` lines but got {type(options).__name__}.")
    base = options.pop("base", [])
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"Expected `base` of {path} to be a file or a list of files but got {base!r}.")
    return merged(read_all((path.parent / name for name in names), (*above, path.resolve())), options)


def read_all(paths: Iterable[Path], above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Options from several YAML files; what a later one says goes before, field by field, also inside of parts."""
    options: dict[str, Any] = {}
    for path in paths:
        options = merged(options, read_yaml(path, above))
    return options


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both; where a field is in both, `above` counts, and mappings are merged field by field.

    >>> merged({"seed": 0, "training": {"epochs": 5, "batch_size": 8}}, {"training": {"epochs": 1}})
    {'seed': 0, 'training': {'epochs': 1, 'batch_size': 8}}
    """
    both = {k: merged(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    return {**below, **above, **both}


def set_option(options: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a nested option, ``training.epochs`` say; a name without a dot that no part of a run has is the method's.

    A mapping goes over one that is there field by field, as in files.

    >>> options = {}
    >>> set_option(options, "training.epochs", 3); set_option(options, "rank", 8); options
    {'training': {'epochs': 3}, 'method_options': {'rank': 8}}

    Raises:
        ValueError: if what should hold the option is something else than options.
    """
    keys = dotted.replace("-", "_").split(".")
    if keys[0] not in RunConfig.model_fields:
        keys = ["method_options", *keys]
    for key in keys[:-1]:
        inner = _as_options(options.get(key))
        if not isinstance(inner, dict | None):
            raise ValueError(
                f"Expected `{key}` to hold options, as `{dotted}` is one of them, but it is {inner!r}: "
                f"write {key}: {{…}}."
            )
        options[key] = {} if inner is None else inner
        options = options[key]
    inner, above = _as_options(options.get(keys[-1])), _as_options(value)
    options[keys[-1]] = merged(inner, above) if isinstance(inner, dict) and isinstance(above, dict) else value


def _as_options(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def located(config: RunConfig, data_root: Path | None) -> RunConfig:
    """The same run with full paths, for a process with another working directory; its identity stays.

    The hub's weights, and data that are to be downloaded, are fetched here, before any run of a sweep starts.

    Raises:
        FileNotFoundError: if a file is not there; it names each place looked at.
        ConnectionError, ValueError, OSError: if a download fails.
    """

    def find(path: Path) -> Path:
        return find_data(path, data_root).absolute()

    fetch_backbone(config.backbone)
    config.benchmark.located(find)
    found: dict[str, Any] = {}
    for part, keys in (("benchmark", ("path", "split_file")), ("backbone", ("weights",))):
        section = getattr(config, part)
        paths = {key: find(path) for key in keys if (path := getattr(section, key)) is not None}
        found[part] = section.model_copy(update=paths)
    return config.model_copy(update=found)


def find_data(path: Path, data_root: Path | None) -> Path:
    """A relative path as it is, or below the data root (an argument, or the environment variable).

    Raises:
        FileNotFoundError: that names each place looked at.
    """
    root = data_root or (Path(os.environ[DATA_ROOT_VARIABLE]) if os.environ.get(DATA_ROOT_VARIABLE) else None)
    places = [path.expanduser()]
    if root is not None and not path.is_absolute():
        places.append(root.expanduser() / path)
    for place in places:
        if place.exists():
            return place
    looked = " nor ".join(str(p) for p in places)
    raise FileNotFoundError(
        f"There is no {looked}: give a full path, or the folder that holds it by --data-root or {DATA_ROOT_VARIABLE}."
    )
