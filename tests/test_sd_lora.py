"""SD-LoRA against a literal twin, and what must be normalised, started again, frozen, counted and loadable."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from torch import Tensor
from twins import arrays, double_strategy

from avalanche_fmlora.strategies.sd_lora import SDLoRAStrategy, direction_scales
from avalanche_fmlora.strategies.seq_lora import SeqLoRAStrategy

STEPS, RATE, HEAD_RATE = 4, 5e-2, 5e-3


def frobenius(matrix: Tensor) -> float:
    return math.sqrt(sum(float(x) ** 2 for row in matrix for x in row))


def reference_features(vit: Any, change: Any, images: Tensor) -> Tensor:
    """A pass with one sample and one head after the other; `change(block, part, x)` is added to queries and values."""
    features = []
    for image in images:
        x = vit._pos_embed(vit.patch_embed(image[None]))[0]
        for i, block in enumerate(vit.blocks):
            z = block.norm1(x)
            weight, bias = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
            q, k, v = (z @ weight[j].T + bias[j] for j in range(3))
            q, v = q + change(i, 0, z), v + change(i, 1, z)
            heads = []
            size = q.shape[1] // block.attn.num_heads
            for h in range(block.attn.num_heads):
                part = slice(h * size, (h + 1) * size)
                heads.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(size), -1) @ v[:, part])
            x = x + block.attn.proj(torch.cat(heads, 1))
            x = x + block.mlp(block.norm2(x))
        features.append(vit.norm(x)[0])
    return torch.stack(features)


class Reference:
    """SD-LoRA as loops; factors[s][block][part] is (B_s, A_s)."""

    def __init__(self, vit: Any) -> None:
        self.vit = vit
        self.factors: list[list[list[tuple[Tensor, Tensor]]]] = []
        self.magnitudes: list[Tensor] = []
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}

    def change(self, block: int, part: int, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for s, (factors, magnitude) in enumerate(zip(self.factors, self.magnitudes, strict=True)):
            up, down = factors[block][part]
            out = x @ down.T @ up.T
            if s < len(self.factors) - 1:
                out = out / (frobenius(up) * frobenius(down))
            total = total + magnitude * out
        return total

    def logits(self, images: Tensor) -> Tensor:
        features = reference_features(self.vit, self.change, images)
        return torch.stack([features @ w + b for _, (w, b) in sorted(self.rows.items())], 1)

    def learn(self, starts: list[Tensor], images: Tensor, labels: Tensor) -> None:
        size = self.vit.embed_dim
        new = [[(torch.zeros(size, len(a), dtype=a.dtype), a.clone()) for a in block] for block in starts]
        self.factors.append(new)
        self.magnitudes = [torch.tensor(0.8, dtype=torch.float64, requires_grad=True) for _ in self.factors]
        trained = [f.requires_grad_() for block in new for pair in block for f in pair]
        classes = sorted(set(labels.tolist()))
        rows = torch.zeros(len(classes), size, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(len(classes), dtype=torch.float64, requires_grad=True)
        groups = [{"params": [*trained, *self.magnitudes], "lr": RATE}, {"params": [rows, bias], "lr": HEAD_RATE}]
        optimizer = torch.optim.Adam(groups)
        local = torch.tensor([classes.index(c) for c in labels.tolist()])
        for _ in range(STEPS):
            features = reference_features(self.vit, self.change, images)
            optimizer.zero_grad()
            F.cross_entropy(features @ rows.T + bias, local).backward()
            optimizer.step()
        for tensor in (*trained, *self.magnitudes):
            tensor.requires_grad_(False)
        self.rows |= {c: (rows[i].detach(), bias[i].detach()) for i, c in enumerate(classes)}


class Starts(SupervisedPlugin):
    """Keeps each A_t as it was drawn, and the magnitudes of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.magnitudes: list[Tensor] = []

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.downs = [x.down.detach().clone() for x in strategy.model.lora.layers]
        self.ups = [x.up.detach().clone() for x in strategy.model.lora.layers]
        self.magnitudes.append(strategy.model.lora.magnitudes.values.detach().clone())

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        named = {n for n, p in strategy.model.named_parameters() if p.grad is not None}
        lora = {f"vit.blocks.{i}.attn.qkv.{x}" for i in (0, 1) for x in ("up", "down")} | {"lora.magnitudes.values"}
        assert named == lora | {"head.active_rows", "head.active_bias"}
        for layer in strategy.model.lora.layers:
            assert layer.ups.grad is None
            assert layer.downs.grad is None


