"""What must hold whatever is learned: float64, a tiny ViT with every part in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avalanche_fmlora.modules.factorized_lora import Bases, FactorizedLoRA
from avalanche_fmlora.modules.head import IncrementalHead
from avalanche_fmlora.modules.merging import merged_vit
from avalanche_fmlora.modules.network import ContinualNetwork, backbone_parameter_names
from avalanche_fmlora.modules.prompts import MetaPrompt
from avalanche_fmlora.modules.vit import adapt_linears

EXACT = {"rtol": 0.0, "atol": 1e-10}
KINDS = get_args(Bases)
RANK = 3


@pytest.fixture
def make_network(make_vit: Callable[..., Any]) -> Callable[..., ContinualNetwork]:
    """A network in float64 with updates of q, v and fc1, a prompt and a head."""

    def make(
        kind: str, *, cosine: bool = True, prompt: bool = True, targets: Any = ("q", "v", "fc1")
    ) -> ContinualNetwork:
        torch.manual_seed(0)
        vit = make_vit(dtype=torch.float64)
        lora = FactorizedLoRA(adapt_linears(vit, targets, None, RANK, 0.8), kind, seed=1)
        return ContinualNetwork(vit, IncrementalHead(16, cosine=cosine), lora, MetaPrompt(2, 16)).double()

    return make


def _learn(network: ContinualNetwork, classes: list[int], masks: Tensor | None = None, steps: int = 4) -> Tensor:
    """Open an experience and take some large steps; gives the images that it trained on."""
    generator = torch.Generator().manual_seed(sum(classes))
    x = torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64)
    y = torch.tensor(classes)[torch.arange(8) % len(classes)]
    network.begin(classes)
    if masks is not None:
        network.lora.set_mask(masks)
    optimizer = torch.optim.Adam([p for ps in network.parameter_groups().values() for p in ps], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    return x


def _close(network: ContinualNetwork, step: float = 1.0) -> None:
    network.end(step)
    network.head.close()


@torch.no_grad()
def _logits(network: ContinualNetwork, x: Tensor) -> Tensor:
    return network(x).clone()


@pytest.mark.parametrize("kind", KINDS)
def test_absorbing_and_rebasing_change_no_logit(make_network: Any, kind: str, images: Tensor) -> None:
    network, x = make_network(kind), images.double()
    for t, masks in enumerate((None, torch.tensor([[1.0, 1.0, 0.0]]).double(), None)):
        _learn(network, [2 * t, 2 * t + 1], masks if network.lora.experiences > 0 else None)
        before = _logits(network, x)
        _close(network)
        torch.testing.assert_close(_logits(network, x), before, **EXACT)
        assert int(network.lora.experiences) == t + 1
        assert all(layer.left is None and layer.mask is None for layer in network.lora.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_changes_no_logit_and_unmerging_is_exact(make_network: Any, kind: str, images: Tensor) -> None:
    network, x = make_network(kind), images.double()
    for t in range(2):
        _learn(network, [2 * t, 2 * t + 1])
        _close(network)
    before, state = _logits(network, x), {k: v.clone() for k, v in network.state_dict().items()}
    network.lora.merge()
    torch.testing.assert_close(_logits(network, x), before, **EXACT)
    assert any(layer.merged_weight is not None for layer in network.lora.layers)
    network.lora.unmerge()
    assert torch.equal(_logits(network, x), before)
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    torch.testing.assert_close(merged_vit(network)(x), before, **EXACT)


def test_training_after_merging_trains_the_factors(make_network: Any, images: Tensor) -> None:
    """A merged weight that stayed in use would silently stop all learning."""
    network, x = make_network("first_experience"), images.double()
    _learn(network, [0, 1])
    _close(network)
    network.lora.merge()
    core = network.lora.layers[0].core.clone()
    _learn(network, [2, 3])
    _close(network)
    assert not torch.equal(network.lora.layers[0].core, core)
    torch.testing.assert_close(merged_vit(network)(x), _logits(network, x), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_stays_to_the_bit_and_takes_no_gradient(make_network: Any, kind: str) -> None:
    network = make_network(kind)
    names = backbone_parameter_names(network.vit)
    before = {n: network.vit.state_dict()[n].clone() for n in names}
    frozen = {n: p for n, p in network.vit.named_parameters() if n in before}
    assert len(frozen) == len(before)
    for t in range(3):
        _learn(network, [2 * t, 2 * t + 1])
        assert not [n for n, p in frozen.items() if p.requires_grad or p.grad is not None]
        _close(network)
    after = network.vit.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in names)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_constant(make_network: Any, kind: str) -> None:
    """All that is kept besides the head, counted from the state itself, after one experience and after six."""
    network, sizes = make_network(kind), []
    for t in range(6):
        _learn(network, [2 * t, 2 * t + 1], steps=1)
        _close(network)
        state = {k: v.numel() for k, v in network.adapter_state().items() if not k.startswith("head.")}
        sizes.append((sum(state.values()), network.stored_parameters()))
    assert len(set(sizes)) == 1
    layers = network.lora.layers
    core = 0 if kind == "sequential" else RANK**2  # a plain LoRA's core is the identity
    by_hand = sum(len(x.slices) * (RANK * (x.part_features + x.in_features) + core) for x in layers) + 2 * 16
    assert sizes[0][1] == by_hand


@pytest.mark.parametrize("kind", ["first_experience", "pretrained_svd", "random_orthonormal"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("step", [1.0, 0.5])
def test_the_rank_of_an_update_is_bounded_and_the_step_is_its_share(
    make_network: Any, kind: str, rank: int, step: float
) -> None:
    network = make_network(kind)
    _learn(network, [0, 1])
    _close(network)
    before = [layer.core.clone() for layer in network.lora.layers]
    bases = [(layer.up.clone(), layer.down.clone()) for layer in network.lora.layers]
    mask = (torch.arange(RANK) < rank).double()
    _learn(network, [2, 3], mask[None])
    factors = [(layer.left.detach().clone(), layer.right.detach().clone()) for layer in network.lora.layers]
    left_out = sum(2 * len(layer.slices) * RANK * (RANK - rank) for layer in network.lora.layers)
    assert network.lora.masked_parameters() == left_out
    _close(network, step)
    assert network.lora.masked_parameters() == 0
    for i, layer in enumerate(network.lora.layers):
        left, right = factors[i]
        twin = step * torch.stack([m @ torch.diag(mask) @ n.T for m, n in zip(left, right, strict=True)])
        torch.testing.assert_close(layer.core - before[i], twin, **EXACT)
        assert (torch.linalg.matrix_rank(layer.core - before[i], atol=1e-9) == rank).all()
        assert torch.equal(layer.up, bases[i][0])
        assert torch.equal(layer.down, bases[i][1])


def test_one_mask_a_layer(make_network: Any) -> None:
    network = make_network("random_orthonormal")
    masks = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).double()
    _learn(network, [0, 1], masks)
    before = [layer.core.clone() for layer in network.lora.layers]
    _close(network)
    ranks = [
        torch.linalg.matrix_rank(layer.core - c, atol=1e-9).max().item()
        for layer, c in zip(network.lora.layers, before, strict=True)
    ]
    assert ranks == [1, 2, 3, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_bases_are_what_their_name_says(make_network: Any, kind: str) -> None:
    network = make_network(kind)
    eye = torch.eye(RANK, dtype=torch.float64)

    def orthonormal() -> bool:
        return all(
            torch.allclose(a.T @ a, eye, **EXACT) and torch.allclose(b @ b.T, eye, **EXACT)
            for layer in network.lora.layers
            for a, b in zip(layer.up, layer.down, strict=True)
        )

    start = [(layer.up.clone(), layer.down.clone()) for layer in network.lora.layers]
    assert all(layer.delta_weight().abs().max() == 0 for layer in network.lora.layers)
    assert orthonormal() == (kind in ("pretrained_svd", "random_orthonormal"))
    if kind == "pretrained_svd":
        layer = network.lora.layers[0]
        _, s, vh = torch.linalg.svd(layer.base.weight[:16])
        torch.testing.assert_close((layer.down[0] @ vh[:RANK].T).abs(), eye, **EXACT)
        torch.testing.assert_close(
            (layer.up[0].T @ layer.base.weight[:16] @ vh[:RANK].T).abs(), torch.diag(s[:RANK]), **EXACT
        )
    trains = []
    for t in range(2):
        _learn(network, [2 * t, 2 * t + 1])
        trains.append((network.lora.trains_bases, network.lora.trains_core))
        _close(network)
    first = kind in ("first_experience", "slow", "sequential")
    assert trains == [(first, not first), (kind in ("slow", "sequential"), kind != "sequential")]
    if kind != "sequential":
        assert orthonormal()
    moved = any(not torch.equal(layer.up, up) for layer, (up, _) in zip(network.lora.layers, start, strict=True))
    assert moved == first


def test_first_experience_bases_start_with_a_diagonal_core(make_network: Any) -> None:
    network = make_network("first_experience")
    _learn(network, [0, 1])
    _close(network)
    for layer in network.lora.layers:
        for core in layer.core:
            assert torch.equal(core, torch.diag(core.diagonal()))
            assert (core.diagonal() >= 0).all()


def test_an_update_begins_at_zero_with_a_gradient_that_is_not(make_network: Any, images: Tensor) -> None:
    network, x = make_network("first_experience"), images.double()
    _learn(network, [0, 1])
    _close(network)
    before = network.features(x).detach()
    network.begin([2, 3])
    after = network.features(x)
    assert torch.equal(after, before)
    after.square().sum().backward()
    for layer in network.lora.layers:
        torch.testing.assert_close(layer.left @ layer.left.mT, torch.eye(RANK).double().expand_as(layer.left), **EXACT)
        assert layer.right.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["first_experience", "pretrained_svd", "random_orthonormal"])
def test_the_free_teacher_is_the_model_before_the_experience(make_network: Any, kind: str, images: Tensor) -> None:
    network, x = make_network(kind), images.double()
    _learn(network, [0, 1])
    _close(network)
    before = network.features(x).detach()
    _learn(network, [2, 3])
    assert not torch.allclose(network.features(x), before, atol=1e-3)
    assert torch.equal(network.features_before(x), before)
    assert not network.features_before(x).requires_grad
    assert all(layer.use_update for layer in network.lora.layers)


@pytest.mark.parametrize("kind", ["slow", "sequential", "first_experience"])
def test_there_is_no_free_teacher_while_bases_train(make_network: Any, kind: str, images: Tensor) -> None:
    network = make_network(kind)
    network.begin([0, 1])
    with pytest.raises(ValueError, match="trains only the core"):
        network.features_before(images.double())


def test_logits_do_not_depend_on_batch_mates(make_network: Any, images: Tensor) -> None:
    network, x = make_network("first_experience"), images.double()
    _learn(network, [0, 1])
    for mode in (True, False):
        network.train(mode)
        alone = torch.cat([_logits(network, image[None]) for image in x])
        torch.testing.assert_close(alone, _logits(network, x), rtol=0, atol=1e-12)
        torch.testing.assert_close(_logits(network, x.flip(0)).flip(0), _logits(network, x), rtol=0, atol=1e-12)


def test_past_rows_stay_to_the_bit_while_the_model_trains(make_network: Any) -> None:
    network = make_network("first_experience", cosine=False)
    _learn(network, [0, 1])
    _close(network)
    rows, bias = network.head.rows.clone(), network.head.bias.clone()
    for t in (1, 2):
        _learn(network, [2 * t, 2 * t + 1])
        _close(network)
    assert torch.equal(network.head.rows[:2], rows)
    assert torch.equal(network.head.bias[:2], bias)


def test_dropout_of_the_backbone_is_off_in_training(make_vit: Callable[..., Any], images: Tensor) -> None:
    vit = make_vit(drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5, pos_drop_rate=0.5, patch_drop_rate=0.5)
    network = ContinualNetwork(vit, IncrementalHead(16)).train()
    assert torch.equal(network.features(images), network.features(images))
    assert not vit.training


def test_prompt_remembers_its_past_and_steps_slowly() -> None:
    prompt = MetaPrompt(3, 4)
    start = prompt.prompt.detach().clone()
    prompt.begin()
    with torch.no_grad():
        prompt.prompt += 2.0
    assert prompt.drift().item() == pytest.approx(12 * 4.0, rel=1e-5)
    prompt.slow_step(0.25)
    torch.testing.assert_close(prompt.prompt.detach(), start + 0.5)
    assert torch.equal(prompt.anchor, start)
    prompt.begin()  # the experience is open still
    assert torch.equal(prompt.anchor, start)
    assert int(prompt.experience) == 1
    prompt.end()
    prompt.begin()
    assert torch.equal(prompt.anchor, prompt.prompt)
    assert int(prompt.experience) == 2
    with pytest.raises(ValueError, match="`length` of at least 1 but got 0"):
        MetaPrompt(0, 4)
