"""The query of prompt methods: one backbone, evaluation mode, two passes, and a cache that never changes a result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avalanche_fmlora.data.base import ImageSet, class_incremental
from avalanche_fmlora.modules.feature_cache import FeatureCache, KnownFeatures, image_hashes
from avalanche_fmlora.modules.prompt_pool import check_blocks, cosines, query_features

METHODS = ["l2p", "dual_prompt", "coda_prompt"]


def make(make_strategy: Any, make_vit: Any, name: str, **options: Any) -> Any:
    return make_strategy(name, make_vit(depth=5), **{"pool_size": 10, **options} if name == "coda_prompt" else options)


def test_query_is_the_class_token_after_the_final_norm(make_vit: Any, images: Tensor) -> None:
    vit = make_vit(depth=2).eval()
    torch.testing.assert_close(query_features(vit, images), vit.forward_features(images)[:, 0])
    averaged = make_vit(depth=2, global_pool="avg").eval()
    torch.testing.assert_close(
        query_features(averaged, images), averaged.fc_norm(averaged.forward_features(images)[:, 0])
    )
    without = make_vit(depth=2, class_token=False, global_pool="avg").eval()
    torch.testing.assert_close(query_features(without, images), without(images))
    assert not query_features(vit, images).requires_grad


@pytest.mark.parametrize("name", METHODS)
def test_query_never_sees_dropout(make_strategy: Any, make_vit: Any, images: Tensor, name: str) -> None:
    options = {"proj_drop_rate": 0.5, "pos_drop_rate": 0.5, "drop_path_rate": 0.5, "attn_drop_rate": 0.5}
    network = make_strategy(name, make_vit(depth=5, **options)).model
    expected = query_features(make_vit(depth=5).eval(), images)
    network.train()
    torch.testing.assert_close(network._encode(images), expected)
    torch.testing.assert_close(network.query(images), expected)


@pytest.mark.parametrize("name", METHODS)
def test_two_passes_and_one_backbone(make_strategy: Any, make_vit: Any, passes: Any, images: Tensor, name: str) -> None:
    network = make(make_strategy, make_vit, name, cache_queries=False).model
    own = sum(p.numel() for p in make_vit(depth=5).parameters())
    assert sum(p.numel() for p in network.vit.parameters()) == own
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) <= network.stored_parameters()
    network.begin([0, 1])
    passes.watch(network.vit)
    network.train()(images).sum().backward()
    assert passes.take() == [5, 5]
    with torch.no_grad():
        network.eval()(images)
    assert passes.take() == [5, 5]


@pytest.mark.parametrize("name", METHODS)
def test_cached_queries_change_nothing_and_save_a_pass(
    make_strategy: Any, make_vit: Any, class_benchmark: Any, passes: Any, name: str
) -> None:
    states, counts = [], []
    for cached in (True, False):
        strategy = make(make_strategy, make_vit, name, cache_queries=cached, train_epochs=3)
        passes.watch(strategy.model.vit)
        torch.manual_seed(0)
        for experience in list(class_benchmark.train_stream)[:2]:
            strategy.train(experience)
            assert len(strategy.model.queries) == 0
        states.append(strategy.model.adapter_state())
        counts.append(sum(passes.take()))
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    # 2 experiences of 16 images in 3 epochs: a query and a prompted pass each, or a query in the first epoch only.
    assert counts == [2 * 16 * (3 + 1), 2 * 16 * (3 + 3)]


def test_augmented_images_switch_the_cache_off(make_strategy: Any, make_vit: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (8, 16, 16, 3)).astype(np.uint8)
    photos = ImageSet(pixels, np.arange(8) % 2)
    benchmark = class_incremental(
        "noisy", photos, photos, ["a", "b"], n_experiences=1, augment=[lambda x: x + torch.randint_like(x, 0, 50)]
    )
    strategy = make(make_strategy, make_vit, "l2p", train_epochs=2)
    assert strategy.model.queries.enabled
    strategy.train(benchmark.train_stream[0])
    assert not strategy.model.queries.enabled
    assert len(strategy.model.queries) == 0


def test_cache_encodes_only_what_it_does_not_know() -> None:
    cache, seen = FeatureCache(), []

    def encode(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.flatten(1)[:, :3] * 2

    images = torch.randn(6, 3, 4, 4)
    assert torch.equal(cache.lookup(images[:4], encode), images[:4].flatten(1)[:, :3] * 2)
    assert torch.equal(cache.lookup(images[[5, 1, 4, 0]], encode), images[[5, 1, 4, 0]].flatten(1)[:, :3] * 2)
    assert seen == [4, 2]
    assert (cache.hits, cache.misses, len(cache)) == (2, 6, 6)
    cache.end_epoch()
    flipped = images.flip(-1)
    assert torch.equal(cache.lookup(flipped, encode), flipped.flatten(1)[:, :3] * 2)
    assert (cache.hits, len(cache)) == (0, 6)
    cache.end_epoch()
    assert not cache.enabled
    assert len(cache) == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_hashes_tell_single_bits_apart(dtype: torch.dtype) -> None:
    image = (torch.rand(1, 3, 4, 4) * 200).to(dtype)
    others = image.repeat(48, 1, 1, 1)
    flat = others.view(48, -1)
    step = torch.ones((), dtype=dtype) if dtype == torch.uint8 else torch.finfo(dtype).eps * flat.abs().max()
    flat += torch.diag(torch.ones(48)).to(dtype) * step
    words = 48 * max(1, image.element_size() // 4)
    weights = torch.randint(-(2**63), 2**63 - 1, (2, words), generator=torch.Generator().manual_seed(0))
    hashes = image_hashes(torch.cat([image, others]), weights)
    assert len({tuple(h) for h in hashes.tolist()}) == 49
    negative_zero = torch.tensor([[0.0, 1.0], [-0.0, 1.0]])
    assert len(set(image_hashes(negative_zero, weights[:, :2])[:, 0].tolist())) == 2


def test_cosines() -> None:
    query, keys = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    for b in range(3):
        for m in range(4):
            expected = (query[b] @ keys[m]) / (query[b].norm() * keys[m].norm())
            assert abs(float(cosines(query, keys)[b, m] - expected)) < 1e-14


def test_check_blocks(make_vit: Any) -> None:
    assert check_blocks(make_vit(depth=3), [2, 0], "blocks") == (2, 0)
    with pytest.raises(ValueError, match=r"block 3, 7 is missing: the model has depth 3 \(blocks 0..2\)"):
        check_blocks(make_vit(depth=3), (0, 3, 7), "blocks")
    with pytest.raises(ValueError, match="different blocks"):
        check_blocks(make_vit(depth=3), (1, 1), "blocks")


@pytest.mark.parametrize("name", METHODS)
def test_prompts_are_not_merged(make_strategy: Any, make_vit: Any, name: str) -> None:
    strategy = make(make_strategy, make_vit, name)
    with pytest.raises(ValueError, match=f"the prompts of {name} depend on the image"):
        strategy.merged_model()


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_leaves_the_choice_alone(
    make_strategy: Any, make_vit: Any, class_benchmark: Any, images: Tensor, name: str
) -> None:
    strategy = make(make_strategy, make_vit, name, precision="bf16", train_epochs=1)
    pools: list[torch.dtype] = []
    strategy.model.pool.register_forward_hook(lambda m, args, out: pools.append((args[0] @ args[0].T).dtype))
    for experience in class_benchmark.train_stream:
        strategy.train(experience)
    strategy.eval(class_benchmark.test_stream)
    assert set(pools) == {torch.float32}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("classifier", ["cosine", "class_mean"])
def test_any_head_fits(make_strategy: Any, make_vit: Any, class_benchmark: Any, name: str, classifier: str) -> None:
    strategy = make(make_strategy, make_vit, name, classifier=classifier, train_epochs=2)
    for experience in class_benchmark.train_stream:
        strategy.train(experience)
    rows = strategy.model.head.rows
    assert rows.shape == (6, 16)
    assert bool(rows.isfinite().all())
    if classifier == "class_mean":
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_leaves_other_classes_out(make_strategy: Any, make_vit: Any, images: Tensor, name: str) -> None:
    """Fails where masked logits are left at 0, which is a logit like any other."""
    strategy = make(make_strategy, make_vit, name)
    for classes in ([0, 1], [2, 3]):
        strategy.model.begin(classes)
        strategy.model.head.write(torch.tensor(classes), torch.randn(2, 16))
    strategy.is_training = True
    strategy.mbatch = [images, torch.tensor([2, 3, 2, 2, 3]), torch.zeros(5)]
    strategy.mb_output = strategy.forward()
    rows = strategy.model.head.active_rows
    logits = strategy.model.last_features @ rows.T
    expected = torch.stack([-x.log_softmax(0)[y] for x, y in zip(logits, [0, 1, 0, 0, 1], strict=True)]).mean()
    extra = strategy.model.extra_loss()
    torch.testing.assert_close(strategy.criterion(), expected + (0 if extra is None else extra))


@pytest.mark.parametrize("name", METHODS)
def test_compile_is_taken_and_changes_nothing(make_strategy: Any, make_vit: Any, images: Tensor, name: str) -> None:
    plain, compiled = (make_strategy(name, make_vit(), compile=c) for c in (False, True))
    for strategy in (plain, compiled):
        strategy.model.begin([0, 1])
    assert torch.equal(plain._features_of()(images), compiled._features_of()(images))


def test_known_features_are_found_by_content() -> None:
    torch.manual_seed(0)
    images, features = torch.randn(10, 3, 4, 4), torch.randn(10, 5)
    known = KnownFeatures([images[:6], images[6:]], features)
    order = torch.tensor([7, 0, 9, 3])
    found, hit = known.find(images[order])
    assert hit.all()
    assert torch.equal(found, features[order])
    mixed = images[order].clone()
    mixed[2, 0, 0, 0] += 1e-6
    found, hit = known.find(mixed)
    assert hit.tolist() == [True, True, False, True]
    assert torch.equal(found[hit], features[order][hit])
    found, hit = known.find(torch.randn(2, 3, 8, 8))
    assert not hit.any()
    assert found.shape == (2, 5)
