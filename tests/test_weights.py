"""What a strategy saves: all that it added, nothing of the backbone, no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def trained(make_strategy: Any, train: Any, class_benchmark: Any) -> Any:
    """FM-LoRA after two experiences, of three."""
    return train(make_strategy("fm_lora", train_epochs=2), class_benchmark, n=2)


@torch.no_grad()
def _logits(strategy: Any, images: Tensor) -> Tensor:
    strategy.model.eval()
    return strategy.model(images)


def test_a_file_from_before_pooling_was_an_option_names_it(
    make_strategy: Any, train: Any, class_benchmark: Any, tmp_path: Path
) -> None:
    """Such a file says nothing of it; the width of its rows does."""
    saved = train(make_strategy("fm_lora", pooling="model"), class_benchmark, n=1)
    path = saved.save(tmp_path / "adapter.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    config = json.loads(metadata["config"])
    del config["pooling"]
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {**metadata, "config": json.dumps(config)})
    with pytest.raises(ValueError, match=r"width 32 but the saved one has 16.*the `pooling`"):
        make_strategy("fm_lora").load(path)
    make_strategy("fm_lora", pooling="model").load(path)


def test_a_fresh_strategy_takes_the_saved_state(
    trained: Any, make_strategy: Any, images: Tensor, tmp_path: Path
) -> None:
    path = trained.save(tmp_path / "deep" / "er" / "adapter.safetensors")
    other = make_strategy("fm_lora", seed=5)
    other.load(path)
    assert torch.equal(_logits(other, images), _logits(trained, images))
    assert int(other.model.lora.experiences) == 2
    assert other.model.head.counts.tolist() == [8.0] * 4
    assert [p.name for p in path.parent.iterdir()] == ["adapter.safetensors"], "no leftover of the write"


def test_the_backbone_is_not_in_the_file(trained: Any, tmp_path: Path) -> None:
    path = trained.save(tmp_path / "adapter.safetensors")
    tensors = safetensors.torch.load_file(path)
    assert not [name for name in tensors if ".base." in name or "patch_embed" in name]
    drawn = {name for name in tensors if name.startswith("generator/")}
    assert drawn == {"generator/head._generator", "generator/lora._generator"}
    head = sum(t.numel() for name, t in tensors.items() if name.startswith("head."))
    others = sum(t.numel() for name, t in tensors.items() if name not in drawn) - head
    assert others == trained.model.stored_parameters() + 3 + 16, (
        "updates and prompt; two counters and the first complexity; the prompt's anchor"
    )
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["method"] == "fm_lora"
    assert json.loads(metadata["config"])["rank"] == 4


def test_training_goes_on_after_loading(
    trained: Any, make_strategy: Any, class_benchmark: Any, images: Tensor, tmp_path: Path
) -> None:
    path = trained.save(tmp_path / "adapter.safetensors")
    other = make_strategy("fm_lora", train_epochs=2)
    other.load(path)
    bases = other.model.lora.layers[0].up.clone()
    rows = other.model.head.rows[:4].clone()
    other.train(class_benchmark.train_stream[2])
    assert int(other.model.lora.experiences) == 3
    assert torch.equal(other.model.lora.layers[0].up, bases), "a third experience does not learn bases again"
    assert other.model.head.seen.tolist() == [True] * 6
    torch.testing.assert_close(other.model.head.rows[:4], rows, rtol=0, atol=0.5)


def test_loading_over_a_strategy_that_has_learned_more(
    trained: Any, make_strategy: Any, train: Any, class_benchmark: Any, images: Tensor, tmp_path: Path
) -> None:
    path = trained.save(tmp_path / "adapter.safetensors")
    other = train(make_strategy("fm_lora", train_epochs=1), class_benchmark)
    other.merge()
    other.load(path)
    assert torch.equal(_logits(other, images), _logits(trained, images))
    assert other.model.head.n_classes == 4


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3},
        {"targets": ("q", "k", "v")},
        {"targets": ("q", "k")},
        {"blocks": (0,)},
        {"scale": 2.0},
        {"logit_scale": 8.0},
        {"prompt_length": 0},
        {"prompt_length": 2},
    ],
)
def test_another_configuration_is_refused(
    trained: Any, make_strategy: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    path = trained.save(tmp_path / "adapter.safetensors")
    other = make_strategy("fm_lora", **options)
    before = {k: v.clone() for k, v in other.model.adapter_state().items()}
    with pytest.raises(ValueError, match="build the strategy with the options"):
        other.load(path)
    assert all(torch.equal(v, before[k]) for k, v in other.model.adapter_state().items())


def test_wrong_files_are_named(trained: Any, make_strategy: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no adapter file .*none\.safetensors: `strategy\.save"):
        trained.load(tmp_path / "none.safetensors")
    path = trained.save(tmp_path / "adapter.safetensors")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"torn\.safetensors is no whole safetensors file"):
        trained.load(torn)
    alien = tmp_path / "alien.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, alien)
    with pytest.raises(ValueError, match=r"was not written by `strategy\.save`"):
        trained.load(alien)
    with pytest.raises(ValueError, match=r"holds a fm_lora adapter but this strategy is seq_lora"):
        make_strategy("seq_lora").load(path)


def test_an_interrupted_save_leaves_the_old_file(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained.save(tmp_path / "adapter.safetensors")
    content = path.read_bytes()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(KeyboardInterrupt):
        trained.save(path)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_a_loaded_strategy_goes_on_counting(trained: Any, make_strategy: Any, tmp_path: Path) -> None:
    """The prompt of a loaded strategy is not free again, and complexity stays relative to the first experience's."""
    path = trained.save(tmp_path / "adapter.safetensors")
    fresh = make_strategy("fm_lora", seed=5)
    fresh.load(path)
    assert int(fresh.model.prompt.experience) == int(trained.model.prompt.experience) > 0
    assert float(fresh.model.lora.first_complexity) == float(trained.model.lora.first_complexity) >= 0


def test_other_weights_of_the_backbone_are_refused(
    make_vit: Callable[..., Any], make_strategy: Any, train: Any, class_benchmark: Any, tmp_path: Path
) -> None:
    path = train(make_strategy("seq_lora", make_vit()), class_benchmark, n=1).save(tmp_path / "a.safetensors")
    other = make_vit()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"around other weights of the backbone \(float32 \w+\) .*float32"):
        make_strategy("seq_lora", other).load(path)
    make_strategy("seq_lora", make_vit()).load(path)
    make_strategy("seq_lora", make_vit().double()).load(path)  # which may be the same in another precision


@pytest.mark.parametrize("name", ["fm_lora", "l2p", "seq_lora"])
def test_a_state_dict_fits_a_network_that_has_not_trained(
    name: str, make_vit: Callable[..., Any], make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    trained = train(make_strategy(name, make_vit()), class_benchmark, n=2)
    fresh = make_strategy(name, make_vit())
    state = trained.model.state_dict()
    before = list(state)
    fresh.model.load_state_dict(state)
    assert list(state) == before
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(fresh.model.eval()(images), trained.model.eval()(images))
