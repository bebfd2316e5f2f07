"""An optimizer whose object and groups stay while the tensors that it trains come and go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from avalanche_fmlora.strategies.config import MethodConfig

_LOG = logging.getLogger(__name__)

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
OptimizerLike = Optimizer | OptimizerFactory | str | None


def make_optimizer(
    choice: OptimizerLike, config: MethodConfig, rates: Mapping[str, float], given: Iterable[str] = ()
) -> Optimizer:
    """The optimizer of a strategy, one group a name of `rates`, without any tensors yet.

    Args:
        choice: an optimizer (returned as it is), a factory that takes parameter groups, a name, or None (the name in
            `config`).
        config: gives name, weight decay and momentum.
        rates: group name -> learning rate.
        given: names of the options that the user gave.

    Raises:
        ValueError: for a name that is none of adam, adamw, sgd.
    """
    if isinstance(choice, Optimizer):
        _warn_of_its_own_rates(choice, rates, sorted(name for name in given if name.startswith("lr_")))
        return choice
    groups = [{"params": [], "name": name, "lr": rate, "initial_lr": rate} for name, rate in rates.items()]
    if callable(choice):
        return choice(groups)
    name = config.optimizer if choice is None else choice
    if name == "adam":
        return torch.optim.Adam(groups, weight_decay=config.weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    raise ValueError(
        "Expected `optimizer` to be 'adam', 'adamw', 'sgd', a torch optimizer, or a function that takes parameter "
        f"groups, but got {choice!r}."
    )


def _warn_of_its_own_rates(optimizer: Optimizer, rates: Mapping[str, float], given: list[str]) -> None:
    """An optimizer of the user's own trains by the rates of its groups; say what that makes of names and options."""
    groups = optimizer.param_groups
    nameless = sorted(rates.keys() - {group.get("name") for group in groups})
    if len(groups) > 1 and nameless:
        _LOG.warning(
            "The optimizer has %d groups, and none named %s: what trains under these names goes to the first, at its "
            "rate %g. Give its groups a `name` each, of %s.",
            len(groups), ", ".join(nameless), groups[0]["lr"], ", ".join(rates),
        )  # fmt: skip
    if given:
        _LOG.warning(
            "%s has no effect beside an optimizer of your own, whose groups have their own rates: leave it out, or "
            "pass a function of groups, or a name, as `optimizer`.",
            ", ".join(given),
        )


def refresh_optimizer(
    optimizer: Optimizer, model: nn.Module, groups: Mapping[str, Iterable[nn.Parameter]], given: Iterable[Any] = ()
) -> list[nn.Parameter]:
    """Make the optimizer train exactly what trains now, with no momentum left, and keep object and groups.

    Each tensor goes to the group of its name, or to the first group if none has that name. Tensors that belong to
    neither `model` nor `groups` (a user's own, of a loss say) stay where they are.

    Args:
        optimizer: changed in place.
        model: its parameters leave the groups unless they are in `groups`.
        groups: name -> what trains now.
        given: what the last call returned.

    Returns:
        All tensors of `groups`.
    """
    for group, kept in zip(optimizer.param_groups, _users_own(optimizer, model, given), strict=True):
        group["params"] = kept
    by_name = {group.get("name"): group for group in optimizer.param_groups}
    trained = {name: list(params) for name, params in groups.items()}
    for name, params in trained.items():
        by_name.get(name, optimizer.param_groups[0])["params"].extend(params)
    optimizer.state.clear()
    return [p for params in trained.values() for p in params]


def own_rates(scaled: Sequence[tuple[dict[str, Any], float, float]]) -> list[tuple[dict[str, Any], float]]:
    """Groups whose rate was multiplied for the time being, with the one that each gets back.

    Args:
        scaled: in order, the group, its rate before and that after. A group whose rate was set anew since keeps it.
    """
    found: dict[int, tuple[dict[str, Any], float]] = {}
    for group, before, after in reversed(scaled):
        if found.get(id(group), (group, group["lr"]))[1] == after:
            found[id(group)] = (group, before)
    return list(found.values())


def optimizer_state(
    optimizer: Optimizer,
    model: nn.Module,
    given: Iterable[Any] = (),
    unscaled: Iterable[tuple[dict[str, Any], float]] = (),
) -> dict[str, Any]:
    """What an optimizer is between two experiences: options of its groups, and tensors that are not the model's.

    There are no moments in it: :func:`refresh_optimizer` forgets them before the next experience.

    Args:
        optimizer: as it is after an experience.
        model: the strategy's.
        given: what :func:`refresh_optimizer` returned.
        unscaled: groups whose rate is another for the time being, with the one that they get back (:func:`own_rates`).
    """
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    place = {id(group): i for i, group in enumerate(optimizer.param_groups)}
    for group, rate in unscaled:
        groups[place[id(group)]]["lr"] = rate
    return {"groups": groups, "tensors": [[p.detach() for p in own] for own in _users_own(optimizer, model, given)]}


@torch.no_grad()
def load_optimizer_state(
    optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any], given: Iterable[Any] = ()
) -> None:
    """Give an optimizer that was built in the same way what :func:`optimizer_state` gave.

    Raises:
        ValueError: if its groups, or the tensors in them that are not the model's, are others.
    """
    own = _users_own(optimizer, model, given)
    found = [
        (group.get("name"), [p.shape for p in params])
        for group, params in zip(optimizer.param_groups, own, strict=True)
    ]
    pairs = zip(state["groups"], state["tensors"], strict=True)
    wanted = [(group.get("name"), [t.shape for t in tensors]) for group, tensors in pairs]
    if found != wanted:
        raise ValueError(
            f"Expected an optimizer with the groups and tensors {wanted} but got {found}: build it as the one saved."
        )
    for group, params, values, tensors in zip(
        optimizer.param_groups, own, state["groups"], state["tensors"], strict=True
    ):
        group.update(values)
        for parameter, tensor in zip(params, tensors, strict=True):
            parameter.copy_(tensor)


def _users_own(optimizer: Optimizer, model: nn.Module, given: Iterable[Any]) -> list[list[Any]]:
    """Of each group, the tensors that are neither the model's nor among those given to the optimizer by us."""
    ours = {id(p) for p in (*model.parameters(), *given)}
    return [[p for p in group["params"] if id(p) not in ours] for group in optimizer.param_groups]
