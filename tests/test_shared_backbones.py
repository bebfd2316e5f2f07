"""Short names of backbones; one loading for all runs of a process, and no way from one run's model to another's."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner
from torch import Tensor

from avalanche_fmlora.backbones import (
    SHORT_NAMES,
    Backbone,
    BackboneConfig,
    fetch_backbone,
    file_sha256,
    full_name,
    known_backbones,
    load_backbone,
    loading,
    release_backbones,
    shared,
    shared_backbone,
)
from avalanche_fmlora.cli import main
from avalanche_fmlora.config import make_run
from avalanche_fmlora.strategies.fm_lora import FMLoRAStrategy
from avalanche_fmlora.strategies.seq_lora import SeqLoRAStrategy
from avalanche_fmlora.sweep import sweep

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    release_backbones()
    yield
    release_backbones()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file whose position embedding has to be resampled for 32 px."""
    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    safetensors.torch.save_file(timm.create_model("test_vit", img_size=64, num_classes=0, **TINY).state_dict(), path)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read, hashed or fitted into a model, in order."""
    done: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        own = getattr(loading, name)

        def call(*arguments: Any) -> Any:
            done.append(name)
            return own(*arguments)

        return call

    for name in ("read_state", "file_sha256", "state_sha256", "load_state"):
        monkeypatch.setattr(loading, name, counted(name))
    return done


def config(weights: Path, **options: Any) -> BackboneConfig:
    return BackboneConfig(**{"name": "test_vit", "weights": weights, "image_size": 32, "model_args": TINY, **options})


def state(model: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_file_is_read_hashed_and_fitted_once(weights: Path, reads: list[str]) -> None:
    first, second = (shared_backbone(config(weights)) for _ in range(2))
    assert sorted(reads) == ["file_sha256", "load_state", "read_state"]
    assert first.sha256 == second.sha256 == file_sha256(weights)
    direct = load_backbone(config(weights))
    assert same(first.model.state_dict(), direct.model.state_dict())
    assert same(second.model.state_dict(), direct.model.state_dict())
    assert not second.model.training


def test_models_share_no_memory(weights: Path) -> None:
    first, second = (shared_backbone(config(weights)).model for _ in range(2))
    before = state(first)
    mine = {t.untyped_storage().data_ptr() for t in first.state_dict().values()}
    assert mine.isdisjoint(t.untyped_storage().data_ptr() for t in second.state_dict().values())
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(7.0)
    first.blocks[0].attn.qkv = torch.nn.Identity()
    for model in (second, shared_backbone(config(weights)).model):
        assert same(state(model), before)


@pytest.mark.parametrize("strategy", [FMLoRAStrategy, SeqLoRAStrategy])
def test_a_run_that_trains_and_merges_leaves_the_next_its_weights(
    weights: Path, strategy: Any, make_class_benchmark: Callable[..., Any]
) -> None:
    options = config(weights, image_size=16)
    pristine = state(load_backbone(options).model)
    learner = strategy(model=shared_backbone(options).model, train_epochs=1, train_mb_size=8, evaluator=None, rank=4)
    benchmark = make_class_benchmark()
    for experience in list(benchmark.train_stream)[:2]:
        learner.train(experience)
    learner.merge()
    merged = learner.merged_model()
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert same(state(shared_backbone(options).model), pristine)
    own = {k.replace(".base.", "."): v for k, v in learner.model.vit.state_dict().items()}
    assert all(torch.equal(own[k], v) for k, v in pristine.items())


def test_a_changed_file_another_size_and_a_third_backbone_are_loaded(weights: Path, reads: list[str]) -> None:
    old = shared_backbone(config(weights))
    state = {k: v + 1 for k, v in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(state, weights)
    os.utime(weights, ns=(1, 1))
    new = shared_backbone(config(weights))
    assert new.sha256 != old.sha256
    assert torch.equal(new.model.norm.bias, old.model.norm.bias + 1)
    assert reads.count("read_state") == 2
    shared_backbone(config(weights, image_size=48))
    shared_backbone(config(weights))
    assert reads.count("read_state") == 3
    shared_backbone(config(weights, image_size=64))
    shared_backbone(config(weights, image_size=48))
    assert reads.count("read_state") == 5  # two are kept, and that of 48 px was the oldest


def test_memory_is_given_back(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Any]] = []

    def noted(options: BackboneConfig) -> Backbone:
        got = load_backbone(options)
        kept.append(weakref.ref(got.model))
        return got

    monkeypatch.setattr(shared, "load_backbone", noted)
    mine = shared_backbone(config(weights))
    gc.collect()
    assert kept[0]() is not None
    assert kept[0]() is not mine.model
    release_backbones()
    gc.collect()
    assert kept[0]() is None
    assert mine.model(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_a_missing_file_is_an_error_each_time(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"weights file at .*gone.pth"):
            shared_backbone(config(tmp_path / "gone.pth"))


def test_a_sweep_reads_its_backbone_once_and_then_forgets_it(
    weights: Path, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_class_benchmark: Any
) -> None:
    benchmark = make_class_benchmark()
    monkeypatch.setattr("avalanche_fmlora.experiment.make_benchmark", lambda *_: benchmark)
    backbone = config(weights, image_size=16).model_dump(mode="json")
    common: dict[str, Any] = {"backbone": backbone, "training": {"epochs": 1, "batch_size": 8}}
    runs = [
        make_run({"method": "ncm", **common}),
        make_run({"method": "seq_lora", **common, "method_options": {"rank": 4}}),
        make_run({"method": "fm_lora", **common, "method_options": {"rank": 4, "prompt_length": 2}}),
        make_run({"method": "ncm", **common, "seed": 1}),
    ]
    records = sweep(runs, tmp_path / "records", jobs=1, threads=1)
    assert [r["error"] for r in records] == [None] * 4
    assert reads.count("read_state") == reads.count("file_sha256") == reads.count("load_state") == 1
    assert {r["backbone"]["sha256"] for r in records} == {file_sha256(weights)}
    assert records[0]["accuracy_matrix"] == records[3]["accuracy_matrix"]
    shared_backbone(config(weights, image_size=16))
    assert reads.count("read_state") == 2


def test_weights_of_the_hub_are_fetched_ahead_and_nothing_else(
    weights: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create, asked = timm.create_model, []

    def served(name: str, pretrained: bool = False, **options: Any) -> Any:
        asked.append(name) if pretrained else None
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", served)
    for other in (config(weights), BackboneConfig(name="test_vit", pretrained=False), BackboneConfig()):
        fetch_backbone(other)
    assert reads == asked == []
    hub = BackboneConfig(name="test_vit.r160_in1k", image_size=32)
    fetch_backbone(hub)
    assert shared_backbone(hub).tag == "test_vit.r160_in1k"
    assert asked == ["test_vit.r160_in1k"]


def test_a_sweep_without_the_hub_stops_before_its_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise OSError("no network")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    backbone = {"name": "test_vit.r160_in1k", "image_size": 32}
    with pytest.raises(FileNotFoundError, match=r"no network.*--backbone test_vit.r160_in1k --weights /path/to/"):
        sweep([make_run({"method": "ncm", "backbone": backbone})], tmp_path / "records")
    assert not list(tmp_path.rglob("*.json"))


def test_short_names_are_full_tags_of_timm() -> None:
    tags = set(timm.list_models("vit_*", pretrained=True))
    assert set(SHORT_NAMES.values()) <= tags
    assert not set(SHORT_NAMES) & set(timm.list_models())
    assert full_name("vit_b16_in21k_ft_in1k") == "vit_base_patch16_224.augreg_in21k_ft_in1k"
    assert full_name("vit_b16_in21k") == "vit_base_patch16_224.augreg_in21k"
    assert BackboneConfig(name="clip_b16").name == "vit_base_patch16_clip_quickgelu_224.openai"
    run = make_run({"backbone": {"name": "vit_b16_in21k"}, "method": "ncm"})
    assert run.identity() == make_run({"backbone": {"name": full_name("vit_b16_in21k")}, "method": "ncm"}).identity()


def test_a_misspelt_short_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean .*dinov2_b14"):
        load_backbone(BackboneConfig(name="dinov2_b15"))


def test_facts_of_the_known_backbones() -> None:
    known = {b.name: b for b in known_backbones()}
    assert set(known) == {"glyph_vit", *SHORT_NAMES}
    a = known["vit_b16_in21k_ft_in1k"]
    assert (a.width, a.depth, a.patch, a.image_size, a.mean, a.std) == (768, 12, 16, 224, (0.5,) * 3, (0.5,) * 3)
    assert (known["dinov2_s14_reg"].width, known["dinov2_s14_reg"].patch) == (384, 14)
    assert known["dinov2_b14"].mean == (0.485, 0.456, 0.406)
    assert known["clip_b16"].std == pytest.approx((0.2686, 0.2613, 0.2758), abs=1e-4)
    assert (known["glyph_vit"].width, known["glyph_vit"].depth, known["glyph_vit"].image_size) == (128, 6, 32)


def test_the_command_line_lists_them() -> None:
    shown = CliRunner().invoke(main, ["list", "backbones"]).stdout
    assert "vit_b16_in21k = vit_base_patch16_224.augreg_in21k\n    width 768, depth 12, patch 16, 224 px" in shown
    assert all(f"{short} = {tag}\n" in shown for short, tag in SHORT_NAMES.items())