def test_whole_runs_equal_a_literal_twin(make_strategy: Any, make_vit: Any, class_benchmark: Any) -> None:
    starts = Starts()
    strategy, plain = double_strategy(
        "sd_lora", make_strategy, make_vit, rank=2, train_mb_size=64, train_epochs=STEPS, lr_lora=RATE, plugins=[starts]
    )
    twin = Reference(plain)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    for t, experience in enumerate(class_benchmark.train_stream):
        strategy.train(experience)
        twin.learn([list(a) for a in starts.downs], *arrays(experience))
        assert torch.equal(starts.magnitudes[t], torch.full((t + 1,), 0.8, dtype=torch.float64))
        assert all(float(x.abs().max()) == 0 for x in starts.ups)
        values = strategy.model.lora.magnitudes.values
        torch.testing.assert_close(values, torch.stack(twin.magnitudes), rtol=0, atol=1e-10)
        assert float((values - 0.8).abs().min()) > 1e-3  # every one of them trained
        for i, layer in enumerate(strategy.model.lora.layers):
            for s in range(t + 1):
                for part in (0, 1):
                    up, down = twin.factors[s][i][part]
                    torch.testing.assert_close(layer.ups[s, part], up, rtol=0, atol=1e-10)
                    torch.testing.assert_close(layer.downs[s, part], down, rtol=0, atol=1e-10)
        strategy.model.eval()
        with torch.no_grad():
            logits = strategy.model(images)[:, sorted(twin.rows)]
            torch.testing.assert_close(logits, twin.logits(images), rtol=0, atol=1e-10)
    strategy.model.begin([0])
    twin.factors.append([[(torch.zeros(16, 2).double(), torch.ones(2, 16).double())] * 2] * 2)
    twin.magnitudes = [torch.tensor(0.8, dtype=torch.float64)] * 4
    with torch.no_grad():
        logits = strategy.model(images)[:, sorted(twin.rows)]
        torch.testing.assert_close(logits, twin.logits(images), rtol=0, atol=1e-10)


def test_the_latest_update_counts_raw_until_the_next_experience_begins(make_strategy: Any, make_vit: Any) -> None:
    strategy, _ = double_strategy("sd_lora", make_strategy, make_vit, rank=3)
    model, layer = strategy.model, strategy.model.lora.layers[0]
    generator = torch.Generator().manual_seed(5)
    products = []
    for _ in range(2):
        model.begin([0])
        layer.up.data.normal_(generator=generator)
        layer.down.data.normal_(generator=generator)
        products.append((layer.up.detach().clone(), layer.down.detach().clone()))
        open_delta = layer.delta_weight().detach()
        model.end()
        torch.testing.assert_close(layer.delta_weight(), open_delta, rtol=0, atol=1e-14)
    (up0, down0), (up1, down1) = products
    q = 0.8 * up0[0] @ down0[0] / (frobenius(up0[0]) * frobenius(down0[0])) + 0.8 * up1[0] @ down1[0]
    torch.testing.assert_close(layer.delta_weight()[:16], q, rtol=0, atol=1e-12)
    assert float(layer.delta_weight()[16:32].abs().max()) == 0  # k
    model.lora.magnitudes.values[0] = 3.0
    model.begin([0])
    directions = [up[1] @ down[1] / (frobenius(up[1]) * frobenius(down[1])) for up, down in products]
    torch.testing.assert_close(layer.delta_weight()[32:], 0.8 * sum(directions), rtol=0, atol=1e-12)


def test_an_update_of_zero_has_no_direction() -> None:
    ups = torch.stack([torch.zeros(4, 2), torch.ones(4, 2)])
    scales = direction_scales(ups, torch.ones(2, 2, 4))
    torch.testing.assert_close(scales, torch.tensor([0.0, 1 / 8]))


