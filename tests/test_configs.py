"""Every committed configuration is one that the command line takes, and says what its paper says."""

from __future__ import annotations

from pathlib import Path

import pytest

from avalanche_fmlora.config import RunConfig, make_run, read_all, read_yaml
from avalanche_fmlora.grid import expand
from avalanche_fmlora.results.record import run_id
from avalanche_fmlora.strategies.registry import methods

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "benchmarks" / "configs"
RUN_HERE = ("split_glyphs", "domain_glyphs", "caltech100", "emoji20")
FILES = sorted(CONFIGS.rglob("*.yaml"), key=str)


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_is_parsed_and_all_its_fields_are_known(path: Path) -> None:
    options = read_yaml(path)
    configs = expand(options)
    wanted = [m if isinstance(m, str) else m["method"] for m in options.get("methods", [])]
    assert {c.method for c in configs} == set(wanted or [options["method"]] if "method" in options else methods())
    if "method" in options:
        assert configs == [make_run(options)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_field_that_does_not_exist_would_be_found(path: Path) -> None:
    options = read_yaml(path)
    for part in ("benchmark", "backbone", "training"):
        with pytest.raises(ValueError, match=rf"the configuration has no option `{part}\.epohcs`"):
            expand({**options, part: {**options.get(part, {}), "epohcs": 1}})
    with pytest.raises(ValueError, match="has no option `rnk`"):
        expand({**options, "method_options": {**options.get("method_options", {}), "rnk": 1}})


@pytest.mark.parametrize("benchmark", RUN_HERE)
def test_unified_is_all_methods_with_one_training(benchmark: str) -> None:
    check_unified(expand(read_all([CONFIGS / f"{benchmark}.yaml", CONFIGS / "unified.yaml"])), 3)


def check_unified(configs: list[RunConfig], orders: int) -> None:
    assert {c.method for c in configs} == set(methods())
    assert len({c.training for c in configs}) == 1
    assert {c.class_order_seed for c in configs} == set(range(orders))
    assert len({run_id(c.identity()) for c in configs}) == len(configs) == orders * len(methods())
    assert len({(c.benchmark, c.backbone.model_dump_json()) for c in configs}) == 1


@pytest.mark.parametrize("benchmark", RUN_HERE)
@pytest.mark.parametrize("method", sorted(methods()))
def test_recipes_fit_the_other_benchmarks_too(benchmark: str, method: str) -> None:
    recipe = CONFIGS / "published" / f"{method}.yaml"
    options = read_all([CONFIGS / f"{benchmark}.yaml", recipe])
    configs = expand(options)
    written = read_yaml(recipe)
    assert len(configs) == len(options["class_order_seeds"])
    for config in configs:
        assert (config.method, config.training.epochs) == (method, written["training"]["epochs"])
        resolved = config.resolved_method()
        assert all(getattr(resolved, k) == v for k, v in written.get("method_options", {}).items())


def test_a_later_file_goes_before_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("training: {epochs: 1, batch_size: 4}\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("training: {epochs: 2}\n")
    options = read_all([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert options == {"training": {"epochs": 2, "batch_size": 4}, "seed": 1}


def test_a_file_goes_before_its_bases_which_lie_beside_it(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text("training: {epochs: 1, batch_size: 4}\nseed: 1\n")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.yaml").write_text("base: ../low.yaml\nmethod: ncm\n")
    (tmp_path / "inner" / "b.yaml").write_text("training: {epochs: 3}\n")
    (tmp_path / "inner" / "c.yaml").write_text("base: [a.yaml, b.yaml]\nseed: 2\n")
    expected = {"training": {"epochs": 3, "batch_size": 4}, "seed": 2, "method": "ncm"}
    assert read_yaml(tmp_path / "inner" / "c.yaml") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: a.yaml\n", r"a.yaml is its own base, by way of .*a.yaml"),
        ("base: b.yaml\n", r"a.yaml is its own base, by way of .*b.yaml"),
        ("base: 3\n", r"Expected `base` of .*a.yaml to be a file or a list of files but got 3"),
    ],
)
def test_bases_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "a.yaml")


def test_a_missing_base_names_who_wants_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: gone.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*gone.yaml, a base of .*a.yaml"):
        read_yaml(tmp_path / "a.yaml")
