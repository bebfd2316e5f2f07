"""BenchmarkConfig: what each benchmark takes, what a record keeps of it, and where its files are looked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import avalanche_fmlora
from avalanche_fmlora.config import RunConfig, find_data, make_run
from avalanche_fmlora.config import located as located_run
from avalanche_fmlora.data import published
from avalanche_fmlora.data.config import BenchmarkConfig
from avalanche_fmlora.experiment import make_backbone, make_benchmark
from avalanche_fmlora.grid import expand

PUBLISHED = ("split_cifar100", "split_imagenet_r", "split_cub200", "domainnet", "domainnet_cil")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "split_glyphs", "download": True}, "`split_glyphs` takes no `download`, since its images are drawn"),
        ({"name": "split_glyphs", "augment": "flip", "path": "x"}, "takes no `path` and no `augment`"),
        ({"name": "domain_glyphs", "n_experiences": 2}, "takes no `n_experiences`, since .* one experience a style"),
        ({"name": "image_folder"}, "needs `benchmark.path`"),
        ({"name": "image_folder", "path": "x", "subset": True}, "`image_folder` takes no `subset`: leave it out"),
        ({"name": "domainnet", "n_experiences": 6}, "takes no `n_experiences`, since it has one experience a domain"),
        ({"name": "domainnet_cil", "domain_order": ["real", "sketch"]}, "takes no `domain_order`"),
        ({"name": "split_cub200", "split_file": "x.txt"}, "takes no `split_file`"),
    ],
)
def test_what_a_benchmark_does_not_take_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_run({"benchmark": options})


def test_arguments_are_those_of_the_builder() -> None:
    for name in PUBLISHED:
        config = BenchmarkConfig(name=name, path=Path("x"), download=True, seed=3, subset=True)
        assert config.augment == "published"
        assert config.builder() is getattr(avalanche_fmlora, name)
        keywords = getattr(avalanche_fmlora, name).__kwdefaults__.keys() | {"path"}
        assert set(config.arguments()) <= keywords
        assert keywords - set(config.arguments()) <= {
            *("n_experiences", "domain_order", "split_file", "cache_dir"),
            *("class_order_seed", "image_size", "mean", "std", "train_transform", "eval_transform"),
        }
    assert BenchmarkConfig(name="split_cub200", augment="simple").augment == "simple"
    assert BenchmarkConfig(name="image_folder", path=Path("x")).arguments() == {"path": Path("x"), "augment": "none"}


def test_the_order_of_domains_is_given_or_drawn() -> None:
    config = make_run({"benchmark": {"name": "domainnet", "domain_order": ["real", "sketch"]}})
    assert (config.benchmark.domain_order, config.class_order_seed) == (("real", "sketch"), None)
    several = {"benchmark": {"name": "domainnet", "domain_order": ["real", "sketch"]}, "class_order_seeds": [0, 1]}
    assert [c.class_order_seed for c in expand({"methods": ["ncm"], **several})] == [None, 1], "as given, and drawn"
    orders = {"benchmark": {"name": "domainnet"}, "grid": {"benchmark.domain_order": [["real"], ["sketch"]]}}
    assert [c.benchmark.domain_order for c in expand({"methods": ["ncm"], **orders})] == [("real",), ("sketch",)]
    assert RunConfig(benchmark=config.benchmark).class_order_seed is None
    assert make_run({"benchmark": {"name": "domainnet"}, "class_order_seed": 3}).class_order_seed == 3


def identity(**options: Any) -> dict[str, Any]:
    plain: dict[str, Any] = make_run({"benchmark": options}).identity()["benchmark"]
    return plain


def test_a_record_tells_the_data_but_not_where_they_were() -> None:
    fetched = identity(name="split_imagenet_r", download=True)
    assert fetched == identity(name="split_imagenet_r", path="/somewhere/imagenet-r.tar")
    assert fetched["path"] is None
    part = identity(name="split_imagenet_r", path="/somewhere/mini", subset=True, split_file="/elsewhere/train.yaml")
    assert (part["path"], part["split_file"], part["subset"]) == ("mini", "train.yaml", True)
    assert (fetched["seed"], identity(name="split_imagenet_r", seed=3)["seed"]) == (None, 3)


def test_identities_of_older_records_stay() -> None:
    assert identity() == {"name": "split_glyphs", "path": None, "n_experiences": None, "augment": "none"}
    assert identity(name="image_folder", path="a/b.zip") == {
        **{"name": "image_folder", "path": "b.zip", "n_experiences": None, "augment": "none"}
    }


def test_files_are_looked_for_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()

    def located(**options: Any) -> BenchmarkConfig:
        return BenchmarkConfig(**options).located(lambda path: find_data(path, tmp_path))

    assert located(name="split_cub200", path="here").path == tmp_path / "here"
    assert located(name="split_glyphs").path is None
    with pytest.raises(
        FileNotFoundError, match=r"There is no gone nor .*gone: .*Or fetch split_cub200 .*--download true"
    ):
        located(name="split_cub200", path="gone")
    with pytest.raises(FileNotFoundError, match=r"There is no list.txt nor"):
        located(name="split_imagenet_r", path="here", split_file="list.txt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"Expected domainnet_cil at '.*downloads/domainnet'"):
        located_run(make_run({"benchmark": {"name": "domainnet_cil"}}), None)
    names: list[str] = []

    def fetch(remote: Any, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        names.append(remote.name)

    monkeypatch.setattr(published, "fetch", fetch)
    new = tmp_path / "new"
    assert located(name="domainnet", path=new, download=True, domain_order=("real", "sketch")).path == new
    assert names == ["real_train.txt", "real_test.txt", "sketch_train.txt", "sketch_test.txt", "real.zip", "sketch.zip"]


def test_make_benchmark_calls_the_builder_at_the_backbones_size() -> None:
    config = make_run({"benchmark": {"n_experiences": 5}, "class_order_seed": 1})
    benchmark = make_benchmark(config, make_backbone(config))
    assert len(benchmark.train_stream) == 5
    assert benchmark.info.image_size == 32
    assert benchmark.info.class_order_seed == 1
