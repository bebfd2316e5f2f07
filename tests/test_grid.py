"""The grid of a comparison: which runs come out, each once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from avalanche_fmlora import compare
from avalanche_fmlora.backbones import BackboneConfig
from avalanche_fmlora.cli.common import TEXTS, read_flags, read_list, read_pairs
from avalanche_fmlora.config import RunConfig, TrainingConfig
from avalanche_fmlora.data.config import BenchmarkConfig
from avalanche_fmlora.grid import expand
from avalanche_fmlora.results.record import run_id


def options_of(runs: list[Any], *names: str) -> list[tuple[Any, ...]]:
    return [(run.method, *(getattr(run.resolved_method(), name, None) for name in names)) for run in runs]


def test_every_combination_of_the_axes() -> None:
    runs = expand(
        {
            "benchmarks": ["split_glyphs", {"name": "domain_glyphs"}],
            "methods": ["ncm", {"method": "fm_lora", "rank": 4, "label": "small"}],
            "class_order_seeds": [0, None],
            "seeds": [1, 2, 3],
            "grid": {"training.epochs": [1, 2]},
            "training": {"batch_size": 8},
        }
    )
    seen = {(r.benchmark.name, r.method, r.class_order_seed, r.seed, r.training.epochs) for r in runs}
    assert len(runs) == len(seen) == 2 * 2 * 2 * 3 * 2
    assert {r.training.batch_size for r in runs} == {8}
    assert {(r.method, r.label, r.resolved_method().seed) for r in runs if r.seed == 3} == {
        ("ncm", None, 3),
        ("fm_lora", "small", 3),
    }


def test_a_field_of_one_method_does_not_multiply_the_others() -> None:
    grid = {"fm_lora.rank": [4, 8], "precision": ["fp32", "bf16"]}
    runs = expand({"methods": ["ncm", "fm_lora", "seq_lora"], "grid": grid}, [("seq_lora.rank", 2)])
    assert options_of(runs, "rank", "precision") == [
        ("ncm", None, "fp32"),
        ("fm_lora", 4, "fp32"),
        ("seq_lora", 2, "fp32"),
        ("ncm", None, "bf16"),
        ("fm_lora", 4, "bf16"),
        ("seq_lora", 2, "bf16"),
        ("fm_lora", 8, "fp32"),
        ("fm_lora", 8, "bf16"),
    ]


def test_a_call_has_the_same_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids: list[str] = []
    monkeypatch.setattr(
        "avalanche_fmlora.comparison.sweep", lambda runs, *_, **__: ids.extend(run_id(r.identity()) for r in runs) or []
    )
    axes: dict[str, Any] = {"benchmarks": ["split_glyphs", "domain_glyphs"], "grid": {"fm_lora.rank": [4, 8]}}
    compare(["fm_lora"], **axes, out=tmp_path)
    assert ids == [run_id(run.identity()) for run in expand({"methods": ["fm_lora"], **axes})]
    assert len(ids) == 4


def test_benchmarks_bring_options_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "benchmark: {name: domain_glyphs}\ntraining: {epochs: 2}\nclass_order_seeds: [5, 6]\nmethods: [ncm, joint]\n"
    )
    shared = {"training": {"epochs": 7, "batch_size": 9}, "methods": ["ncm"], "class_order_seeds": [1]}
    entries = [str(tmp_path / "own.yaml"), {"benchmark": {"n_experiences": 5}, "training": {"epochs": 3}}]
    found = [
        (r.benchmark.name, r.training.epochs, r.training.batch_size, r.class_order_seed, r.method)
        for r in expand({"benchmarks": entries, **shared})
    ]
    assert found == [
        *(("domain_glyphs", 2, 9, order, method) for order in (5, 6) for method in ("ncm", "joint")),
        ("split_glyphs", 3, 9, 1, "ncm"),
    ]
    flags = [("class_order_seeds", [8]), ("methods", ["joint"]), ("training.epochs", 4)]
    assert [(r.training.epochs, r.class_order_seed, r.method) for r in expand({"benchmarks": entries}, flags)] == [
        (4, 8, "joint")
    ] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": ["rank"]}, "Expected `grid` to be a mapping"),
        ({"grid": {"rank": 4}}, "Expected `rank` to be a list"),
        ({"grid": {"rank": []}}, "at least one entry"),
        ({"grid": {"seed": [0, 1]}}, "write `seeds` beside it"),
        ({"grid": {"rnak": [4]}}, "did you mean `rank`"),
        ({"grid": {"training.epochs": [0]}}, "greater than or equal to 1"),
        ({"benchmarks": [3]}, "Expected each of `benchmarks`"),
        ({"benchmarks": []}, "Expected `benchmarks` to be a list"),
        ({"benchmarks": ["split_glyps"]}, "benchmark.name"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand({"methods": ["fm_lora"], **options})


def test_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        expand({"benchmarks": ["nowhere.yaml"]})


def test_values_on_the_command_line() -> None:
    assert read_list("8,16") == [8, 16]
    assert read_list("bf16,null,1e-3,0.5") == ["bf16", None, 0.001, 0.5]
    assert read_list("[[0, 1], [2]]") == [[0, 1], [2]]
    assert read_pairs("--grid", ["fm_lora.lr-head=1=2", "a=b"]) == {"fm_lora.lr_head": "1=2", "a": "b"}
    words = ["--path", "photos #2", "--label=1:30", "--backbone.weights", "null", "--rank", "8 # few", "--lr-head=1e-3"]
    assert read_flags(words) == [
        ("path", "photos #2"), ("label", "1:30"), ("backbone.weights", None), ("rank", 8), ("lr_head", 0.001),
    ]  # fmt: skip
    parts = (RunConfig, BenchmarkConfig, BackboneConfig, TrainingConfig)
    plain = {n for c in parts for n, f in c.model_fields.items() if f.annotation in (str | None, Path | None)}
    assert plain == TEXTS
    with pytest.raises(ValueError, match="Expected --grid NAME=VALUE but got rank"):
        read_pairs("--grid", ["rank"])


@pytest.mark.parametrize("flags", [False, True])
def test_one_seed_order_or_method_is_an_axis_of_one_value(flags: bool) -> None:
    one: dict[str, Any] = {"method": "ncm", "seed": 3, "class_order_seed": None}
    configs = expand({"seeds": [0, 1], "methods": ["fm_lora"]}, list(one.items())) if flags else expand(one)
    assert [(c.method, c.seed, c.class_order_seed) for c in configs] == [("ncm", 3, None)]


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ({"seed": 1, "seeds": [1]}, [], "Expected `seed` or `seeds` but got both: leave one of them out"),
        ({}, [("method", "ncm"), ("methods", ["ncm"])], "Expected `method` or `methods` but got both"),
        (
            {"benchmarks": ["split_glyphs", "uneven_glyphs"]},
            [("benchmark.name", "domain_glyphs")],
            "Expected `benchmark` or `benchmarks` but got both",
        ),
        ({"grid": {"rank": [8, 16]}}, [("rank", 32)], "`rank` is given as one value and varied by `grid`"),
        (
            {"method_options": 5, "methods": ["ncm"]},
            [],
            "`method_options` to be a mapping of .* but got 5",
        ),
        ({"rank": 8, "method": "fm_lora"}, [], "no option `rank`, but fm_lora has: write it below `method_options`"),
    ],
)
def test_what_would_be_passed_over_is_refused(options: dict[str, Any], flags: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(options, flags)


def test_no_method_options_are_none() -> None:
    assert expand({"method_options": None, "methods": ["ncm"]})[0].method_options == {}


def test_a_field_of_the_grid_is_given_once() -> None:
    with pytest.raises(ValueError, match=r"--grid rank is given twice: .* with commas between"):
        read_pairs("--grid", ["rank=8", "rank=16"])


@pytest.mark.parametrize("text", ["", "0,,1", "8,"])
def test_a_list_has_no_empty_places(text: str) -> None:
    with pytest.raises(ValueError, match="Expected values with commas between but got"):
        read_list(text)


@pytest.mark.parametrize("name", ["seed", "class_order_seed", "method"])
def test_a_call_takes_lists_of_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"Expected `{name}s`, a list, but got `{name}`: write {name}s="):
        compare(["ncm"], out=tmp_path, **{name: 1})


def ranks(options: dict[str, Any], flags: Sequence[tuple[str, Any]] = ()) -> list[Any]:
    return [c.method_options.get("rank") for c in expand(options, flags)]


@pytest.mark.parametrize(
    ("flag", "grid"),
    [
        ("method_options.rank", "rank"),
        ("rank", "method_options.rank"),
        ("fm_lora.rank", "rank"),
        ("method-options.rank", "rank"),
        ("training.epochs", "training.epochs"),
    ],
)
def test_a_flag_for_what_the_grid_varies_is_refused_however_it_is_spelled(flag: str, grid: str) -> None:
    with pytest.raises(ValueError, match=rf"`{flag}` is given as one value and varied by `grid` \(`{grid}`\)"):
        expand({"methods": ["fm_lora"], "grid": {grid: [4, 8]}}, [(flag, 2)])


def test_what_is_said_of_one_method_goes_before_what_is_said_of_all() -> None:
    assert ranks({"methods": ["seq_lora", "fm_lora"], "grid": {"fm_lora.rank": [4, 8]}}, [("rank", 2)]) == [2, 4, 8]
    both = [("fm_lora.rank", 4), ("rank", 2)]
    for flags in (both, both[::-1]):
        assert ranks({"methods": ["seq_lora", "fm_lora"]}, flags) == [2, 4]
    entry = {"method": "fm_lora", "rank": 16}
    assert ranks({"methods": [entry]}, [("method_options.rank", 8)]) == [8], "flags go before all"
    assert ranks({"methods": [entry], "grid": {"method_options.rank": [8, 4]}}) == [8, 4]


@pytest.mark.parametrize("name", ["rank_selection.per_layer", "fm_lora.rank_selection.per_layer"])
def test_options_inside_of_a_part_stay_when_another_is_set(name: str) -> None:
    shared = {"method_options": {"rank_selection": {"sigma": 0.5}}, "methods": ["fm_lora"]}
    for runs in (
        expand(shared, [(name, True)]),
        expand({**shared, "grid": {name: [True]}}),
        expand({**shared, "methods": [{"method": "fm_lora", "rank_selection": {"per_layer": True}}]}),
    ):
        (run,) = runs
        assert run.method_options["rank_selection"] == {"sigma": 0.5, "per_layer": True}
    (run,) = expand({**shared, "methods": [{"method": "fm_lora", "rank_selection": None}]})
    assert run.method_options["rank_selection"] is None


def test_a_part_and_a_field_of_it_in_any_order() -> None:
    parts: list[tuple[str, list[Any]]] = [
        ("benchmark.n_experiences", [5, 10]),
        ("benchmark", [{"name": "split_glyphs"}, {"name": "uneven_glyphs"}]),
    ]
    for grid in (dict(parts), dict(parts[::-1])):
        runs = expand({"methods": ["ncm"], "grid": grid})
        found = {(r.benchmark.name, r.benchmark.n_experiences) for r in runs}
        assert found == {("split_glyphs", 5), ("split_glyphs", 10), ("uneven_glyphs", 5), ("uneven_glyphs", 10)}
    options = {"methods": ["ncm"], "training": {"epochs": 3}}
    (run,) = expand(options, [("training", {"batch_size": 8})])
    assert (run.training.epochs, run.training.batch_size) == (3, 8)
    assert options["training"] == {"epochs": 3}


@pytest.mark.parametrize("grid", [{"rank": [8, 8]}, {"training.num_workers": [0, 1]}])
def test_points_of_a_grid_that_are_the_same_runs_are_refused(grid: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="two points that are the same runs"):
        expand({"methods": ["fm_lora"], "grid": grid})
    assert len(expand({"methods": ["ncm", "fm_lora"], "grid": {"rank": (8, 16)}})) == 3, "ncm has no rank"


@pytest.mark.parametrize(("name", "part"), [("epochs", "training"), ("n_experiences", "benchmark")])
def test_a_bare_field_of_a_part_is_refused_as_it_would_be_joint_trainings_alone(name: str, part: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` belongs to `{part}`: write {part}={{'{name}': 5}}"):
        expand({"methods": ["seq_lora", "joint"]}, [(name, 5)])
    with pytest.raises(ValueError, match=f"`{name}` belongs to `{part}`"):
        expand({"methods": ["joint"], "grid": {name: [1, 2]}})
    (run,) = expand({"methods": ["joint"]}, [("joint.epochs", 3)])
    assert run.method_options["epochs"] == 3
