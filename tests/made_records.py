"""Records made by hand, for tests of tables and reports."""

from __future__ import annotations

from typing import Any

from avalanche_fmlora.metrics import summarize
from avalanche_fmlora.results.record import Record, blank_record


def make(
    final: float = 0.5,
    *,
    method: str = "fmlora",
    order: int | None = 0,
    seed: int = 0,
    label: str | None = None,
    options: dict[str, Any] | None = None,
    benchmark: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    error: str | None = None,
    split_hash: str = "a" * 64,
    joint: bool = False,
    statistics: int | None = 0,
    domains: str = "",
) -> Record:
    """A run of two experiences (10 and 30 test images) with R = [[0.75, -], [final, 0.25]].

    `domains` names these in order, a letter each.
    """
    record = blank_record(
        {
            "method": method,
            "method_options": {"seed": seed, **(options or {})},
            "benchmark": {"name": "glyphs", "n_experiences": 2} | (benchmark or {}),
            "backbone": {"name": "embedded"},
            "training": {"epochs": 1, "batch_size": 32} | (training or {}),
            "seed": seed,
            "class_order_seed": order,
            "label": label,
        }
    )
    if error is not None:
        record["error"] = error
        return record
    record["status"], record["error"] = "finished", None
    record["benchmark"] |= {"experience_names": ["a", "b"], "n_test": [10, 30], "split_hash": split_hash}
    if domains:
        record["benchmark"] |= {"experience_names": list(domains), "class_order": [0, 1]}
    record["accuracy_matrix"] = [[None if joint else 0.75, None], [final, 0.25]]
    record["metrics"] = summarize(record["accuracy_matrix"], [10, 30])  # type: ignore[typeddict-item]
    record["cost"] |= {"train_s": 2.0 + seed, "peak_memory_bytes": 1000}
    record["experiences"] = [
        {
            "experience": t,
            "name": "all" if joint else "ab"[t],
            "rank": 8 * (t + 1),
            "ranks_per_layer": [4, 8],
            "complexity": 0.5,
            "similarity": None if t == 0 else 0.25,
            "trainable_parameters": 10 + t,
            "trained_parameters": 10 + t,
            "stored_parameters": 1000 + t,
            "stored_statistics": statistics,
            "head_parameters": 20 * (t + 1),
            "train_s": 1.0,
            "eval_s": 0.5,
            "data_wait_s": 0.25,
        }
        for t in range(2)
    ][joint:]
    return record
