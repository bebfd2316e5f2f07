"""InfLoRA against a literal twin, DualGPM against a numpy one, and what must stay frozen, counted and loadable."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from reference_memory import reference_memory
from torch import Tensor
from twins import arrays, double_strategy

from avalanche_fmlora.modules.dual_gpm import InputMoments
from avalanche_fmlora.strategies.inflora import InfLoRAPlugin, InfLoRAStrategy


def reference_features(vit: Any, weights: list[dict[str, Tensor]], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A pass with one sample and one head after the other; also the inputs of each block's attention [B, N, D]."""
    features, inputs = [], [[] for _ in vit.blocks]
    for image in images:
        x = vit._pos_embed(vit.patch_embed(image[None]))[0]
        for i, block in enumerate(vit.blocks):
            z = block.norm1(x)
            inputs[i].append(z.detach())
            bias = dict(zip("qkv", block.attn.qkv.bias.chunk(3), strict=True))
            q, k, v = (z @ weights[i][part].T + bias[part] for part in "qkv")
            heads = []
            size = q.shape[1] // block.attn.num_heads
            for h in range(block.attn.num_heads):
                part = slice(h * size, (h + 1) * size)
                heads.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(size), -1) @ v[:, part])
            x = x + block.attn.proj(torch.cat(heads, 1))
            x = x + block.mlp(block.norm2(x))
        features.append(vit.norm(x)[0])
    return torch.stack(features), [torch.stack(z) for z in inputs]


