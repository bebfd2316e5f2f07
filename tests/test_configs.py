"""Every committed configuration is one that the command line takes, and says what its paper says."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest

from avalanche_fmlora.config import RunConfig, make_run, read_all, read_yaml
from avalanche_fmlora.data.base import order_of
from avalanche_fmlora.grid import expand
from avalanche_fmlora.results.record import run_id
from avalanche_fmlora.strategies.registry import methods

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "benchmarks" / "configs"
RUN_HERE = ("split_glyphs", "domain_glyphs", "uneven_glyphs", "caltech100", "emoji20")
ON_A_GPU = ("split_cifar100", "split_imagenet_r", "split_cub200", "domainnet", "domainnet_cil")
FILES = sorted(CONFIGS.rglob("*.yaml"), key=str)
WEIGHTS = "vit_base_patch16_224.augreg_in21k_ft_in1k"


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def run_of(benchmark: str, method: str) -> RunConfig:
    return make_run(read_yaml(CONFIGS / benchmark / f"{method}.yaml"))


def number_of_experiences(config: RunConfig) -> int:
    return config.benchmark.n_experiences or 6


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_is_parsed_and_all_its_fields_are_known(path: Path) -> None:
    options = read_yaml(path)
    configs = expand(options)
    wanted = [m if isinstance(m, str) else m["method"] for m in options.get("methods", [])]
    named = {options["method"]} if "method" in options else set(methods())
    assert {c.method for c in configs} == (set(wanted) or named)
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
    configs = expand(read_all([CONFIGS / f"{benchmark}.yaml", CONFIGS / "unified.yaml"]))
    numbers = {0, 1, 3, 4, 5} if benchmark == "domain_glyphs" else {0, 1, 2, 3, 4}  # 2 would repeat 0 there
    check_unified(configs, numbers, labels={"ncm, whitened rows", "ncm, FM-LoRA's head", "covariance kept"})


@pytest.mark.parametrize(("benchmark", "domains"), [("domain_glyphs", 5), ("emoji20", 4)])
def test_orders_of_domains_differ(benchmark: str, domains: int) -> None:
    numbers = read_yaml(CONFIGS / f"{benchmark}.yaml")["class_order_seeds"]
    assert len({order_of(domains, number) for number in numbers}) == len(numbers) == 5


@pytest.mark.parametrize("benchmark", ON_A_GPU)
def test_unified_of_the_published_benchmarks(benchmark: str) -> None:
    configs = expand(read_yaml(CONFIGS / benchmark / "unified.yaml"))
    check_unified(configs, {0, 1, 2, 3, 4})
    assert {c.training.batch_size for c in configs} == {128}


def check_unified(configs: list[RunConfig], orders: Set[int], labels: Set[str] = frozenset()) -> None:
    """Each method once, and the further rows of these labels."""
    assert {c.method for c in configs} == set(methods())
    assert {c.label for c in configs} == {None, *labels}
    assert len({c.training for c in configs}) == 1
    assert {c.class_order_seed for c in configs} == orders
    assert len({run_id(c.identity()) for c in configs}) == len(configs) == len(orders) * (len(methods()) + len(labels))
    assert len({(c.benchmark, c.backbone.model_dump_json()) for c in configs}) == 1


@pytest.mark.parametrize("benchmark", ON_A_GPU)
def test_each_method_has_its_file_and_all_see_the_same_images(benchmark: str) -> None:
    folder = CONFIGS / benchmark
    assert {p.stem for p in folder.glob("*.yaml")} == {"benchmark", "unified", *methods()}
    configs = [*(run_of(benchmark, m) for m in methods()), *expand(read_yaml(folder / "unified.yaml"))]
    assert len({(c.benchmark, c.backbone.model_dump_json()) for c in configs}) == 1
    assert configs[0].benchmark.name == benchmark
    assert configs[0].benchmark.augment == "published"
    assert (configs[0].backbone.name, configs[0].backbone.normalize) == (WEIGHTS, "unit")
    assert {c.method: c.label for c in configs[: len(methods())]}.keys() == methods().keys()
    assert all(c.label for c in configs[: len(methods())])


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


EPOCHS = {
    "coda_prompt": (20, 50, 50, 5, 5),
    "inflora": (20, 50, 50, 5, 5),
    "sd_lora": (20, 50, 50, 5, 5),
    "l2p": (5, 50, 50, 5, 5),
    "dual_prompt": (5, 50, 50, 5, 5),
}
BATCH = {"coda_prompt": 128, "inflora": 128, "sd_lora": 128, "l2p": 16, "dual_prompt": 24}


@pytest.mark.parametrize("method", EPOCHS)
def test_published_epochs_and_batches(method: str) -> None:
    trainings = [run_of(benchmark, method).training for benchmark in ON_A_GPU]
    assert tuple(t.epochs for t in trainings) == EPOCHS[method]
    assert {t.batch_size for t in trainings} == {BATCH[method]}


@pytest.mark.parametrize("benchmark", ON_A_GPU)
def test_published_rates(benchmark: str) -> None:
    def options(method: str) -> Any:
        return run_of(benchmark, method).resolved_method()

    per_batch = 0.005 if benchmark in ("split_imagenet_r", "split_cub200") else 0.03
    for method in ("l2p", "dual_prompt"):
        rate = pytest.approx(per_batch * BATCH[method] / 256)
        assert (options(method).lr_prompt, options(method).lr_head) == (rate, rate)
        assert (options(method).lr_schedule, options(method).clip_grad_norm) == ("constant", 1.0)
        assert (options(method).optimizer, options(method).weight_decay) == ("adam", 0.0)
    assert (options("l2p").pool_size, options("l2p").prompt_length, options("l2p").top_k) == (10, 5, 5)
    assert options("l2p").pull_weight == 0.1
    assert options("dual_prompt").pull_weight == 1.0
    longer = benchmark in ("split_imagenet_r", "split_cub200")
    assert (options("dual_prompt").g_length, options("dual_prompt").e_length) == (5, 20 if longer else 5)
    coda = options("coda_prompt")
    assert (coda.lr_prompt, coda.lr_head, coda.lr_schedule, coda.ortho_weight) == (1e-3, 1e-3, "coda", 0.0)
    assert (coda.optimizer, coda.prompt_length, coda.blocks) == ("adam", 8, (0, 1, 2, 3, 4))
    inflora = options("inflora")
    assert (inflora.rank, inflora.lr_lora, inflora.optimizer) == (10, 5e-4, "adam")
    assert inflora.threshold == (0.98 if benchmark == "split_imagenet_r" else 0.95)
    assert (options("sd_lora").rank, options("sd_lora").magnitude) == (10, 0.8)


@pytest.mark.parametrize("benchmark", ON_A_GPU)
def test_unified_rates_of_the_prompt_methods_belong_to_its_batch(benchmark: str) -> None:
    for config in expand(read_yaml(CONFIGS / benchmark / "unified.yaml")):
        if config.method in ("l2p", "dual_prompt"):
            options: Any = config.resolved_method()
            assert options.lr_prompt == options.lr_head == pytest.approx(0.03 * config.training.batch_size / 256)


@pytest.mark.parametrize(
    ("benchmark", "experiences"),
    [(b, n) for b in ON_A_GPU for n in ((5, 10, 20) if b in ("split_imagenet_r", "split_cifar100") else (None,))],
)
def test_codas_components_divide_among_the_experiences(benchmark: str, experiences: int | None) -> None:
    flags = [] if experiences is None else [("benchmark.n_experiences", experiences)]
    for name in ("unified", "coda_prompt"):
        config = next(
            c for c in expand(read_yaml(CONFIGS / benchmark / f"{name}.yaml"), flags) if c.method == "coda_prompt"
        )
        pool: Any = config.resolved_method()
        assert pool.pool_size % number_of_experiences(config) == 0
        assert pool.pool_size == (102 if benchmark == "domainnet" else 100)


@pytest.mark.parametrize("benchmark", ON_A_GPU)
def test_fm_lora_has_the_librarys_defaults_but_for_its_teacher_which_random_crops_would_silence(benchmark: str) -> None:
    unified = expand(read_yaml(CONFIGS / benchmark / "unified.yaml"))
    for config in (run_of(benchmark, "fm_lora"), *(c for c in unified if c.method == "fm_lora")):
        options: Any = config.resolved_method()
        assert options.model_fields_set == {"precision", "seed", "teacher"}
        assert (config.benchmark.augment, options.teacher) == ("published", "every_step")


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


def expected_hours() -> Any:
    spec = importlib.util.spec_from_file_location("expected_hours", ROOT / "benchmarks" / "expected_hours.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_expected_hours_are_those_of_the_formula_and_of_the_readme() -> None:
    script = expected_hours()
    assert set(script.METHODS) == set(methods())
    config = run_of("split_cifar100", "coda_prompt")
    passes = 50_000 * 20 * 3 + 55_000 * 2  # 10 + 20 + … + 100 classes at 100 test images, two passes each
    assert script.image_passes(config) == passes
    assert script.hours(config, "A100") == pytest.approx(passes * 2 * 17.6e9 / (0.4 * 312e12) / 3600)
    assert script.table() in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
