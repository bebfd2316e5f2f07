"""L2P against a literal twin, and the mistakes its public ports make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import adam, cosine, step

from avalanche_fmlora.strategies.l2p import L2PPool, L2PStrategy

SIZE, LENGTH, TOP_K = 6, 2, 3


class Reference:
    """L2P in loops, one sample at a time; parameters are plain tensors."""

    def __init__(self, vit: Any, prompts: Tensor, keys: Tensor, position: bool = True) -> None:
        self.vit, self.prompts, self.keys, self.position = vit, prompts, keys, position

    def query(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            return self.tokens(image, [])[0]

    def picked(self, query: Tensor) -> list[int]:
        return sorted(range(len(self.keys)), key=lambda m: -cosine(query, self.keys[m]).item())[:TOP_K]

    def feature(self, image: Tensor, picked: list[int]) -> Tensor:
        tokens = [token for m in picked for token in self.prompts[m]]
        outputs = self.tokens(image, tokens)[1 : 1 + len(tokens)]
        return sum(outputs) / len(tokens)

    def tokens(self, image: Tensor, prompt: list[Tensor]) -> Tensor:
        vit = self.vit
        patches = vit.patch_embed.proj(image[None])[0].flatten(1).T
        first = vit.pos_embed[0, 0]
        rows = [vit.cls_token[0, 0] + first]
        rows += [token + first if self.position else token for token in prompt]
        rows += [patch + vit.pos_embed[0, 1 + i] for i, patch in enumerate(patches)]
        return vit.norm(vit.blocks(torch.stack(rows)[None]))[0]


def build(make_vit: Any, vit: dict[str, Any] | None = None, **options: Any) -> Any:
    options = {
        "pool_size": SIZE,
        "prompt_length": LENGTH,
        "top_k": TOP_K,
        "lr_prompt": 0.05,
        "clip_grad_norm": 0.01,
        **options,
    }
    strategy = L2PStrategy(model=make_vit(depth=2, **(vit or {})), evaluator=None, **options)
    strategy.model.double()
    return strategy


@pytest.fixture
def photos() -> Tensor:
    return torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def spread_keys(pool: L2PPool, twin: Reference, photos: Tensor) -> None:
    """Keys near single queries, so that samples pick different prompts."""
    queries = torch.stack([twin.query(x) for x in photos])
    with torch.no_grad():
        pool.keys.copy_(queries[:SIZE] - queries.mean(0))


@pytest.mark.parametrize("position", ["cls", "none"])
def test_features_and_indices_are_the_twins(make_vit: Any, photos: Tensor, position: str) -> None:
    strategy = build(make_vit, prompt_position=position)
    pool = strategy.model.pool
    twin = Reference(strategy.model.vit, pool.prompts.detach(), pool.keys.detach(), position == "cls")
    spread_keys(pool, twin, photos)
    strategy.model.eval()
    features = strategy.model.features(photos)
    picked = [twin.picked(twin.query(x)) for x in photos]
    assert len({tuple(sorted(p)) for p in picked}) > 1
    assert pool.last_index.tolist() == picked
    expected = torch.stack([twin.feature(x, p) for x, p in zip(photos, picked, strict=True)])
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-10)
    assert not features.requires_grad


def test_prompt_tokens_are_the_picked_prompts_in_order(make_vit: Any) -> None:
    pool = L2PPool(4, 3, 2, 5)
    tokens = pool(torch.stack([pool.keys[2], -pool.keys[1], pool.keys[0]]).detach())
    assert tokens.shape == (3, 6, 5)
    for b in range(3):
        for j in range(2):
            for i in range(3):
                assert torch.equal(tokens[b, 3 * j + i], pool.prompts[pool.last_index[b, j], i])


def test_feature_is_no_class_token(make_vit: Any, photos: Tensor) -> None:
    """Fails where the class token is taken, which attends to the prompts but is not they."""
    strategy = build(make_vit)
    vit = strategy.model.vit
    prompts = strategy.model.eval().pool(strategy.model.query(photos)) + vit.pos_embed[:, :1]
    tokens = torch.cat([vit._pos_embed(vit.patch_embed(photos)), prompts], dim=1)
    outputs = vit.norm(vit.blocks(tokens))
    torch.testing.assert_close(strategy.model.features(photos), outputs[:, -TOP_K * LENGTH :].mean(1))
    assert (strategy.model.features(photos) - outputs[:, 0]).abs().max() > 0.1


def test_a_model_that_normalises_after_pooling_does_so_here(make_vit: Any, photos: Tensor) -> None:
    strategy = build(make_vit, {"global_pool": "avg"})
    vit = strategy.model.vit
    prompts = strategy.model.eval().pool(strategy.model.query(photos)) + vit.pos_embed[:, :1]
    outputs = vit.blocks(torch.cat([vit._pos_embed(vit.patch_embed(photos)), prompts], dim=1))
    expected = vit.fc_norm(outputs[:, -TOP_K * LENGTH :].mean(1))
    torch.testing.assert_close(strategy.model.features(photos), expected)


def test_the_mean_of_the_patches_stands_beside_that_of_the_prompts(make_vit: Any, photos: Tensor) -> None:
    strategy = build(make_vit, pooling="token_and_mean")
    twin = Reference(strategy.model.vit, strategy.model.pool.prompts.detach(), strategy.model.pool.keys.detach())
    for image, feature in zip(photos, strategy.model.eval().features(photos), strict=True):
        picked = twin.picked(twin.query(image))
        tokens = [token for m in picked for token in twin.prompts[m]]
        patches = twin.tokens(image, tokens)[1 + len(tokens) :].mean(0)
        for half, expected in zip(feature.chunk(2), (twin.feature(image, picked), patches), strict=True):
            torch.testing.assert_close(half, expected / expected.square().mean().sqrt(), rtol=1e-7, atol=1e-7)


def test_multi_layer_reads_prompts_and_patches_of_each_block(make_vit: Any, photos: Tensor) -> None:
    """Twin: the model cut off behind each of its two blocks."""
    strategy = build(make_vit, pooling="multi_layer")
    model, prompts = strategy.model.eval(), strategy.model.pool(strategy.model.query(photos))
    whole = model.features(photos)
    model.pooling, blocks = "token_and_mean", model.vit.blocks
    expected = []
    for depth in (1, 2):
        model.vit.blocks = blocks[:depth]
        expected.append(model.prompted_features(photos, prompts))
    assert torch.equal(whole, torch.cat(expected, -1))


@pytest.mark.parametrize("vit", [{"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}])
def test_without_a_class_position_nothing_is_added(make_vit: Any, photos: Tensor, vit: dict[str, Any]) -> None:
    with_position, without = (build(make_vit, vit, prompt_position=p) for p in ("cls", "none"))
    assert torch.equal(with_position.model.eval().features(photos), without.model.eval().features(photos))


def test_a_sample_does_not_depend_on_its_batch(make_vit: Any, photos: Tensor) -> None:
    model = build(make_vit).model
    spread_keys(model.pool, Reference(model.vit, model.pool.prompts, model.pool.keys), photos)
    together = model.eval().features(photos)
    alone = torch.cat([model.features(x[None]) for x in photos])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_batchwise_takes_the_majority_for_all() -> None:
    pool = L2PPool(5, 1, 2, 5, batchwise=True)
    with torch.no_grad():
        pool.keys.copy_(torch.eye(5))
    query = torch.tensor([[9.0, 8, 0, 0, 0], [0, 9, 8, 0, 0], [0, 0, 9, 8, 0], [0, 0, 8, 0, 9]])
    tokens = pool(query)  # picks 01, 12, 23, 42: prompt 2 three times, prompt 1 twice
    assert pool.last_index.tolist() == [[2, 1]] * 4
    assert torch.equal(tokens, pool.prompts[[2, 1], 0].expand(4, -1, -1))
    cosines = query / query.norm(dim=1, keepdim=True)
    expected = -0.1 * (cosines[:, 2] + cosines[:, 1]).mean()
    torch.testing.assert_close(pool.extra_loss(), expected)


def test_two_steps_are_the_twins(make_vit: Any, photos: Tensor) -> None:
    strategy = build(make_vit)
    model, pool = strategy.model, strategy.model.pool
    for classes in ([0, 1], [2, 3]):
        model.begin(classes)
        strategy.make_optimizer()
    labels = torch.tensor([2, 3, 2, 2, 3, 3])
    prompts, keys = (p.detach().clone().requires_grad_() for p in (pool.prompts, pool.keys))
    rows, bias = (p.detach().clone().requires_grad_() for p in (model.head.active_rows, model.head.active_bias))
    params, state = [prompts, keys, rows, bias], {}
    for _ in range(2):
        twin = Reference(model.vit, prompts, keys)
        cross_entropy = pull = torch.zeros((), dtype=torch.float64)
        for x, y in zip(photos, labels.tolist(), strict=True):
            query = twin.query(x)
            picked = twin.picked(query)
            logits = rows @ twin.feature(x, picked) + bias
            cross_entropy = cross_entropy - (logits[y - 2] - logits.exp().sum().log()) / len(photos)
            pull = pull + sum(cosine(query, keys[m]) for m in picked) / len(photos)
        loss = cross_entropy - 0.1 * pull
        assert torch.autograd.grad(cross_entropy, keys, retain_graph=True, allow_unused=True) == (None,)
        assert abs(step(strategy, photos, labels) - loss.item()) < 1e-10
        grads = list(torch.autograd.grad(loss, params))
        adam(params, grads, [0.05, 0.05, 0.00375, 0.00375], state, clip=0.01)
    own = (pool.prompts, pool.keys, model.head.active_rows, model.head.active_bias)
    for ours, expected in zip(own, params, strict=True):
        torch.testing.assert_close(ours.detach(), expected.detach(), rtol=0, atol=1e-10)


def test_the_optimizer_starts_afresh_and_past_rows_stay(make_strategy: Any, class_benchmark: Any) -> None:
    strategy = make_strategy("l2p", optimizer="sgd", weight_decay=0.1, lr_prompt=0.1)
    first, second = list(class_benchmark.train_stream)[:2]
    strategy.train(first)
    classes = [int(c) for c in first.classes_in_this_experience]
    rows, prompts = strategy.model.head.rows[classes].clone(), strategy.model.pool.prompts.detach().clone()
    assert strategy.optimizer.state
    strategy.train(second)
    assert torch.equal(strategy.model.head.rows[classes], rows)
    assert not torch.equal(strategy.model.pool.prompts, prompts)


def test_start_and_counts_at_width_768(make_vit: Any) -> None:
    vit = make_vit(depth=1, embed_dim=768, num_heads=12, mlp_ratio=0.1)
    strategy = L2PStrategy(model=vit, evaluator=None)
    pool = strategy.model.pool
    assert pool.prompts.shape == (10, 5, 768)
    assert -1 <= pool.prompts.min() < -0.99
    assert 1 >= pool.prompts.max() > 0.99
    assert abs(pool.keys.std().item() - 3**-0.5) < 0.01
    for task in range(10):
        strategy.model.begin(range(10 * task, 10 * task + 10))
    assert strategy.model.stored_parameters() == strategy.model.trainable_parameters() == 46_080
    assert strategy.model.head.stored_parameters() == 76_900
    config = L2PStrategy.config_class()
    assert (config.lr_prompt, config.lr_head) == (0.03 * 32 / 256,) * 2
    assert (config.clip_grad_norm, config.lr_schedule, config.optimizer) == (1.0, "constant", "adam")


def test_a_pool_too_small_is_an_error(make_vit: Any) -> None:
    with pytest.raises(ValueError, match="Expected `top_k` to be at most `pool_size` but got 5 > 4"):
        L2PStrategy(model=make_vit(), pool_size=4, evaluator=None)


def test_a_saved_strategy_is_the_same(make_vit: Any, tmp_path: Any, photos: Tensor) -> None:
    first, second = build(make_vit), build(make_vit, seed=1)
    first.model.begin([0, 1])
    first.model.end()
    first.model.head.close()
    assert not torch.equal(first.model.pool.keys, second.model.pool.keys)
    first.save(tmp_path / "adapter.safetensors")
    second.load(tmp_path / "adapter.safetensors")
    assert torch.equal(first.model.eval()(photos), second.model.eval()(photos))


def test_domains_share_classes(make_strategy: Any, domain_benchmark: Any) -> None:
    strategy = make_strategy("l2p")
    for experience in domain_benchmark.train_stream:
        strategy.train(experience)
    assert strategy.model.head.n_classes == 3
    assert bool(strategy.model.head.rows.isfinite().all())


def test_features_wider_than_tokens_are_refused(make_strategy: Any) -> None:
    learned = make_strategy("fm_lora", pooling="token_and_mean")
    learned.model.head.grow([0, 1])
    with pytest.raises(ValueError, match="features as wide as its tokens"):
        L2PStrategy(model=learned.merged_model(), evaluator=None)