def test_the_past_and_the_backbone_stay_to_the_bit(
    make_strategy: Any, make_vit: Any, train: Any, class_benchmark: Any
) -> None:
    vit = make_vit()
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    kept: list[tuple[Tensor, Tensor]] = []

    def check(strategy: Any) -> None:
        layer = strategy.model.lora.layers[1]
        for s, (up, down) in enumerate(kept):
            assert torch.equal(layer.ups[s], up)
            assert torch.equal(layer.downs[s], down)
        kept.append((layer.ups[-1].clone(), layer.downs[-1].clone()))

    train(make_strategy("sd_lora", vit=vit, weight_decay=0.1, plugins=[Starts()]), class_benchmark, after=check)
    after = {k.replace(".base.", "."): v for k, v in vit.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert len(kept) == 3


def test_counts_at_vit_b16_and_one_forward_pass() -> None:
    vit = timm.create_model("vit_base_patch16_224", pretrained=False)
    model = SDLoRAStrategy(model=vit, evaluator=None).model
    passes: list[int] = []
    vit.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    for t in range(3):
        model.begin(range(10))
        assert model.trainable_parameters() == 368_640 + t + 1
        model.end()
        assert model.stored_parameters() == (t + 1) * (368_640 + 1)
    assert model.stored_statistics() == 0
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert len(passes) == 1


def test_sequential_lora_has_as_many_and_does_not_grow() -> None:
    model = SeqLoRAStrategy(model=timm.create_model("vit_base_patch16_224", pretrained=False), evaluator=None).model
    for _ in range(2):
        model.begin(range(10))
        assert model.trainable_parameters() == 368_640
        model.end()


def test_one_forward_pass_a_step(make_strategy: Any, class_benchmark: Any) -> None:
    strategy = make_strategy("sd_lora", train_epochs=3)
    samples: list[int] = []
    strategy.model.vit.blocks[0].register_forward_hook(lambda m, args, out: samples.append(len(args[0])))
    experience = class_benchmark.train_stream[0]
    strategy.train(experience)
    assert sum(samples) == 3 * len(experience.dataset)


def test_saved_and_loaded_goes_on_as_if_never_stopped(
    make_strategy: Any, train: Any, class_benchmark: Any, images: Tensor, tmp_path: Any
) -> None:
    strategy = train(make_strategy("sd_lora"), class_benchmark, n=2)
    path = strategy.save(tmp_path / "adapter.safetensors")
    other = make_strategy("sd_lora")
    other.load(path)
    state, loaded = strategy.model.adapter_state(), other.model.adapter_state()
    assert state.keys() == loaded.keys()
    assert sum("magnitudes" in k for k in state) == 1
    assert all(torch.equal(v, loaded[k]) for k, v in state.items())
    strategy.model.eval()
    other.model.eval()
    assert torch.equal(strategy.model(images), other.model(images))
    for s in (strategy, other):
        torch.manual_seed(3)
        s.train(class_benchmark.train_stream[2])
        s.model.eval()
    assert torch.equal(strategy.model(images), other.model(images))
    strategy.load(path)
    assert all(torch.equal(v, state[k]) for k, v in strategy.model.adapter_state().items())


def test_domains_bf16_and_wrong_options(make_strategy: Any, train: Any, domain_benchmark: Any) -> None:
    strategy = train(make_strategy("sd_lora", precision="bf16", targets=("v", "fc1")), domain_benchmark)
    assert strategy.model.head.n_classes == 3
    assert [tuple(x.ups.shape) for x in strategy.model.lora.layers[:2]] == [(3, 1, 16, 4), (3, 1, 32, 4)]
    assert all(bool(v.isfinite().all()) for v in strategy.model.adapter_state().values())
    with pytest.raises(ValueError, match="rank"):
        make_strategy("sd_lora", rank=17)
    with pytest.raises(ValueError, match="SDLoRALinear"):
        make_strategy("sd_lora", vit=strategy.model.vit)
