from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from avalanche_fmlora.config import RunConfig, by_id, find_data, located, make_run, read_yaml
from avalanche_fmlora.data.config import BenchmarkConfig
from avalanche_fmlora.grid import expand
from avalanche_fmlora.planning import plan
from avalanche_fmlora.results.record import blank_record, run_id, write_record
from avalanche_fmlora.resuming import known_record
from avalanche_fmlora.strategies.config import validate
from avalanche_fmlora.strict import load_yaml
from avalanche_fmlora.sweep import sweep


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainning": {}}, "did you mean `training`"),
        ({"epochs": 3}, r"has no option `epochs`: it belongs to `training`, so write training: \{epochs: …\}"),
        ({"method_options": {"epochs": 3}}, r"fm_lora has no option `epochs`: it belongs to `training`"),
        ({"training": {"epoch": 3}}, r"`training.epoch`: did you mean `epochs`"),
        ({"training": {"epochs": 0}}, r"`training.epochs` = 0"),
        ({"method": "fm_lor"}, "did you mean 'fm_lora'"),
        ({"method_options": {"rnak": 8}}, "did you mean `rank`"),
        ({"method_options": {"rank_selection": {"sigm": 1}}}, r"`rank_selection.sigm`: did you mean `sigma`"),
        ({"benchmark": {"name": "split_glyph"}}, "split_glyphs"),
        ({"seed": True}, "`seed` = True: expected a number, not a truth value"),
        ({"training": {"epochs": True}}, r"`training.epochs` = True: expected a number"),
        ({"benchmark": {"n_experiences": True}}, r"`benchmark.n_experiences` = True: expected a number"),
        ({"backbone": {"image_size": True}}, r"`backbone.image_size` = True: expected a number"),
        ({"method_options": {"core_step": False}}, r"`core_step` = False: expected a number"),
        ({"method_options": {"rank_selection": {"sigma": True}}}, r"`rank_selection.sigma` = True: expected a number"),
        ({"method_options": {"rank_selection": {"candidates": [True, 4]}}}, r"expected a number, not a truth value"),
        ({"seed": -1}, "the configuration: `seed` = -1"),
        ({"class_order_seed": -1}, "`class_order_seed` = -1"),
        ({"method_options": {"seed": -1}}, "fm_lora: `seed` = -1"),
    ],
)
def test_a_wrong_field_is_named_with_the_nearest_right_one(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_run(options)


def test_the_identity_has_all_defaults_and_no_folder() -> None:
    config = make_run(
        {
            "benchmark": {"name": "image_folder", "path": "/somewhere/photos.zip"},
            "backbone": {"name": "test_vit", "weights": "/elsewhere/w.safetensors"},
            "method_options": {"rank": 8},
        }
    )
    identity = config.identity()
    assert identity["method_options"]["rank"] == 8
    assert identity["method_options"]["rank_selection"]["sigma"] == 0.25
    assert identity["benchmark"]["path"] == "photos.zip"
    assert identity["backbone"]["weights"] == "w.safetensors"


def test_a_default_written_out_is_the_same_run() -> None:
    plain, written = make_run({}), make_run({"training": {"epochs": make_run({}).training.epochs}})
    assert run_id(plain.identity()) == run_id(written.identity())
    assert run_id(plain.identity()) != run_id(make_run({"seed": 1}).identity())


def test_numbers_of_numpy_are_numbers() -> None:
    options = {"rank": np.int64(8), "lr_core": np.float64(1e-3)}
    plain = make_run({"method_options": {"rank": 8, "lr_core": 1e-3}})
    assert run_id(make_run({"method_options": options}).identity()) == run_id(plain.identity())


def test_the_seed_of_a_run_is_the_seed_of_its_method() -> None:
    assert make_run({"seed": 7}).resolved_method().seed == 7
    assert make_run({"seed": 7, "method_options": {"seed": 3}}).resolved_method().seed == 3


def test_yaml_takes_floats_in_any_form(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method_options: {lr_core: 1e-3}\ntraining: {epochs: 2}\n")
    config = make_run(read_yaml(file))
    assert config.resolved_method().lr_core == 1e-3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "field: value"),
        ("a: [1", "no valid YAML"),
        (
            "training: {epochs: 2}\nseed: 1\ntraining: {batch_size: 8}\n",
            r"`training` stands there a second time.*\n.*line 3",
        ),
        ("methods:\n- {method: ncm, label: a, label: a}\n", "`label` stands there a second time"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(file)
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        read_yaml(tmp_path / "none.yaml")


def test_yaml_may_merge_what_it_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "training: &a {epochs: 2, batch_size: 8}\nmethod_options: &b {<<: *a, epochs: 3}\nx: {<<: *b, epochs: 4}\n"
    )
    assert read_yaml(file)["x"] == {"epochs": 4, "batch_size": 8}


def test_data_are_found_below_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos.zip").touch()
    monkeypatch.delenv("AVALANCHE_FMLORA_DATA", raising=False)
    assert find_data(Path("photos.zip"), tmp_path) == tmp_path / "photos.zip"
    monkeypatch.setenv("AVALANCHE_FMLORA_DATA", str(tmp_path))
    assert find_data(Path("photos.zip"), None) == tmp_path / "photos.zip"
    with pytest.raises(FileNotFoundError, match="--data-root"):
        find_data(Path("other.zip"), None)


def test_a_grid_is_methods_times_orders_times_seeds() -> None:
    configs = expand(
        {"methods": ["ncm", {"method": "seq_lora", "rank": 4}], "class_order_seeds": [0, 1], "seeds": [0, 1, 2]}
    )
    assert len(configs) == 12
    assert {(c.method, c.class_order_seed, c.seed) for c in configs} == {
        (m, o, s) for m in ("ncm", "seq_lora") for o in (0, 1) for s in (0, 1, 2)
    }
    assert {c.method_options.get("rank") for c in configs if c.method == "seq_lora"} == {4}


def test_flags_reach_the_methods_that_have_them() -> None:
    flags = [("fm_lora.rank", 8), ("precision", "bf16"), ("training.epochs", 2), ("lr_lora", 1e-4)]
    configs = {c.method: c for c in expand({"methods": ["fm_lora", "seq_lora", "ncm"]}, flags)}
    assert configs["fm_lora"].method_options == {"rank": 8, "precision": "bf16"}
    assert configs["seq_lora"].method_options == {"precision": "bf16", "lr_lora": 1e-4}
    assert configs["ncm"].method_options == {"precision": "bf16"}
    assert {c.training.epochs for c in configs.values()} == {2}
    with pytest.raises(ValueError, match="did you mean `lr_lora`"):
        expand({"methods": ["seq_lora"]}, [("lr_lorra", 1)])
    with pytest.raises(ValueError, match="at least one entry"):
        expand({"methods": []})


def test_two_labels_of_one_run_are_said(caplog: pytest.LogCaptureFixture) -> None:
    runs = [make_run({"label": label, "method_options": rank}) for label, rank in ((None, {}), ("wide", {"rank": 32}))]
    assert [run.label for run in by_id(runs).values()] == [None]
    assert "labels, None and 'wide'" in caplog.text
    caplog.clear()
    assert len(by_id([runs[0], runs[0]])) == 1
    assert not caplog.text


def test_a_finished_run_keeps_its_label_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, named = make_run({}), make_run({"label": "mine"})
    record = {**blank_record(plain.identity()), "status": "failed"}
    path = write_record(record, tmp_path)
    assert known_record(plain, tmp_path, failed=True) is not None
    assert not caplog.text
    assert known_record(named, tmp_path, failed=True)["config"]["label"] is None
    assert "under the label None and keeps it, not 'mine'" in caplog.text
    assert path.match(f"*-{record['id']}.json")


def test_two_files_of_one_name_are_not_one_run(tmp_path: Path) -> None:
    runs = [
        make_run({"method": "ncm", "benchmark": {"name": "image_folder", "path": tmp_path / side / "photos"}})
        for side in ("left", "right")
    ]
    with pytest.raises(ValueError, match="would have one record"):
        sweep(runs, tmp_path / "records")
    with pytest.raises(ValueError, match="would have one record"):
        plan(runs, tmp_path / "records")
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("path", [".", "..", "../pets", "inner/.."])
def test_a_run_has_one_id_wherever_its_path_is_told_from(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pets" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "pets")
    config = make_run({"method": "ncm", "benchmark": {"name": "image_folder", "path": path}})
    assert located(config, None).identity() == config.identity()
    assert config.identity()["benchmark"]["path"] == ("pets" if path != ".." else tmp_path.name)


def test_a_whole_published_data_set_is_one_wherever_it_lies(tmp_path: Path) -> None:
    benchmarks = [{"name": "split_cifar100", "path": tmp_path / side / "cifar"} for side in ("left", "right")]
    assert len(by_id([make_run({"method": "ncm", "benchmark": benchmark}) for benchmark in benchmarks])) == 1


def test_options_that_are_no_mapping_are_named() -> None:
    with pytest.raises(ValueError, match=r"the configuration: got 'x': Input should be a valid dictionary"):
        validate(RunConfig, "x", "the configuration")  # type: ignore[arg-type]


def test_a_flag_replaces_no_value_of_another_kind() -> None:
    """Or another benchmark than the named one would run, with the flag's option."""
    with pytest.raises(
        ValueError, match=r"`benchmark` to hold options, as `benchmark.n_experiences` .*'uneven_glyphs'"
    ):
        expand({"benchmark": "uneven_glyphs", "methods": ["ncm"]}, [("benchmark.n_experiences", 5)])
    built = BenchmarkConfig(name="uneven_glyphs")
    grid = {"benchmark.n_experiences": [5, 10]}
    runs = expand({"benchmark": built, "methods": ["ncm"], "grid": grid})
    assert [(r.benchmark.name, r.benchmark.n_experiences) for r in runs] == [
        ("uneven_glyphs", 5),
        ("uneven_glyphs", 10),
    ]
    assert built.n_experiences is None, "what was given is left alone"
    (run,) = expand({"methods": [{"method": "fm_lora", "rank_selection": None}]}, [("rank_selection.sigma", 0.5)])
    assert run.method_options["rank_selection"]["sigma"] == 0.5


@pytest.mark.parametrize("text", ["1:5", "0:30", "1:30.5", "0o17", "08"])
def test_numbers_of_old_yaml_are_text(text: str) -> None:
    """YAML 1.1 reads 1:30 as 90: `--class-orders 1:5` was order 65."""
    assert load_yaml(text) == text


def test_numbers_are_those_of_yaml_1_2() -> None:
    read = load_yaml("[0, -3, +4, 1_000, 0x1F, 1e-3, 1.5e3, .5, 1., 7.0e-4, -.inf]")
    assert read == [0, -3, 4, 1000, 31, 1e-3, 1500.0, 0.5, 1.0, 7e-4, float("-inf")]
    assert [type(value) for value in read] == [int] * 5 + [float] * 6
