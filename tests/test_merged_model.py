"""The model at the end: one plain timm ViT with updates, prompt and head inside, at the same logits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from twins import double_strategy
from vit_kinds import EXACT, KINDS, random_network

from avalanche_fmlora.data.glyph_vit import glyph_vit
from avalanche_fmlora.modules.head import UNSEEN_LOGIT
from avalanche_fmlora.modules.merging import merged_vit
from avalanche_fmlora.modules.vit import Pooling, adapt_linears, check_vit, feature_dim, forward_features


@pytest.fixture(params=sorted(KINDS))
def vit(request: pytest.FixtureRequest, make_vit: Callable[..., Any]) -> Any:
    """One ViT of each kind, float64, in evaluation mode."""
    return make_vit(dtype=torch.float64, **KINDS[request.param]).eval()


@pytest.mark.parametrize("prompt", [0, 3])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("pooling", ["model", "token_and_mean"])
def test_merged_model_is_a_plain_vit_with_the_same_logits(
    vit: Any, images: Tensor, prompt: int, cosine: bool, pooling: Pooling
) -> None:
    network = random_network(vit, prompt=prompt, cosine=cosine, pooling=pooling)
    x = images.double()
    expected = network(x)
    random = torch.get_rng_state()
    merged = merged_vit(network)
    assert torch.equal(torch.get_rng_state(), random), "what trains afterwards must not depend on it"
    assert type(merged) is (Eva if isinstance(vit, Eva) else VisionTransformer)
    assert not [m for m in merged.modules() if type(m).__module__.startswith("avalanche_fmlora")]
    torch.testing.assert_close(merged(x), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(merged(x)[:, 2], torch.full((5,), UNSEEN_LOGIT, dtype=torch.float64))
    assert torch.equal(network(x), expected), "merging a copy must leave the network alone"
    if getattr(vit, "dynamic_img_size", False) and pooling == "model":
        larger = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        torch.testing.assert_close(merged(larger), network(larger), rtol=1e-9, atol=1e-9)


def test_merged_model_loads_where_this_package_is_missing(
    make_vit: Callable[..., Any], images: Tensor, tmp_path: Path
) -> None:
    network = random_network(make_vit(reg_tokens=1), prompt=2, cosine=True)
    path = tmp_path / "merged.pt"
    merged = merged_vit(network).double()
    torch.save((merged, images.double(), network(images.double())), path)
    assert b"fmlora" not in path.read_bytes()
    script = (
        "import sys; sys.modules['avalanche_fmlora'] = None; sys.modules['avalanche'] = None\n"
        f"import torch; model, x, y = torch.load({str(path)!r}, weights_only=False)\n"
        "torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_features_of_several_blocks_are_refused(make_vit: Callable[..., Any]) -> None:
    network = random_network(make_vit(), prompt=2, cosine=True, pooling="multi_layer")
    with pytest.raises(ValueError, match=r"reads the last 2: use `strategy\.model\(images\)`.*'token_and_mean'"):
        merged_vit(network)
    siglip = random_network(make_vit(**KINDS["map_siglip"]), prompt=0, cosine=True, pooling="multi_layer")
    assert merged_vit(siglip).num_features == siglip.head.dim


@pytest.mark.parametrize("pooling", ["model", "token_and_mean"])
def test_merged_model_can_be_adapted_again_and_keeps_its_features(
    make_vit: Callable[..., Any], images: Tensor, pooling: Pooling
) -> None:
    network = random_network(make_vit(dtype=torch.float64), prompt=2, cosine=True, pooling=pooling)
    merged = check_vit(merged_vit(network))
    features = network.features(images.double())
    assert features.shape[-1] == feature_dim(merged)
    torch.testing.assert_close(forward_features(merged, images.double()), features, **EXACT)
    prompt = torch.zeros(3, merged.embed_dim, dtype=torch.float64)
    for again in get_args(Pooling):  # token and mean are there already, or can be read now
        read = forward_features(merged, images.double(), prompt, pooling=again)
        assert read.shape == (5, feature_dim(merged, again))
    assert len(adapt_linears(merged, ("q",), None, 2, 1.0)) == 2


@pytest.mark.parametrize("prompt", [0, 2])
def test_the_packaged_backbone_merges_with_token_and_mean(prompt: int) -> None:
    """Its patch embedding is a stack of convolutions, without the one projection of a plain ViT."""
    network = random_network(glyph_vit().eval().double(), prompt=prompt, cosine=True, pooling="token_and_mean")
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(merged_vit(network)(x), network(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["cls", "avg", "distilled", "registers"])
def test_a_merged_model_that_learned_more_merges_again(make_vit: Callable[..., Any], images: Tensor, kind: str) -> None:
    first = random_network(
        make_vit(dtype=torch.float64, **KINDS[kind]), prompt=2, cosine=True, pooling="token_and_mean"
    )
    second = random_network(merged_vit(first), prompt=3, cosine=True, pooling="token_and_mean")
    assert second.head.dim == first.head.dim
    torch.testing.assert_close(merged_vit(second)(images.double()), second(images.double()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_timm_test_models(name: str) -> None:
    vit = timm.create_model(name, img_size=32).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = vit.forward_head(vit.forward_features(x), pre_logits=True)
    assert torch.equal(forward_features(check_vit(vit), x), expected)
    network = random_network(vit, prompt=2, cosine=True).float()
    torch.testing.assert_close(merged_vit(network)(x), network(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", ["fm_lora", "inflora", "sd_lora", "seq_lora"])
def test_trained_updates_merge(
    method: str, make_strategy: Any, make_vit: Callable[..., Any], train: Any, class_benchmark: Any
) -> None:
    strategy, _ = double_strategy(method, make_strategy, make_vit, classifier="linear")
    train(strategy, class_benchmark)
    strategy.model.eval()
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(4)).double()
    with torch.no_grad():
        logits = strategy.model(images)
        strategy.merge()
        torch.testing.assert_close(strategy.model(images), logits, rtol=0, atol=1e-10)
        strategy.unmerge()
        assert torch.equal(strategy.model(images), logits)
        torch.testing.assert_close(strategy.merged_model().eval()(images), logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["fm_lora", "inflora", "sd_lora", "seq_lora"])
def test_merged_weights_move_with_the_model(
    name: str, make_strategy: Any, train: Any, class_benchmark: Any, images: Tensor
) -> None:
    strategy = train(make_strategy(name, train_epochs=1), class_benchmark, n=2)
    strategy.merge()
    names = set(strategy.model.state_dict())
    expected = strategy.model.eval()(images)
    torch.testing.assert_close(strategy.model.double()(images.double()).float(), expected, rtol=1e-4, atol=1e-4)
    assert set(strategy.model.state_dict()) == names
    strategy.unmerge()
    assert not [key for key in dict(strategy.model.named_buffers()) if "merged" in key]


@pytest.mark.parametrize("name", ["fm_lora", "seq_lora", "inflora", "sd_lora"])
def test_a_state_dict_replaces_merged_weights(
    name: str, make_strategy: Any, train: Any, class_benchmark: Any, images: Any
) -> None:
    states: list[Any] = []

    def keep(strategy: Any) -> None:
        strategy.model.eval()
        states.append(({k: v.clone() for k, v in strategy.model.state_dict().items()}, strategy.model(images).detach()))

    strategy = train(make_strategy(name), class_benchmark, n=1, after=keep)
    ((state, logits),) = states
    with torch.no_grad():
        for layer in strategy.model.lora.layers:
            for parameter in layer.state_dict().values():
                parameter.mul_(1.5) if parameter.is_floating_point() else None
        strategy.merge()
        assert not torch.equal(strategy.model(images), logits)
        strategy.model.load_state_dict(state)
        assert torch.equal(strategy.model(images), logits)