class Reference:
    """InfLoRA as loops over experiences, blocks and tokens."""

    def __init__(self, vit: Any, rank: int, threshold: float, n_tasks: int) -> None:
        self.vit, self.rank, self.threshold, self.n_tasks = vit, rank, threshold, n_tasks
        depth = len(vit.blocks)
        self.updates: list[list[dict[str, Tensor]]] = [[] for _ in range(depth)]
        self.memory: list[tuple[Any, str]] = [(None, "remove")] * depth
        self.rows: dict[int, Tensor] = {}
        self.bias: dict[int, Tensor] = {}
        self.task = 0

    def weights(self) -> list[dict[str, Tensor]]:
        out = []
        for block, updates in zip(self.vit.blocks, self.updates, strict=True):
            weights = dict(zip("qkv", block.attn.qkv.weight.chunk(3), strict=True))
            for update in updates:
                for part in "kv":
                    weights[part] = weights[part] + update[part] @ update["A"]
            out.append(weights)
        return out

    def moments(self, images: Tensor) -> list[np.ndarray]:
        with torch.no_grad():
            _, inputs = reference_features(self.vit, self.weights(), images)
        out = []
        for z in inputs:
            tokens = z.flatten(0, 1).numpy()
            out.append(sum(np.outer(x, x) for x in tokens) / len(tokens))
        return out

    def learn(self, images: Tensor, labels: Tensor, steps: int, lr_lora: float, lr_head: float) -> None:
        for i, moment in enumerate(self.moments(images)):
            memory, kind = self.memory[i]
            if memory is not None:
                inside = memory @ memory.T @ moment
                moment = inside if kind == "retain" else moment - inside
            down = torch.from_numpy(np.linalg.svd(moment)[0][:, : self.rank].T / math.sqrt(3))
            zero = torch.zeros(len(moment), self.rank, dtype=torch.float64)
            self.updates[i].append({"A": down} | {p: zero.clone().requires_grad_() for p in "kv"})
        classes = sorted(set(labels.tolist()))
        rows = torch.zeros(len(classes), self.vit.embed_dim, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(len(classes), dtype=torch.float64, requires_grad=True)
        trained = [u[-1][p] for u in self.updates for p in "kv"]
        groups = [{"params": trained, "lr": lr_lora}, {"params": [rows, bias], "lr": lr_head}]
        optimizer = torch.optim.Adam(groups)
        local = torch.tensor([classes.index(c) for c in labels.tolist()])
        for _ in range(steps):
            features, _ = reference_features(self.vit, self.weights(), images)
            optimizer.zero_grad()
            F.cross_entropy(features @ rows.T + bias, local).backward()
            optimizer.step()
        for u in self.updates:
            u[-1] = {k: x.detach() for k, x in u[-1].items()}
        for i, c in enumerate(classes):
            self.rows[c], self.bias[c] = rows[i].detach(), bias[i].detach()
        share = self.threshold + (1 - self.threshold) * self.task / self.n_tasks
        for i, moment in enumerate(self.moments(images)):
            self.memory[i] = reference_memory(*self.memory[i], moment, share)
        self.task += 1


@pytest.mark.parametrize("threshold", [0.6, 0.99])
def test_whole_runs_equal_a_literal_twin(
    make_strategy: Any, make_vit: Any, class_benchmark: Any, threshold: float
) -> None:
    strategy, plain = double_strategy(
        "inflora",
        make_strategy,
        make_vit,
        rank=2,
        threshold=threshold,
        n_tasks=3,
        train_mb_size=64,
        train_epochs=4,
        lr_lora=2e-2,
    )
    twin = Reference(plain, 2, threshold, 3)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    kinds = set()
    for experience in class_benchmark.train_stream:
        strategy.train(experience)
        twin.learn(*arrays(experience), steps=4, lr_lora=2e-2, lr_head=5e-3)
        strategy.model.eval()
        classes = sorted(twin.rows)
        with torch.no_grad():
            features, _ = reference_features(plain, twin.weights(), images)
            logits = torch.stack([features @ twin.rows[c] + twin.bias[c] for c in classes], 1)
            torch.testing.assert_close(strategy.model(images)[:, classes], logits, rtol=0, atol=1e-10)
        for layer, weights, (memory, kind) in zip(strategy.model.lora.layers, twin.weights(), twin.memory, strict=True):
            whole = torch.cat([weights[p] for p in "qkv"])
            torch.testing.assert_close(layer.base.weight + layer.delta_weight(), whole, rtol=0, atol=1e-10)
            assert bool(layer.retain) == (kind == "retain")
            span = torch.from_numpy(memory @ memory.T)
            torch.testing.assert_close(layer.basis @ layer.basis.T, span, rtol=0, atol=1e-9)
            kinds.add(kind)
    assert float(strategy.model.lora.layers[0].delta_weight().abs().max()) > 1e-2
    assert ("retain" in kinds) == (threshold == 0.99)


def test_threshold_rises_linearly_and_then_stays() -> None:
    plugin = InfLoRAPlugin(threshold=0.95, n_tasks=10)
    assert [plugin.share(t) for t in (0, 1, 9, 10, 50)] == pytest.approx([0.95, 0.955, 0.995, 0.995, 0.995])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_moments_are_exact_in_any_precision(make_strategy: Any, make_vit: Any, images: Tensor, precision: str) -> None:
    strategy = make_strategy("inflora", precision=precision)
    layers = strategy.model.lora.layers
    seen: list[Tensor] = []
    handle = layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad(), InputMoments(layers) as moments:
        strategy.features(images[:3])
        strategy.features(images[3:])
    handle.remove()
    tokens = torch.cat([x.flatten(0, 1) for x in seen])
    torch.testing.assert_close(moments.values()[1], tokens.T @ tokens / len(tokens), rtol=0, atol=1e-5)
    strategy.features(images)
    assert len(seen) == 2
    assert not layers[1]._forward_pre_hooks
    with InputMoments(layers) as empty, pytest.raises(ValueError, match="at least one image"):
        empty.values()


def test_only_b_and_the_head_train_and_the_past_stays_to_the_bit(
    make_strategy: Any, make_vit: Any, train: Any, class_benchmark: Any
) -> None:
    from avalanche.core import SupervisedPlugin

    class Watch(SupervisedPlugin):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            self.past = [(x.ups.clone(), x.downs.clone()) for x in strategy.model.lora.layers]
            self.downs = [x.down.clone() for x in strategy.model.lora.layers]
            assert all(float(x.down.abs().max()) > 0 for x in strategy.model.lora.layers)

        def after_backward(self, strategy: Any, **kwargs: Any) -> None:
            named = {n for n, p in strategy.model.named_parameters() if p.grad is not None}
            assert named == {f"vit.blocks.{i}.attn.qkv.up" for i in (0, 1)} | {"head.active_rows", "head.active_bias"}

        def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            for layer, down in zip(strategy.model.lora.layers, self.downs, strict=True):
                assert torch.equal(layer.down, down)
                assert not layer.down.requires_grad

        def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            for layer, (ups, downs), down in zip(strategy.model.lora.layers, self.past, self.downs, strict=True):
                assert torch.equal(layer.ups[:-1], ups)
                assert torch.equal(layer.downs[:-1], downs)
                assert torch.equal(layer.downs[-1], down)
                assert float(layer.ups[-1].abs().max()) > 0

    vit = make_vit()
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    strategy = train(make_strategy("inflora", vit=vit, plugins=[Watch()]), class_benchmark)
    after = {k.replace(".base.", "."): v for k, v in vit.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert float(strategy.model.lora.layers[0].delta_weight()[:16].abs().max()) == 0  # q
    assert int(strategy.model.lora.experiences) == 3


def test_a_new_update_leaves_outputs_for_past_inputs_alone(make_strategy: Any, make_vit: Any) -> None:
    """B_t trains only in directions outside the memory: where that covers the past inputs, they do not notice it."""
    strategy, _ = double_strategy("inflora", make_strategy, make_vit, rank=4, blocks=(0,))
    layer = strategy.model.lora.layers[0]
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # spans 6 of 16 directions
    fresh = torch.randn(30, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer.begin()
    for _ in range(2):  # the first memory stops one direction short of its threshold, as published
        layer.remember(x.T @ x / 6, 1 - 1e-13)
    layer.close()
    before = layer(x)
    layer.begin()
    layer.set_directions(fresh.T @ fresh / 30)
    layer.up.data.normal_(generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-5)
        assert float((layer(fresh) - layer.base(fresh)).abs().max()) > 0.1


def test_counts_at_vit_b16_and_one_forward_pass() -> None:
    vit = timm.create_model("vit_base_patch16_224", pretrained=False)
    strategy = InfLoRAStrategy(model=vit, evaluator=None)
    model = strategy.model
    passes: list[int] = []
    vit.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    model.begin(range(10))
    assert model.trainable_parameters() == 184_320
    assert model.stored_parameters() == 0
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert len(passes) == 1
    model.end()
    assert model.stored_parameters() == 184_320 + 12 * 10 * 768
    assert model.stored_statistics() == 0
    model.lora.layers[0].remember(torch.eye(768, dtype=torch.float64), 0.25)
    assert model.stored_statistics() == 768 * 191


def test_one_forward_pass_a_step_besides_two_over_the_images(make_strategy: Any, class_benchmark: Any) -> None:
    strategy = make_strategy("inflora", train_epochs=3)
    samples: list[int] = []
    strategy.model.vit.blocks[0].register_forward_hook(lambda m, args, out: samples.append(len(args[0])))
    experience = class_benchmark.train_stream[0]
    strategy.train(experience)
    assert sum(samples) == (3 + 2) * len(experience.dataset)


def test_saved_and_loaded_goes_on_as_if_never_stopped(
    make_strategy: Any, train: Any, class_benchmark: Any, images: Tensor, tmp_path: Any
) -> None:
    strategy = train(make_strategy("inflora"), class_benchmark, n=2)
    path = strategy.save(tmp_path / "adapter.safetensors")
    other = make_strategy("inflora")
    other.load(path)
    state, loaded = strategy.model.adapter_state(), other.model.adapter_state()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(v, loaded[k]) for k, v in state.items())
    for s in (strategy, other):
        torch.manual_seed(3)
        s.train(class_benchmark.train_stream[2])
        s.model.eval()
    assert torch.equal(strategy.model(images), other.model(images))
    strategy.load(path)
    assert all(torch.equal(v, state[k]) for k, v in strategy.model.adapter_state().items())


def test_domains_and_more_experiences_than_planned(make_strategy: Any, train: Any, domain_benchmark: Any) -> None:
    strategy = train(make_strategy("inflora", n_tasks=2, precision="bf16"), domain_benchmark)
    assert strategy.model.head.n_classes == 3
    assert strategy.model.lora.layers[0].downs.shape == (3, 4, 16)
    assert strategy.model.lora.layers[0].downs.dtype == torch.float32


def test_other_targets_and_wrong_options(make_strategy: Any, make_vit: Any, train: Any, class_benchmark: Any) -> None:
    strategy = train(make_strategy("inflora", targets=("proj", "fc2"), blocks=(1,)), class_benchmark, n=2)
    assert [x.in_features for x in strategy.model.lora.layers] == [16, 32]
    with pytest.raises(ValueError, match="threshold"):
        make_strategy("inflora", threshold=1.5)
    with pytest.raises(ValueError, match="rank"):
        make_strategy("inflora", rank=17)
    with pytest.raises(ValueError, match="InfLoRALinear"):
        make_strategy("inflora", vit=strategy.model.vit)
