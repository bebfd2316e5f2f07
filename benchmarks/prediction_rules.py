"""How much of a result is the classifier: one run, its class means read by several rules.

    python benchmarks/prediction_rules.py --config benchmarks/configs/caltech100.yaml --class-order-seed 100 fm_lora ncm

Each method trains once, with `class_mean` rows; after every experience the test images seen so far are encoded once and
classified by each rule, so rules differ in nothing else. They are plain cosines to the class means, and cosines after
whitening with shrinkage λ, by the covariance of the current experience alone (nothing kept), by what the rows remember
of the past (nothing but rows kept; one λ, 0.3 unless `whitening=…` says otherwise) or by the mean over all experiences
so far (D x D numbers kept). Two more rules see what no method may, all training images so far under the model as it is:
their covariance, and their class means as well; what they gain says what forgetting costs, and what is left is the
features'. Rows go to the CSV; those of the same run, by its id, are replaced.
Without methods, the CSV is printed as a table.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from one_run import KEY, configurations, encoded, parser, run_fields, write
from torch import Tensor

from avalanche_fmlora.config import RunConfig
from avalanche_fmlora.experiment import make_backbone, make_benchmark, make_strategy
from avalanche_fmlora.metrics import summarize
from avalanche_fmlora.modules.class_rows import (
    class_means,
    trace_normalized,
    whitened_rows,
    within_class_covariance,
)
from avalanche_fmlora.plugins._passes import training_features

SHRINKAGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
METRICS = ("final_average_accuracy", "average_anytime_accuracy", "forgetting", "learning_accuracy")
SHOWN = {
    "cosine": "cosines",
    "whitened, current, λ=0.1": "whitened, λ = 0.1",
    "whitened, current, λ=1": "whitened, λ = 1",
    "whitened, current, λ=10": "whitened, λ = 10",
    "whitened, secant": "remembered, λ = 0.3",
    "whitened, running, λ=0.1": "covariance kept, λ = 0.1",
    "whitened, running, λ=1": "covariance kept, λ = 1",
    "covariance of all images": "*true covariance*",
    "covariance and means of all images": "*true means too*",
}
FEATURES = {"model": "class token", "token_and_mean": "token and mean", "multi_layer": "four blocks"}
FIELDS = (*KEY, "rule", *METRICS)


ALL_SEEING = 0.1
"""Shrinkage of the rules that see all images: the best, or within 0.2 points of it, on frozen and adapted features."""


def prediction_rows(means: Tensor, current: Tensor, running: Tensor) -> dict[str, Tensor]:
    """Rows [K, C, D] of each rule from class means [K, C, D] and the two covariances [D, D]."""
    rules = {"cosine": F.normalize(means, dim=-1)}
    for name, found in (("whitened, current", current), ("whitened, running", running)):
        covariance = trace_normalized(found)
        for shrinkage in SHRINKAGES:
            rows = whitened_rows(means.flatten(0, 1), covariance, shrinkage)
            rules[f"{name}, λ={shrinkage:g}"] = rows.view_as(means)
    return rules


def all_seeing_rows(means: Tensor, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Rows [1, C, D] from all training images so far [M, D]: their covariance with class means [C, D], or their own."""
    covariance = trace_normalized(within_class_covariance(features, labels))
    classes = labels.unique()
    true = means.clone()
    true[classes] = class_means(features, labels, classes)[0].to(means)
    named = {"covariance of all images": means, "covariance and means of all images": true}
    return {name: whitened_rows(rows, covariance, ALL_SEEING)[None] for name, rows in named.items()}


def run(config: RunConfig, data_root: Path | None) -> Iterator[dict[str, Any]]:
    """One row of the CSV for each rule."""
    backbone = make_backbone(config, data_root)
    benchmark = make_benchmark(config, backbone, data_root)
    count = len(benchmark.train_stream)
    torch.manual_seed(config.seed)
    strategy = make_strategy(config, backbone, "cpu", count)
    matrices: dict[str, list[list[float | None]]] = {}
    running, samples = torch.zeros(()), 0
    for t, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        strategy.model.eval()
        strategy.experience = experience  # whose images the covariance is of
        features, labels = training_features(strategy)
        current, samples = within_class_covariance(features, labels), samples + len(labels)
        running = running + (current - running) * len(labels) / samples
        head = strategy.model.head
        rules = prediction_rows(head.means if len(head.means) else head.rows[None], current, running)
        if strategy.config.whitening_covariance == "secant":
            rules["whitened, secant"] = head.folded
        if not len(head.means):  # a class that recurs has a mean for each experience, and its images no one of them
            past = [encoded(strategy, e.dataset) for e in benchmark.train_stream[: t + 1]]
            rules |= all_seeing_rows(head.rows, *(torch.cat(parts) for parts in zip(*past, strict=True)))
        for name in rules:
            matrices.setdefault(name, []).append([None] * count)
        for i in range(t + 1):
            z, y = encoded(strategy, benchmark.test_stream[i].dataset)
            for name, rows in rules.items():
                logits = (z @ rows.flatten(0, 1).T).unflatten(-1, rows.shape[:2]).amax(-2)
                predicted = logits.masked_fill(~head.seen, float("-inf")).argmax(-1)
                matrices[name][t][i] = float((predicted == y).float().mean())
    known = run_fields(config, benchmark.info.name)
    for name, matrix in matrices.items():
        metrics = summarize(matrix, benchmark.info.n_test)
        yield {**known, "rule": name, **{k: f"{metrics[k]:.4f}" for k in METRICS}}


def table(path: Path) -> str:
    """Markdown: final average accuracy and forgetting in per cent, a row a run, a column for some of the rules."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    runs = dict.fromkeys(tuple(row[k] for k in KEY) for row in rows)
    lines = ["| benchmark | method | features | " + " | ".join(SHOWN.values()) + " |", "|---" * (3 + len(SHOWN)) + "|"]
    for run_ in runs:
        of_run = {row["rule"]: row for row in rows if tuple(row[k] for k in KEY) == run_}
        cells = [_cell(of_run.get(rule)) for rule in SHOWN]
        features = FEATURES[json.loads(run_[3])["pooling"]]
        lines.append(f"| {run_[0]} | {run_[2]} | {features} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, str] | None) -> str:
    """Final average accuracy and forgetting in per cent; a dash where a run was not read by that rule."""
    return "–" if row is None else " / ".join(f"{100 * float(row[key]):.1f}" for key in (METRICS[0], "forgetting"))


def main() -> None:
    arguments = parser(str(__doc__), "prediction_rules.csv").parse_args()
    for words, config in configurations(arguments):
        rows = list(run(config, arguments.data_root))
        write(arguments.out, FIELDS, rows)
        for row in rows:
            print(f"{words:30} {row['rule']:28} FAA {row[METRICS[0]]}  forgetting {row['forgetting']}", flush=True)
    if not arguments.methods:
        print(table(arguments.out))


if __name__ == "__main__":
    main()
