"""What a strategy needs to go on after a finished experience as if it had never stopped; the backbone is not in it.

Between experiences that is: all that was added to the backbone, random generators, the rates and whatever else the
optimizer's groups say (every experience starts it without moments), the fp16 scale, what plugins and metrics remember.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from avalanche.training.plugins import EvaluationPlugin, LRSchedulerPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.templates.base_sgd import PeriodicEval
from torch import nn

from avalanche_fmlora.backbones import state_sha256
from avalanche_fmlora.checkpoint import random_state, set_random_state
from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.strategies.object_state import is_ours, load_object_state, object_state, plain
from avalanche_fmlora.strategies.optimizers import load_optimizer_state, optimizer_state, own_rates

if TYPE_CHECKING:
    from avalanche_fmlora.strategies.base import ContinualStrategy

_SCHEDULER = "state of the scheduler"

logger = logging.getLogger(__name__)


def training_state(strategy: ContinualStrategy) -> dict[str, Any]:
    """The state of a strategy between two experiences, as :func:`checkpoint.write_checkpoint` takes it.

    A plugin that is not of this package keeps its numbers and strings; what else it holds is named in the log.
    """
    return {
        "model": _model_state(strategy.model),
        "optimizer": optimizer_state(
            strategy.optimizer, strategy.model, strategy._given_tensors, own_rates(strategy._unscaled)
        ),
        "scaler": strategy._scaler.state_dict(),
        "resources": strategy.resources,
        "clock": object_state(strategy.clock)[0],
        "plugins": [(type(p).__name__, _plugin_state(strategy, p)) for p in _keeping(strategy)],
        "metrics": _metric_state(strategy.evaluator),
        "random": random_state(),
    }


def load_training_state(strategy: ContinualStrategy, state: Mapping[str, Any]) -> None:
    """Put a strategy that was built in the same way where :func:`training_state` was called.

    Raises:
        ValueError: if it was built in another way, as far as that shows.
    """
    plugins, saved = _keeping(strategy), [name for name, _ in state["plugins"]]
    if [type(p).__name__ for p in plugins] != saved:
        raise ValueError(
            f"Expected a strategy with the plugins {saved} but this one has {[type(p).__name__ for p in plugins]}: "
            "build it as the one that was saved."
        )
    for plugin, (_, kept) in zip(plugins, state["plugins"], strict=True):
        _check_arguments(plugin, kept)
    for plugin, (_, kept) in zip(plugins, state["plugins"], strict=True):
        load_object_state(plugin, {name: value for name, value in kept.items() if name != _SCHEDULER})
        if isinstance(plugin, LRSchedulerPlugin):
            plugin.scheduler.load_state_dict(kept[_SCHEDULER])
    _load_model_state(strategy, state["model"])
    load_optimizer_state(strategy.optimizer, strategy.model, state["optimizer"], strategy._given_tensors)
    strategy._unscaled.clear()
    strategy._step_factors.clear()
    strategy._scaler.load_state_dict(state["scaler"])
    strategy.resources = list(state["resources"])
    load_object_state(strategy.clock, state["clock"])
    _load_metric_state(strategy.evaluator, state["metrics"])
    set_random_state(state["random"])


def training_identity(strategy: ContinualStrategy) -> dict[str, Any]:
    """What a checkpoint of a strategy is only good for: method, options, how it trains, and the backbone's weights."""
    config = strategy.config.model_dump(mode="json")
    training = {
        "epochs": strategy.train_epochs,
        "batch_size": strategy.train_mb_size,
        "optimizer": type(strategy.optimizer).__name__,
        "rates": [group["lr"] for group in strategy.optimizer.param_groups],
        "optimizer_options": [_options_of(group) for group in strategy.optimizer.param_groups],
        "criterion": type(strategy._criterion).__name__,
        "criterion_options": _criterion_options(strategy._criterion),
    }
    return {
        "method": strategy.method,
        "options": config,
        "training": training,
        "backbone": state_sha256(strategy.model.backbone_weights()),
    }


