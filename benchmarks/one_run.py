"""What scripts share that train a method and look inside: arguments, configurations, features, rows of a CSV."""

from __future__ import annotations

import argparse
import csv
import io
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from avalanche_fmlora.config import RunConfig, make_run, merged, read_all
from avalanche_fmlora.results.record import run_id, write_atomically

OPTIONS = {
    "classifier": "class_mean",
    "pooling": "token_and_mean",
    "whitening": 0.3,
    "whitening_covariance": "secant",
}
KEY = ("benchmark", "class_order_seed", "method", "options", "run")
"""First fields of a CSV: which run a row is of; the last is the id of its whole configuration."""


def parser(description: str, out: str) -> argparse.ArgumentParser:
    """Arguments: methods, where their benchmark is described, where rows go."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("methods", nargs="*", help="each with options of its own, if any: 'fm_lora core_step=1.0'")
    made.add_argument("--config", type=Path, action="append", default=[], help="YAML files of a benchmark")
    made.add_argument("--class-order-seed", type=int, default=100)
    made.add_argument("--image-size", type=int, help="in place of the configured one")
    made.add_argument("--data-root", type=Path)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--out", type=Path, default=Path("benchmarks/results") / out)
    return made


def configurations(arguments: argparse.Namespace) -> Iterator[tuple[str, RunConfig]]:
    """Each method as it was given and the run that it means."""
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="no QP solver found|No loggers specified")
    if not arguments.methods and not arguments.out.is_file():
        raise SystemExit(f"No methods are given and there is no {arguments.out} to print: name methods, as 'fm_lora'.")
    shared = read_all(arguments.config)
    for axis in ("class_order_seeds", "seeds", "methods", "grid"):
        shared.pop(axis, None)
    if arguments.image_size is not None:
        shared = merged(shared, {"backbone": {"image_size": arguments.image_size}})
    for words in arguments.methods:
        name, *options = words.split()
        own = {**OPTIONS, **{k: yaml.safe_load(v) for k, _, v in (o.partition("=") for o in options)}}
        extra = {"method": name, "method_options": own, "class_order_seed": arguments.class_order_seed}
        yield words, make_run(merged(shared, extra))


def run_fields(config: RunConfig, benchmark: str) -> dict[str, Any]:
    """The fields of :data:`KEY`, of a run on data of that name."""
    return {
        "benchmark": benchmark,
        "class_order_seed": config.class_order_seed,
        "method": config.method,
        "options": json.dumps(config.method_options, sort_keys=True),
        "run": run_id(config.identity()),
    }


@torch.no_grad()
def encoded(strategy: Any, dataset: Any) -> tuple[Tensor, Tensor]:
    """Normalised features [M, D] and labels [M] of a data set under the model as it is."""
    pairs = [(F.normalize(strategy.features(x).float(), dim=-1), y) for x, y in strategy.batches(dataset.eval())]
    return torch.cat([z for z, _ in pairs]), torch.cat([y for _, y in pairs])


def write(path: Path, fields: Sequence[str], new: list[dict[str, Any]], key: Sequence[str] = KEY) -> None:
    """Into the CSV, in the place of older rows that agree in `key` with a new one."""
    replaced = {tuple(str(row[k]) for k in key) for row in new}
    old: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            old = [row for row in csv.DictReader(file) if tuple(row.get(k) for k in key) not in replaced]
    write_atomically(path, as_csv(fields, [*old, *new]))


def as_csv(fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A heading and a line for each row.

    Raises:
        ValueError: if a row has a field that is none of these.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
