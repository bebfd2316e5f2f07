"""Every committed configuration is one that the command line takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from avalanche_fmlora.config import make_run, read_all, read_yaml
from avalanche_fmlora.grid import expand
from avalanche_fmlora.results.record import run_id
from avalanche_fmlora.strategies.registry import methods

CONFIGS = Path(__file__).resolve().parents[1] / "benchmarks" / "configs"
BENCHMARKS = ("split_glyphs", "domain_glyphs", "caltech100", "emoji20")
PUBLISHED = sorted(p.stem for p in (CONFIGS / "published").glob("*.yaml"))


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_unified_is_all_methods_with_one_training(benchmark: str) -> None:
    configs = expand(read_all([CONFIGS / f"{benchmark}.yaml", CONFIGS / "unified.yaml"]))
    assert {c.method for c in configs} == set(methods())
    assert len({c.training for c in configs}) == 1
    assert {c.class_order_seed for c in configs} == {0, 1, 2}
    assert len({run_id(c.identity()) for c in configs}) == len(configs) == 3 * len(methods())
    assert len({(c.benchmark, c.backbone.model_dump_json()) for c in configs}) == 1


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("method", PUBLISHED)
def test_published_recipes_fit_each_benchmark(benchmark: str, method: str) -> None:
    options = read_all([CONFIGS / f"{benchmark}.yaml", CONFIGS / "published" / f"{method}.yaml"])
    options.pop("class_order_seeds")
    config = make_run(options)
    assert config.method == method
    written = read_yaml(CONFIGS / "published" / f"{method}.yaml")
    assert config.training.epochs == written["training"]["epochs"]
    resolved = config.resolved_method()
    assert all(getattr(resolved, k) == v for k, v in written["method_options"].items())


def test_each_prompt_and_lora_relative_has_a_published_recipe() -> None:
    assert PUBLISHED == ["coda_prompt", "dual_prompt", "inflora", "l2p", "sd_lora"]


def test_a_later_file_goes_before_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("training: {epochs: 1, batch_size: 4}\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("training: {epochs: 2}\n")
    options = read_all([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert options == {"training": {"epochs": 2, "batch_size": 4}, "seed": 1}
