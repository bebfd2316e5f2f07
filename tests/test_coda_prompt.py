"""CODA-Prompt against a literal twin, and the mistakes that copies of it make."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from twins import adam, step, tokens

from avalanche_fmlora.config import make_run
from avalanche_fmlora.experiment import make_strategy as strategy_of
from avalanche_fmlora.strategies.coda_prompt import CODAPromptPool, CODAPromptStrategy, orthonormal_rows

DIM, SIZE, LENGTH, TASKS = 16, 6, 4, 3
BLOCKS = (0, 1, 2, 3, 4)


class Reference:
    """CODA-Prompt in loops: one sample, one block, one component, one head at a time; parameters are plain tensors."""

    def __init__(self, vit: Any, prompts: Tensor, keys: Tensor, attention: Tensor) -> None:
        self.vit, self.prompts, self.keys, self.attention_vectors = vit, prompts, keys, attention

    def query(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            return tokens(self.vit, image, {})[0]

    def weight(self, query: Tensor, block: int, m: int) -> Tensor:
        attended, key = query * self.attention_vectors[block][m], self.keys[block][m]
        return (attended * key).sum() / ((attended * attended).sum().sqrt() * (key * key).sum().sqrt())

    def feature(self, image: Tensor, components: int) -> Tensor:
        query, prefixes = self.query(image), {}
        for block in BLOCKS:
            prompt = torch.zeros(LENGTH, DIM, dtype=image.dtype)
            for m in range(components):
                prompt = prompt + self.weight(query, block, m) * self.prompts[block][m]
            prefixes[block] = (prompt[: LENGTH // 2], prompt[LENGTH // 2 :])
        return tokens(self.vit, image, prefixes)[0]

    def penalty(self, components: int) -> Tensor:
        total = torch.zeros((), dtype=self.keys.dtype)
        for block in BLOCKS:
            for rows in (self.keys[block], self.attention_vectors[block], self.prompts[block].flatten(1)):
                for m in range(components):
                    for n in range(components):
                        total = total + ((rows[m] * rows[n]).sum() - int(m == n)) ** 2 / components**2
        return total


def build(make_vit: Any, **options: Any) -> Any:
    options = {"pool_size": SIZE, "n_tasks": TASKS, "prompt_length": LENGTH, "lr_prompt": 0.02, **options}
    strategy = CODAPromptStrategy(model=make_vit(depth=5), evaluator=None, **options)
    strategy.model.double()
    return strategy


def begin_two(strategy: Any) -> CODAPromptPool:
    """Two tasks begun, the first changed and closed, the second open."""
    pool = strategy.model.pool
    for classes in ([0, 1], [2, 3]):
        strategy.model.begin(classes)
        strategy.make_optimizer()
        if classes == [0, 1]:
            with torch.no_grad():
                for p in pool.trained():
                    p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p)
            strategy.model.end()
    return pool


@pytest.fixture
def photos() -> Tensor:
    return torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_features_and_weights_are_the_twins(make_vit: Any, photos: Tensor) -> None:
    strategy = build(make_vit)
    pool = begin_two(strategy)
    strategy.model.end()
    twin = Reference(strategy.model.vit, pool.prompts, pool.keys, pool.attention)
    features = strategy.model.eval().features(photos)
    expected = torch.stack([twin.feature(x, 4) for x in photos])
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-10)
    assert pool.last_weights.shape == (5, 4, 4)
    for block in BLOCKS:
        for b, x in enumerate(photos):
            for m in range(4):
                assert abs((pool.last_weights[block, b, m] - twin.weight(twin.query(x), block, m)).item()) < 1e-12
    assert pool.last_weights.min() < -0.1  # no softmax
    assert not features.requires_grad


def test_first_half_is_for_the_keys(make_vit: Any, photos: Tensor) -> None:
    pool = begin_two(build(make_vit))
    prefixes = pool(photos.flatten(1)[:, :DIM])
    prompts, _, _ = pool.components()
    for block, (keys, values) in prefixes.items():
        mixed = sum(pool.last_weights[block, :, m, None, None] * prompts[block, m] for m in range(4))
        torch.testing.assert_close(keys, mixed[:, : LENGTH // 2])
        torch.testing.assert_close(values, mixed[:, LENGTH // 2 :])


def test_a_sample_does_not_depend_on_its_batch(make_vit: Any, photos: Tensor) -> None:
    strategy = build(make_vit)
    begin_two(strategy)
    model = strategy.model.eval()
    alone = torch.cat([model(x[None]) for x in photos])
    torch.testing.assert_close(model(photos), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ortho_weight", [0.0, 0.7])
def test_two_steps_are_the_twins(make_vit: Any, photos: Tensor, ortho_weight: float) -> None:
    strategy = build(make_vit, ortho_weight=ortho_weight)
    pool, head = begin_two(strategy), strategy.model.head
    with torch.no_grad():  # else gradients start at zero, and Adam turns rounding into steps
        for p in (*pool.trained(), head.active_rows):
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p)
    labels = torch.tensor([2, 3, 2, 2])
    past = [x[:, :2].clone() for x in (pool.prompts, pool.keys, pool.attention)]
    own = [pool.active_prompts, pool.active_keys, pool.active_attention, head.active_rows, head.active_bias]
    params = [p.detach().clone().requires_grad_() for p in own]
    state: dict[Any, Any] = {}
    for _ in range(2):
        whole = [torch.cat([old, new], dim=1) for old, new in zip(past, params[:3], strict=True)]
        twin = Reference(strategy.model.vit, *whole)
        loss = ortho_weight * twin.penalty(4)
        for x, y in zip(photos, labels.tolist(), strict=True):
            logits = params[3] @ twin.feature(x, 4) + params[4]
            loss = loss - (logits[y - 2] - logits.exp().sum().log()) / len(photos)
        assert abs(step(strategy, photos, labels) - loss.item()) < 1e-10
        grads = list(torch.autograd.grad(loss, params))
        adam(params, grads, [0.02, 0.02, 0.02, 1e-3, 1e-3], state)
    for ours, expected in zip(own, params, strict=True):
        torch.testing.assert_close(ours.detach(), expected.detach(), rtol=0, atol=1e-10)
    for stored, old in zip((pool.prompts, pool.keys, pool.attention), past, strict=True):
        assert torch.equal(stored[:, :2], old)


def test_components_to_come_take_no_part(make_vit: Any, photos: Tensor) -> None:
    strategy = build(make_vit, ortho_weight=1.0)
    pool = begin_two(strategy)
    model = strategy.model.eval()
    before, penalty = model(photos), pool.extra_loss()
    with torch.no_grad():
        for stored in (pool.prompts, pool.keys, pool.attention):
            stored[:, 4:] = 9.0
    assert torch.equal(model(photos), before)
    assert torch.equal(pool.extra_loss(), penalty)


def test_new_components_are_orthonormal_to_all_earlier_ones(make_vit: Any) -> None:
    pool = begin_two(build(make_vit, prompt_length=2))
    past = [x[:, :2].flatten(2).clone() for x in (pool.prompts, pool.keys, pool.attention)]
    new = [x.detach().flatten(2) for x in (pool.active_prompts, pool.active_keys, pool.active_attention)]
    for old, rows in zip(past, new, strict=True):
        for block in BLOCKS:
            assert (old[block] @ old[block].T - torch.eye(2)).abs().max() > 0.1  # they have trained
            assert (rows[block] @ old[block].T).abs().max() < 1e-6
            assert (rows[block] @ rows[block].T - torch.eye(2)).abs().max() < 1e-6
    assert (new[1][0] - new[1][1]).abs().max() > 0.1  # each block has its own


def test_more_rows_than_dimensions_are_random_but_of_unit_length() -> None:
    rows = orthonormal_rows(torch.zeros(0, 4, dtype=torch.float64), 6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows[:4] @ rows[:4].T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert orthonormal_rows(rows, 2, torch.Generator().manual_seed(1)).isfinite().all()


def test_past_components_keep_every_bit_under_momentum_and_decay(
    make_strategy: Any, make_vit: Any, class_benchmark: Any
) -> None:
    options = {"pool_size": 6, "n_tasks": 3, "optimizer": "sgd", "weight_decay": 0.1, "lr_prompt": 0.1}
    strategy = make_strategy("coda_prompt", make_vit(depth=5), blocks=BLOCKS, **options)
    pool = strategy.model.pool
    past: list[Tensor] = []
    for task, experience in enumerate(class_benchmark.train_stream):
        strategy.train(experience)
        now = [x[:, : 2 * task + 2].clone() for x in (pool.prompts, pool.keys, pool.attention)]
        for old, new in zip(past, now, strict=False):
            assert torch.equal(new[:, : 2 * task], old)
        assert (now[1][:, -1].norm(dim=-1) - 1).abs().max() > 1e-3  # the current ones have moved
        past = now


def test_rates_follow_the_published_course(make_strategy: Any, make_vit: Any, class_benchmark: Any) -> None:
    from avalanche.core import SupervisedPlugin

    class Rates(SupervisedPlugin):
        seen: list[tuple[float, ...]] = []  # noqa: RUF012

        def before_update(self, strategy: Any, **kwargs: Any) -> None:
            self.seen.append(tuple(g["lr"] for g in strategy.optimizer.param_groups))

    options = {"train_epochs": 4, "train_mb_size": 8, "plugins": [Rates()]}
    strategy = make_strategy("coda_prompt", make_vit(depth=5), lr_prompt=0.5, lr_head=0.25, **options)
    for experience in list(class_benchmark.train_stream)[:2]:
        strategy.train(experience)
    factors = [math.cos(99 * math.pi * e / (200 * 3)) for e in (0, 0, 1, 1, 2, 2, 3, 3)] * 2
    assert [lr for lr, _ in Rates.seen] == pytest.approx([0.5 * f for f in factors])
    assert [lr for _, lr in Rates.seen] == pytest.approx([0.25 * f for f in factors])
    assert strategy.config_class().lr_schedule == "coda"
    assert (strategy.config_class().lr_prompt, strategy.config_class().lr_head) == (1e-3, 1e-3)
    assert strategy.config_class().clip_grad_norm is None


def test_domains_have_components_each(make_strategy: Any, make_vit: Any, domain_benchmark: Any) -> None:
    strategy = make_strategy("coda_prompt", make_vit(depth=5), n_tasks=3, pool_size=6)
    for experience in domain_benchmark.train_stream:
        strategy.train(experience)
    assert int(strategy.model.pool.experiences) == 3
    assert strategy.model.head.n_classes == 3


def test_too_many_experiences_are_refused(
    make_strategy: Any, make_vit: Any, class_benchmark: Any, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = make_strategy("coda_prompt", make_vit(depth=5), n_tasks=2, pool_size=4, train_epochs=1)
    experiences = list(class_benchmark.train_stream)
    with caplog.at_level(logging.WARNING):
        strategy.train(experiences[0])
    assert "The stream has 3 experiences but the pool is for n_tasks=2" in caplog.text
    strategy.train(experiences[1])
    with pytest.raises(ValueError, match="Expected at most n_tasks=2 experiences but another one begins"):
        strategy.train(experiences[2])


def test_a_pool_that_does_not_divide_is_an_error(make_vit: Any) -> None:
    with pytest.raises(ValueError, match=r"multiple of `n_tasks` but got 100 and 7: .* take pool_size=98"):
        CODAPromptStrategy(model=make_vit(depth=5), n_tasks=7, evaluator=None)
    with pytest.raises(ValueError, match="prompt_length"):
        CODAPromptStrategy(model=make_vit(depth=5), prompt_length=5, evaluator=None)


def test_a_missing_block_is_named(make_vit: Any) -> None:
    with pytest.raises(ValueError, match="block 3, 4 is missing: the model has depth 3"):
        CODAPromptStrategy(model=make_vit(depth=3), evaluator=None)


def test_counts_at_width_768(make_vit: Any) -> None:
    vit = make_vit(depth=5, embed_dim=768, num_heads=12, mlp_ratio=0.1)
    strategy = CODAPromptStrategy(model=vit, evaluator=None)
    assert strategy.model.stored_parameters() == 3_840_000
    assert strategy.model.trainable_parameters() == 0
    strategy.model.begin(range(10))
    assert strategy.model.trainable_parameters() == 384_000


def test_a_saved_strategy_goes_on_where_it_was(make_vit: Any, tmp_path: Any, photos: Tensor) -> None:
    first, second = build(make_vit), build(make_vit)
    begin_two(first)
    with pytest.raises(ValueError, match="Expected a model between experiences"):
        first.save(tmp_path / "adapter.safetensors")
    first.model.end()
    first.model.head.close()
    first.save(tmp_path / "adapter.safetensors")
    second.load(tmp_path / "adapter.safetensors")
    assert torch.equal(first.model.eval()(photos), second.model.eval()(photos))
    for strategy in (first, second):
        strategy.model.begin([4, 5])
    assert torch.equal(first.model.pool.active_prompts, second.model.pool.active_prompts)
    assert torch.equal(first.model.pool.keys, second.model.pool.keys)


@pytest.mark.parametrize(("n_experiences", "size"), [(3, 99), (6, 102), (10, 100), (300, 300)])
def test_a_run_takes_the_pool_that_its_experiences_share_evenly(n_experiences: int, size: int, make_vit: Any) -> None:
    def built(**options: Any) -> Any:
        config = make_run({"method": "coda_prompt", "method_options": {"prompt_length": 2, **options}})
        backbone = SimpleNamespace(model=make_vit(depth=5))
        return strategy_of(config, backbone, "cpu", n_experiences).model.pool.prompts.shape[1]  # type: ignore[arg-type]

    assert built() == size
    with pytest.raises(ValueError, match="Expected `pool_size` to be a multiple of `n_tasks`"):
        built(pool_size=100 * n_experiences + 1)
