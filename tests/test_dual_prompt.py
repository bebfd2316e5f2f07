"""DualPrompt against a literal twin, and the mistakes its public ports make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import adam, cosine, step, tokens

from avalanche_fmlora.strategies.dual_prompt import DualPromptPool, DualPromptStrategy

DIM, LENGTH = 16, 3


class Reference:
    """DualPrompt in loops: one sample, one block, one head at a time; parameters are plain tensors."""

    def __init__(self, vit: Any, g: Tensor, experts: Tensor, keys: Tensor) -> None:
        self.vit, self.g, self.experts, self.keys = vit, g, experts, keys

    def query(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            return tokens(self.vit, image, {})[0]

    def task(self, query: Tensor, seen: int) -> int:
        return max(range(seen), key=lambda t: float(cosine(query, self.keys[t])))

    def feature(self, image: Tensor, task: int) -> Tensor:
        prefixes = {b: (self.g[b, 0], self.g[b, 1]) for b in (0, 1)}
        prefixes |= {b: (self.experts[task][b - 2, 0], self.experts[task][b - 2, 1]) for b in (2, 3, 4)}
        return tokens(self.vit, image, prefixes)[0]


@pytest.fixture
def strategy(make_vit: Any) -> Any:
    """DualPrompt in float64 around a ViT of five blocks, two experiences (classes 0, 1 and 2, 3) begun and closed."""
    vit = make_vit(depth=5)
    strategy = DualPromptStrategy(
        model=vit, g_length=LENGTH, e_length=LENGTH + 1, lr_prompt=0.05, clip_grad_norm=0.01, evaluator=None
    )
    strategy.model.double()
    for classes in ([0, 1], [2, 3]):
        strategy.model.begin(classes)
        strategy.make_optimizer()
        strategy.model.end()
        strategy.model.head.close()
    return strategy


@pytest.fixture
def photos() -> Tensor:
    return torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def reference(strategy: Any) -> Reference:
    pool = strategy.model.pool
    return Reference(strategy.model.vit, pool.g.detach(), pool.experts, pool.keys)


def test_features_at_test_time_are_the_twins(strategy: Any, photos: Tensor) -> None:
    pool = strategy.model.pool
    twin = reference(strategy)
    queries = torch.stack([twin.query(x) for x in photos])
    pool.keys[0], pool.keys[1] = queries[0] - queries[1], queries[1] - queries[0]
    strategy.model.eval()
    features = strategy.model.features(photos)
    tasks = [twin.task(q, 2) for q in queries]
    assert set(tasks) == {0, 1}
    assert pool.last_index.tolist() == tasks
    torch.testing.assert_close(
        pool.last_cosines, torch.stack([cosine(q, twin.keys[t]) for q, t in zip(queries, tasks, strict=True)])
    )
    expected = torch.stack([twin.feature(x, t) for x, t in zip(photos, tasks, strict=True)])
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-10)
    assert not features.requires_grad


def test_prefixes_are_the_chosen_experts_keys_and_values(strategy: Any) -> None:
    """Fails where [blocks, 2, B, ...] is reshaped to [blocks, B, 2, ...] instead of permuted."""
    pool = strategy.model.pool.eval()
    query = torch.stack([pool.keys[1], pool.keys[0], pool.keys[1]])
    prefixes = pool(query)
    assert pool.last_index.tolist() == [1, 0, 1]
    assert sorted(prefixes) == [0, 1, 2, 3, 4]
    for block, (keys, values) in prefixes.items():
        for b, task in enumerate([1, 0, 1]):
            own = pool.g[block] if block < 2 else pool.experts[task, block - 2]
            assert torch.equal(keys if block < 2 else keys[b], own[0])
            assert torch.equal(values if block < 2 else values[b], own[1])


def test_a_sample_does_not_depend_on_its_batch(strategy: Any, photos: Tensor) -> None:
    model = strategy.model.eval()
    together = model(photos)
    alone = torch.cat([model(x[None]) for x in photos])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(photos.flip(0)).flip(0), together, rtol=0, atol=1e-12)


def test_two_steps_are_the_twins(strategy: Any, photos: Tensor) -> None:
    model, pool = strategy.model, strategy.model.pool
    model.begin([4, 5])
    strategy.make_optimizer()
    labels = torch.tensor([4, 5, 4, 4, 5, 5])
    assert torch.equal(pool.active_expert, pool.experts[1])
    assert not torch.equal(pool.active_key, pool.keys[1])
    g, expert, key = (p.detach().clone().requires_grad_() for p in (pool.g, pool.active_expert, pool.active_key))
    rows, bias = (p.detach().clone().requires_grad_() for p in (model.head.active_rows, model.head.active_bias))
    params, state = [g, expert, key, rows, bias], {}
    for _ in range(2):
        twin = Reference(model.vit, g, expert[None], key[None])
        loss = torch.zeros((), dtype=torch.float64)
        for x, y in zip(photos, labels.tolist(), strict=True):
            logits = rows @ twin.feature(x, 0) + bias
            loss = loss - (logits[y - 4] - logits.exp().sum().log()) / len(photos)
            loss = loss - cosine(twin.query(x), key) / len(photos)
        assert abs(step(strategy, photos, labels) - loss.item()) < 1e-10
        grads = list(torch.autograd.grad(loss, params))
        adam(params, grads, [0.05, 0.05, 0.05, 0.00375, 0.00375], state, clip=0.01)
    for own, expected in zip(
        (pool.g, pool.active_expert, pool.active_key, model.head.active_rows, model.head.active_bias),
        params,
        strict=True,
    ):
        torch.testing.assert_close(own.detach(), expected.detach(), rtol=0, atol=1e-10)


def test_past_tasks_keep_every_bit_under_momentum_and_decay(
    make_strategy: Any, make_vit: Any, class_benchmark: Any
) -> None:
    strategy = make_strategy(
        "dual_prompt",
        make_vit(depth=5),
        g_blocks=(0, 1),
        e_blocks=(2, 3, 4),
        optimizer="sgd",
        weight_decay=0.1,
        lr_prompt=0.1,
        n_tasks=4,
    )
    pool, before = strategy.model.pool, []
    first = pool.g.detach().clone()
    for experience in class_benchmark.train_stream:
        task = len(before)
        strategy.train(experience)
        for t, (expert, key) in enumerate(before):
            assert torch.equal(pool.experts[t], expert)
            assert torch.equal(pool.keys[t], key)
        before.append((pool.experts[task].clone(), pool.keys[task].clone()))
        if task:
            assert not torch.equal(pool.experts[task], pool.experts[task - 1])
    fresh = DualPromptPool(DIM, n_tasks=4)
    assert torch.equal(pool.keys[3], fresh.keys[3])
    assert not torch.equal(pool.g, first)


def test_unseen_keys_compete_only_if_asked(make_vit: Any, photos: Tensor) -> None:
    for restrict, expected in ((True, 0), (False, 2)):
        pool = DualPromptPool(DIM, n_tasks=3, restrict_to_seen=restrict).double().eval()
        pool.begin()
        pool.end()
        query = pool.keys[2:3].clone()
        pool(query)
        assert pool.last_index.tolist() == [expected]
        pool.begin()
        pool.train()(query)
        assert pool.last_index.tolist() == [1]


def test_experts_are_the_same_made_in_advance_or_one_by_one() -> None:
    ahead, later = DualPromptPool(DIM, n_tasks=3, seed=5), DualPromptPool(DIM, seed=5)
    assert ahead.keys.shape == (3, DIM)
    assert later.keys.shape == (0, DIM)
    for pool in (ahead, later):
        for _ in range(4):
            pool.begin()
            pool.end()
    assert torch.equal(ahead.keys, later.keys)
    assert torch.equal(ahead.experts[0], later.experts[0])
    assert ahead.keys.abs().max() <= 1
    assert ahead.keys.unique().numel() == 4 * DIM


def test_domains_have_a_task_each_and_are_chosen_by_key(
    make_strategy: Any, make_vit: Any, domain_benchmark: Any
) -> None:
    strategy = make_strategy("dual_prompt", make_vit(depth=5), g_blocks=(0, 1), e_blocks=(2, 3, 4))
    for experience in domain_benchmark.train_stream:
        strategy.train(experience)
    pool = strategy.model.pool
    assert int(pool.experiences) == 3
    assert len(pool.keys) == 3
    strategy.eval(domain_benchmark.test_stream)
    assert strategy.model.head.n_classes == 3


def test_before_the_first_task_only_the_general_prompt_is_read(make_vit: Any) -> None:
    pool = DualPromptPool(DIM).eval()
    assert sorted(pool(torch.ones(2, DIM))) == [0, 1]
    assert pool.extra_loss() is None


@pytest.mark.parametrize(("e_length", "stored", "trained"), [(5, 253_440, 39_168), (20, 944_640, 108_288)])
def test_counts_at_width_768(make_vit: Any, e_length: int, stored: int, trained: int) -> None:
    vit = make_vit(depth=5, embed_dim=768, num_heads=12, mlp_ratio=0.1)
    strategy = DualPromptStrategy(model=vit, e_length=e_length, evaluator=None)
    for task in range(10):
        strategy.model.begin(range(10 * task, 10 * task + 10))
        assert strategy.model.trainable_parameters() == trained
        strategy.model.end()
    assert strategy.model.stored_parameters() == stored
    assert strategy.model.head.stored_parameters() == 76_900


def test_published_defaults() -> None:
    config = DualPromptStrategy.config_class()
    assert (config.lr_prompt, config.lr_head) == (0.03 * 32 / 256,) * 2
    assert (config.clip_grad_norm, config.lr_schedule, config.optimizer) == (1.0, "constant", "adam")


def test_a_missing_block_is_named(make_vit: Any) -> None:
    with pytest.raises(ValueError, match=r"`e_blocks` but block 4 is missing: the model has depth 4"):
        DualPromptStrategy(model=make_vit(depth=4), evaluator=None)
    with pytest.raises(ValueError, match="common blocks"):
        DualPromptStrategy(model=make_vit(depth=5), g_blocks=(0, 2), evaluator=None)


def test_a_saved_strategy_goes_on_where_it_was(make_vit: Any, tmp_path: Any, images: Tensor) -> None:
    first, second = (DualPromptStrategy(model=make_vit(depth=5), evaluator=None) for _ in range(2))
    for classes in ([0, 1], [2, 3]):
        first.model.begin(classes)
    with pytest.raises(ValueError, match="Expected a model between experiences"):
        first.save(tmp_path / "adapter.safetensors")
    first.model.end()
    first.model.head.close()
    first.save(tmp_path / "adapter.safetensors")
    second.load(tmp_path / "adapter.safetensors")
    assert torch.equal(first.model.eval()(images), second.model.eval()(images))
    for strategy in (first, second):
        strategy.model.begin([4, 5])
    assert torch.equal(first.model.pool.active_key, second.model.pool.active_key)
    assert torch.equal(first.model.pool.active_expert, second.model.pool.active_expert)
