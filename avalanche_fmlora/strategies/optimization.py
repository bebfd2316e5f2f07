"""How strategies step: one optimizer that follows what trains, rates of one experience, half precision, clipping."""

from __future__ import annotations

import logging
from typing import Any

import torch
from avalanche.training.plugins import LRSchedulerPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import nn

from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.strategies.optimizers import own_rates, refresh_optimizer

_LOG = logging.getLogger(__name__)


class Optimization(SupervisedTemplate):
    """The part of :class:`strategies.base.ContinualStrategy` that has to do with its optimizer."""

    model: ContinualNetwork
    config: Any
    _passes_optimizer: bool
    _scaler: torch.amp.GradScaler
    _unscaled: list[tuple[dict[str, Any], float, float]]
    _step_factors: list[tuple[dict[str, Any], float]]
    _given_tensors: list[nn.Parameter]

    def rates(self) -> dict[str, float]:
        """Learning rate of each parameter group, by name."""
        raise NotImplementedError

    def scale_rate(self, group: str, factor: float) -> None:
        """Multiply a group's learning rate, for the current experience only.

        Where the user schedules the rates, a scheduler may set them anew at any time, so each step multiplies them. An
        optimizer without a group of that name keeps its rates, and a warning says so.
        """
        named = [g for g in self.optimizer.param_groups if g.get("name") == group]
        if not named:
            _LOG.warning(
                "The optimizer has no group named %r, whose rate was to be multiplied by %g: it trains at "
                "its full rate. Pass a function of groups as `optimizer`, or groups that have a `name`.",
                group,
                factor,
            )
        for g in named:
            if self.has_scheduler():
                self._step_factors.append((g, factor))
                continue
            rate, g["lr"] = g["lr"], g["lr"] * factor
            self._unscaled.append((g, rate, g["lr"]))

    def has_scheduler(self) -> bool:
        """Whether the user schedules the rates: by a plugin, or by an optimizer of their own."""
        return self._passes_optimizer or any(isinstance(p, LRSchedulerPlugin) for p in self.plugins)

    def make_optimizer(self, **kwargs: Any) -> None:
        """Same optimizer, same groups, fresh state, only trainable tensors."""
        for group, rate in own_rates(self._unscaled):
            group["lr"] = rate
        self._unscaled.clear()
        self._step_factors.clear()
        groups = self.model.parameter_groups()
        self._check_names(groups)
        self._given_tensors = refresh_optimizer(self.optimizer, self.model, groups, self._given_tensors)
        self.optimized_param_id = {f"{n}.{i}": p for n, ps in groups.items() for i, p in enumerate(ps)}

    def _check_names(self, groups: dict[str, list[nn.Parameter]]) -> None:
        """Each part that trains needs a rate of its name, or it would train at another's; each rate a part."""
        rates, trained = set(self.rates()), {name for name, ps in groups.items() if ps}
        if trained <= rates <= groups.keys():
            return
        unrated, empty = sorted(trained - rates), sorted(rates - groups.keys())
        raise ValueError(
            f"Expected the same names in {type(self).__name__}.rates() and {type(self.model).__name__}."
            f"parameter_groups() but {unrated or 'none'} have parameters without a rate, and {empty or 'none'} a rate "
            "without parameters: let both give the same names."
        )

    def backward(self) -> None:
        """In fp16 of a scaled loss, the gradients true again for whoever looks; nothing to do where nothing trains."""
        if self.loss.requires_grad:
            self._scaler.scale(self.loss).backward(retain_graph=self.retain_graph)
            self._scaler.unscale_(self.optimizer)

    def optimizer_step(self) -> None:
        """Clip if asked, then step."""
        if not self.loss.requires_grad:
            return
        if self.config.clip_grad_norm is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.config.clip_grad_norm)
        scheduled = [(group, group["lr"]) for group, _ in self._step_factors]
        for group, factor in self._step_factors:
            group["lr"] = group["lr"] * factor
        try:
            self._scaler.step(self.optimizer)
        finally:
            for group, rate in scheduled:
                group["lr"] = rate
        self._scaler.update()

    def _after_training_exp(self, **kwargs: Any) -> None:
        """Refuse to go on with parameters that are not finite, before anything of them is absorbed."""
        groups = {name: ps for name, ps in self.model.parameter_groups().items() if ps}
        broken = [name for name, ps in groups.items() if not torch.stack([p.isfinite().all() for p in ps]).all()]
        if broken:
            raise ValueError(
                f"Expected finite parameters after training but those of {', '.join(broken)} are not: training "
                "diverged. Build the strategy anew, or load what was saved before, with lower learning rates for them "
                "or with `clip_grad_norm`; if that does not help, look for NaN or infinity in the images."
            )
        super()._after_training_exp(**kwargs)
