"""The optimizer: same object, same groups, exactly the tensors that train, a fresh state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import LRSchedulerPlugin
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from avalanche_fmlora.strategies.config import MethodConfig
from avalanche_fmlora.strategies.optimizers import make_optimizer, refresh_optimizer


class Watch(SupervisedPlugin):
    """Notes rates, groups and state at every iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[list[dict[str, float]]] = []
        self.trained: list[dict[str, set[int]]] = []
        self.fresh: list[bool] = []

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.rates.append([])
        self.fresh.append(not strategy.optimizer.state)
        groups = strategy.optimizer.param_groups
        self.trained.append({g.get("name", ""): {id(p) for p in g["params"]} for g in groups})

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        self.rates[-1].append({g.get("name", str(i)): g["lr"] for i, g in enumerate(strategy.optimizer.param_groups)})


ADAM, ADAMW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD


@pytest.mark.parametrize(("choice", "cls"), [("adam", ADAM), ("adamw", ADAMW), ("sgd", SGD), (None, SGD)])
def test_names(choice: str | None, cls: type) -> None:
    config = MethodConfig(optimizer="sgd", weight_decay=0.3, momentum=0.7)
    optimizer = make_optimizer(choice, config, {"core": 0.1, "head": 0.2})
    assert type(optimizer) is cls
    groups = [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [("core", 0.1, 0.3), ("head", 0.2, 0.3)]
    if cls is torch.optim.SGD:
        assert optimizer.param_groups[0]["momentum"] == 0.7


def test_unknown_name_is_named_and_leaves_the_model_as_it_was(make_vit: Callable[..., Any], make_strategy: Any) -> None:
    vit = make_vit()
    with pytest.raises(ValueError, match=r"`optimizer` to be 'adam', 'adamw', 'sgd'.* but got 'adm'"):
        make_strategy("fm_lora", vit, optimizer="adm")
    assert make_strategy("fm_lora", vit, optimizer="adam").config.rank == 4


def test_factory_gets_named_groups_and_its_object_stays(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    made = []

    def factory(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made.append(torch.optim.RMSprop(groups, alpha=0.5))
        return made[-1]

    strategy = make_strategy("fm_lora", optimizer=factory, lr_head=0.123)
    train(strategy, class_benchmark)
    assert len(made) == 1
    assert strategy.optimizer is made[0]
    assert {g["name"]: g["lr"] for g in made[0].param_groups}["head"] == 0.123
    assert {g["alpha"] for g in made[0].param_groups} == {0.5}


def test_a_users_optimizer_keeps_object_groups_and_rates(
    make_vit: Callable[..., Any], make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    """Frozen tensors are dropped, grown ones added, the user's own tensor stays where it was."""
    vit, own = make_vit(num_classes=5), nn.Parameter(torch.ones(3))
    backbone = {id(p) for p in vit.parameters()}
    optimizer = torch.optim.SGD(
        [
            {"params": [*vit.parameters()], "lr": 0.05, "momentum": 0.5, "note": "all else"},
            {"params": [own], "lr": 0.01, "name": "head", "weight_decay": 0.25},
        ]
    )
    watch = Watch()
    strategy = make_strategy("fm_lora", vit, optimizer=optimizer, plugins=[watch])
    heads = []

    def look(strategy: Any) -> None:
        heads.append(strategy.model.head.rows.clone())
        assert strategy.optimizer is optimizer
        first, second = optimizer.param_groups
        assert (first["lr"], first["momentum"], first["note"]) == (0.05, 0.5, "all else")
        assert (second["lr"], second["weight_decay"], second["name"]) == (0.01, 0.25, "head")

    train(strategy, class_benchmark, after=look)
    network = strategy.model
    for t, groups in enumerate(watch.trained):
        assert id(own) in groups["head"]
        assert len(groups["head"]) == 2, "the user's own tensor and the rows of this experience"
        assert not backbone & (groups[""] | groups["head"])
        assert id(network.prompt.prompt) in groups[""]
        n_maps = len(network.lora.layers)
        assert len(groups[""]) == 2 * n_maps + 2, "bases, or M and N, of every map; prompt; rank logits"
        assert watch.fresh[t]
    assert all(rates == watch.rates[0][0] for step in watch.rates for rates in step)


def test_adam_over_a_frozen_backbone_with_one_group(
    make_vit: Callable[..., Any], make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    """The usual line of a tutorial: an optimizer of model.parameters() before the strategy exists."""
    vit = make_vit()
    optimizer = torch.optim.Adam(vit.parameters(), lr=1e-2)
    strategy = make_strategy("seq_lora", vit, optimizer=optimizer)
    before = strategy.model.lora.layers[0].down.clone()
    train(strategy, class_benchmark)
    assert not torch.equal(strategy.model.lora.layers[0].down, before)
    assert len(optimizer.param_groups) == 1


def test_refresh_drops_what_no_longer_trains() -> None:
    model, other = nn.Linear(2, 2), nn.Parameter(torch.zeros(1))
    groups = [{"params": list(model.parameters()), "name": "a"}, {"params": [other], "name": "b"}]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    (model(torch.ones(1, 2)).sum() + other.sum()).backward()
    optimizer.step()
    grown = nn.Parameter(torch.zeros(2))
    given = refresh_optimizer(optimizer, model, {"b": [grown], "c": [model.bias]})
    assert [id(p) for p in given] == [id(grown), id(model.bias)]
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [[id(model.bias)], [id(other), id(grown)]]
    assert not optimizer.state
    refresh_optimizer(optimizer, model, {"a": [model.weight]}, given)
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [[id(model.weight)], [id(other)]]


def test_each_experience_starts_with_its_own_tensors_and_no_momentum(
    make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    watch = Watch()
    options = {"bases": "first_experience", "train_epochs": 2}
    strategy = train(make_strategy("fm_lora", plugins=[watch], **options), class_benchmark)
    assert watch.fresh == [True] * 3
    n_maps = len(strategy.model.lora.layers)
    sizes = [{name: len(ids) for name, ids in groups.items()} for groups in watch.trained]
    assert sizes[0] == {"bases": 2 * n_maps, "core": 0, "rank": 1, "prompt": 1, "head": 1}
    assert sizes[1] == sizes[2] == {"bases": 0, "core": 2 * n_maps, "rank": 1, "prompt": 1, "head": 1}


def test_cosine_schedule_falls_from_each_groups_rate_to_zero(
    make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    watch = Watch()
    options = {"lr_head": 0.2, "lr_prompt": 0.1, "lr_bases": 0.3, "lr_core": 0.4, "meta_prompt": {"rate_share": 0.1}}
    strategy = train(make_strategy("fm_lora", plugins=[watch], train_epochs=3, **options), class_benchmark)
    n = 3 * 2
    shape = [0.5 * (1 + torch.tensor(torch.pi * i / n).cos().item()) for i in range(n)]
    for t, rates in enumerate(watch.rates):
        assert len(rates) == n
        for name, full in (("head", 0.2), ("bases", 0.3), ("core", 0.4), ("prompt", 0.1 if t == 0 else 0.01)):
            assert [r[name] for r in rates] == pytest.approx([full * s for s in shape], rel=1e-5), (t, name)
    assert {g["name"]: g["lr"] for g in strategy.optimizer.param_groups}["head"] == 0.2


def test_cosine_schedule_counts_the_batches_that_are_drawn(
    make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    """A replay plugin replaces the data loader after our plugins have seen it: the rate still ends at zero, once."""

    class Longer(SupervisedPlugin):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            dataset = strategy.adapted_dataset
            strategy.dataloader = torch.utils.data.DataLoader(dataset, batch_size=2)

    watch = Watch()
    train(make_strategy("seq_lora", plugins=[Longer(), watch], train_epochs=2), class_benchmark, n=1)
    rates = [r["head"] for r in watch.rates[0]]
    assert len(rates) == 16
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.02 * rates[0]


def test_slow_bases_keep_a_share_of_their_rate(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    watch = Watch()
    options = {"bases": "slow", "lr_bases": 0.1, "slow_share": 0.05, "lr_schedule": "constant"}
    train(make_strategy("fm_lora", plugins=[watch], **options), class_benchmark)
    assert [rates[0]["bases"] for rates in watch.rates] == pytest.approx([0.1, 0.005, 0.005])


@pytest.mark.parametrize("users", [False, True])
def test_step_lr_halves_the_rate_and_is_reset(
    make_vit: Callable[..., Any], make_strategy: Any, train: Any, class_benchmark: Any, users: bool
) -> None:
    watch, vit, options = Watch(), make_vit(), {"lr_head": 0.08}
    if users:
        options = {"optimizer": torch.optim.SGD(vit.parameters(), lr=0.08)}
    strategy = make_strategy("seq_lora", vit, plugins=[watch], train_epochs=3, **options)
    strategy.plugins.append(LRSchedulerPlugin(StepLR(strategy.optimizer, step_size=1, gamma=0.5)))
    train(strategy, class_benchmark)
    name = "0" if users else "head"
    for rates in watch.rates:
        assert [r[name] for r in rates] == pytest.approx([0.08, 0.08, 0.04, 0.04, 0.02, 0.02])
    assert strategy.optimizer.param_groups[-1]["lr"] == 0.08


def test_a_scheduler_over_the_whole_stream_goes_on(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    watch = Watch()
    strategy = make_strategy("seq_lora", plugins=[watch], train_epochs=1, lr_head=0.08)
    scheduler = LambdaLR(strategy.optimizer, lambda epoch: 0.5**epoch)
    strategy.plugins.append(LRSchedulerPlugin(scheduler, reset_scheduler=False, reset_lr=False))
    train(strategy, class_benchmark)
    assert [rates[0]["head"] for rates in watch.rates] == pytest.approx([0.08, 0.04, 0.02])


@pytest.mark.parametrize("make", [lambda o: LambdaLR(o, lambda e: 1 / (1 + e)), lambda o: StepLR(o, 1, 0.5)])
def test_the_prompts_slow_rate_is_a_share_of_whatever_a_scheduler_sets(
    make: Callable[[Any], Any], make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    """Some schedulers multiply the rate that they find, others set it anew."""

    class Rates(SupervisedPlugin):
        def __init__(self) -> None:
            super().__init__()
            self.trained: list[float] = []
            self.shown: list[float] = []

        def before_update(self, strategy: Any, **kwargs: Any) -> None:
            (group,) = [g for g in strategy.optimizer.param_groups if g["name"] == "prompt"]
            self.shown.append(group["lr"])
            step = strategy.optimizer.step

            def spy(*args: Any, **keywords: Any) -> Any:
                self.trained.append(group["lr"])
                strategy.optimizer.step = step
                return step(*args, **keywords)

            strategy.optimizer.step = spy

    rates = Rates()
    strategy = make_strategy("fm_lora", plugins=[rates], train_epochs=3, lr_prompt=0.01, train_mb_size=16)
    scheduler = make(strategy.optimizer)
    strategy.plugins.append(LRSchedulerPlugin(scheduler))
    train(strategy, class_benchmark, n=2)
    due = [0.01, 0.01 / 2, 0.01 / 3 if isinstance(scheduler, LambdaLR) else 0.01 / 4]
    assert rates.shown == pytest.approx(due * 2)
    assert rates.trained == pytest.approx([*due, *(0.1 * rate for rate in due)])


def test_clipping_bounds_the_gradient_of_all_that_trains(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    norms: dict[float, float] = {}

    class Norm(SupervisedPlugin):
        def after_update(self, strategy: Any, **kwargs: Any) -> None:
            grads = [p.grad for g in strategy.optimizer.param_groups for p in g["params"] if p.grad is not None]
            norm = torch.stack([g.norm() for g in grads]).norm().item()
            bound = strategy.config.clip_grad_norm
            norms[bound] = max(norms.get(bound, 0.0), norm)

    for bound in (1e-3, 1e6):
        train(make_strategy("fm_lora", plugins=[Norm()], clip_grad_norm=bound), class_benchmark, n=2)
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1e6] > 1e-2


def test_what_an_optimizer_of_ones_own_makes_of_names_and_rates_is_said(
    make_vit: Callable[..., Any], make_strategy: Any, caplog: Any
) -> None:
    def warnings(groups: Any, **options: Any) -> str:
        caplog.clear()
        make_strategy("seq_lora", vit, optimizer=torch.optim.AdamW(groups, lr=1e-3), **options)
        return str(caplog.text)

    vit = make_vit()
    two = [{"params": vit.blocks.parameters(), "lr": 1e-5}, {"params": vit.norm.parameters(), "lr": 1e-2}]
    assert (
        "2 groups, and none named bases, head: what trains under these names goes to the first, at its rate 1e-05"
        in (warnings(two))
    )
    vit = make_vit()
    assert "lr_head has no effect beside an optimizer of your own" in warnings(vit.parameters(), lr_head=0.5)
    vit = make_vit()
    named = [{"params": [p], "name": name} for name, p in zip(("bases", "head"), vit.norm.parameters(), strict=True)]
    assert not warnings(named)
    vit = make_vit()
    assert not warnings(vit.parameters())
