"""An optimizer whose object and groups stay while the tensors that it trains come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from avalanche_fmlora.strategies.config import MethodConfig

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
OptimizerLike = Optimizer | OptimizerFactory | str | None


def make_optimizer(choice: OptimizerLike, config: MethodConfig, rates: Mapping[str, float]) -> Optimizer:
    """The optimizer of a strategy, one group a name of `rates`, without any tensors yet.

    Args:
        choice: an optimizer (returned as it is), a factory that takes parameter groups, a name, or None (the name in
            `config`).
        config: gives name, weight decay and momentum.
        rates: group name -> learning rate.

    Raises:
        ValueError: for a name that is none of adam, adamw, sgd.
    """
    if isinstance(choice, Optimizer):
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


def refresh_optimizer(optimizer: Optimizer, model: nn.Module, groups: Mapping[str, Iterable[nn.Parameter]]) -> None:
    """Make the optimizer train exactly what trains now, with no momentum left, and keep object and groups.

    Each tensor goes to the group of its name, or to the first group if none has that name. Tensors that belong to
    neither `model` nor `groups` (a user's own, of a loss say) stay where they are.

    Args:
        optimizer: changed in place.
        model: its parameters leave the groups unless they are in `groups`.
        groups: name -> what trains now.
    """
    ours = {id(p) for p in model.parameters()} | optimizer.__dict__.setdefault("_fmlora_given", set())
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ours]
    by_name = {group.get("name"): group for group in optimizer.param_groups}
    given = {name: list(params) for name, params in groups.items()}
    for name, params in given.items():
        by_name.get(name, optimizer.param_groups[0])["params"].extend(params)
    optimizer.__dict__["_fmlora_given"] = {id(p) for params in given.values() for p in params}
    optimizer.state.clear()