def _options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Momentum, weight decay and the like."""
    options: dict[str, Any] = plain({name: value for name, value in group.items() if name not in ("params", "lr")})
    return options


def _criterion_options(criterion: Any) -> dict[str, Any]:
    """Numbers and text of a criterion, and its tensors as lists."""
    if not isinstance(criterion, nn.Module):
        return {}
    own = {k: v for k, v in vars(criterion).items() if k[0] != "_" and k != "training"}
    numbers = {k: v for k, v in own.items() if v is None or isinstance(v, str | bool | int | float)}
    return numbers | {name: tensor.tolist() for name, tensor in criterion.state_dict().items()}


def _check_arguments(plugin: Any, kept: Mapping[str, Any]) -> None:
    """Arguments of a plugin's constructor, where it keeps them under their names, are those that it was saved with.

    Raises:
        ValueError: where a plugin of this package has others. Another one may mean its argument to change: a warning.
    """
    arguments = [name for name in inspect.signature(type(plugin)).parameters if name in kept and name in vars(plugin)]
    now = object_state(plugin, arguments, tensors=False)[0]
    others = [name for name in now if now[name] != kept[name] and not isinstance(kept[name], torch.Tensor)]
    if not others:
        return
    values = ", ".join(f"{name}={now[name]!r} where the saved one had {kept[name]!r}" for name in others)
    if is_ours(plugin):
        raise ValueError(f"{type(plugin).__name__} has {values}: build it as the one that was saved.")
    logger.warning("%s has %s, and goes on with the saved.", type(plugin).__name__, values)


def _model_state(model: ContinualNetwork) -> dict[str, Any]:
    selector = {} if model.selector is None else model.selector.state_dict()
    return {
        "tensors": model.adapter_state(),
        "selector": selector,
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "numbers": model.adapter_numbers(),
        "objects": {name: kept for name, m in model.named_modules() if (kept := _hidden_state(m))},
    }


def _hidden_state(module: nn.Module) -> dict[str, Any]:
    """What no state dict shows: a module's random generators, and objects of this package that are no modules."""
    hidden = [name for name, v in vars(module).items() if isinstance(v, torch.Generator) or is_ours(v)]
    return object_state(module, hidden)[0]


def _load_model_state(strategy: ContinualStrategy, state: Mapping[str, Any]) -> None:
    model = strategy.model
    if state["selector"]:
        for plugin in strategy.plugins:
            if hasattr(plugin, "attach"):
                plugin.attach(strategy)
        if model.selector is None:
            raise ValueError("Expected a strategy with a RankSelectionPlugin: build it as the one that was saved.")
        model.selector.load_state_dict(state["selector"])
    model.load_adapter_state(state["tensors"])
    model.load_adapter_numbers(state.get("numbers", {}))
    model.to(strategy.device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state["trainable"])
    for name, kept in state["objects"].items():
        load_object_state(model.get_submodule(name), kept)


def _keeping(strategy: ContinualStrategy) -> list[Any]:
    """The plugins that remember something, in order; those of the frame are kept apart."""
    frame = (EvaluationPlugin, PeriodicEval, Clock)
    return [p for p in strategy.plugins if not isinstance(p, frame) and vars(p) and getattr(p, "checkpointed", True)]


def _plugin_state(strategy: ContinualStrategy, plugin: Any) -> dict[str, Any]:
    kept, left_out = object_state(plugin, tensors=is_ours(plugin))
    if isinstance(plugin, LRSchedulerPlugin):
        left_out.remove("scheduler")
        kept[_SCHEDULER] = plain(plugin.scheduler.state_dict())
    told = strategy.__dict__.setdefault("_told_of", [])
    left_out = [name for name in left_out if not _remembers_nothing(vars(plugin)[name])]
    if left_out and not is_ours(plugin) and plugin not in told:
        told.append(plugin)
        logger.warning(
            "A checkpoint can't hold what %s keeps in %s: going on from it may differ from a run without a break.",
            type(plugin).__name__, ", ".join(f"`{name}`" for name in left_out),
        )  # fmt: skip
    return kept


def _remembers_nothing(value: Any) -> bool:
    """Whether it is a class, or a function that holds no variables."""
    return inspect.isclass(value) or inspect.isbuiltin(value) or (inspect.isfunction(value) and not value.__closure__)


def _metric_state(evaluator: EvaluationPlugin) -> dict[str, Any]:
    kept, _ = object_state(evaluator, ("metrics", "last_metric_results", "all_metric_results"))
    return {"names": [type(m).__name__ for m in evaluator.metrics], **kept}


def _load_metric_state(evaluator: EvaluationPlugin, state: Mapping[str, Any]) -> None:
    names = [type(m).__name__ for m in evaluator.metrics]
    if names != state["names"]:
        raise ValueError(
            f"Expected a strategy with the metrics {state['names']} but this one has {names}: "
            "build it as the one that was saved."
        )
    load_object_state(evaluator, {name: value for name, value in state.items() if name != "names"})
