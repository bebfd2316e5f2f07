"""Metrics to Weights & Biases: Avalanche 0.6.0's own `WandBLogger` calls parts of wandb that are no longer there."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from avalanche.evaluation.metric_results import AlternativeValues, MetricValue, TensorImage
from avalanche.logging import BaseLogger
from matplotlib.figure import Figure
from PIL.Image import Image

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

X_AXIS = "train_iterations"
_PICTURES = (Figure, Image, TensorImage)


class WeightsAndBiasesLogger(BaseLogger):
    """An Avalanche logger: ``EvaluationPlugin(..., loggers=[WeightsAndBiasesLogger(project="mine")])``.

    Numbers are logged over training iterations, pictures as images, matrices as tables; other values are left out. The
    options of a strategy of this package become the configuration of the run when training starts.

    Args:
        run: an open run, which stays open; without one, one is opened and :meth:`close` ends it.
        **init: arguments of ``wandb.init``: `project`, `name`, `config`, `dir`, `mode` ("offline" needs no network; so
            does the environment variable ``WANDB_MODE=offline``).

    Raises:
        ImportError: if wandb is not installed.
        ValueError: if both a run and arguments for one are given.
    """

    def __init__(self, run: wandb.Run | None = None, **init: Any) -> None:
        super().__init__()
        try:
            import wandb
        except ImportError as error:
            raise ImportError("Weights & Biases is not installed: pip install 'avalanche-fmlora[wandb]'") from error
        if run is not None and init:
            raise ValueError(f"Expected an open run, or arguments to open one, but got both: {sorted(init)}.")
        self._wandb = wandb
        self._own = run is None
        self.run = wandb.init(**init) if run is None else run
        self.run.define_metric(X_AXIS, hidden=True)
        self.run.define_metric("*", step_metric=X_AXIS)

    def log_metrics(self, metric_values: list[MetricValue]) -> None:
        """Log all values of a moment together, a row for each position on the x axis."""
        rows: dict[int, dict[str, Any]] = {}
        for metric in metric_values:
            values = metric.value.items() if isinstance(metric.value, dict) else [(None, metric.value)]
            for key, value in values:
                shown = self._shown(value)
                if shown is not None:
                    name = metric.name if key is None else f"{metric.name}/{key}"
                    rows.setdefault(metric.x_plot, {})[name] = shown
        for x, row in rows.items():
            self.run.log({X_AXIS: x, **row})

    def before_training(self, strategy: Any, metric_values: list[MetricValue]) -> None:
        """Add the strategy's options to the configuration of the run."""
        config: Any = getattr(strategy, "config", None)
        if config is not None and hasattr(config, "model_dump"):
            options = {"method": type(strategy).__name__, **config.model_dump(mode="json")}
            self.run.config.update(options, allow_val_change=True)

    def close(self) -> None:
        """End the run, if this logger opened it, and wait until all is written."""
        if self._own:
            self.run.finish()

    def _shown(self, value: Any) -> Any:
        """What `wandb` takes for a value, None if nothing."""
        if isinstance(value, AlternativeValues):
            value = value.best_supported_value(*_PICTURES, torch.Tensor, float, int)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool | int | float | np.number):
            return value
        if isinstance(value, _PICTURES):
            if isinstance(value, TensorImage):  # [3, H, W], where wandb takes the channels last
                value = value.image.detach().cpu().movedim(0, -1).numpy()
            return self._wandb.Image(value)
        if isinstance(value, torch.Tensor) and value.ndim == 2:
            columns: list[str | int] = [str(k) for k in range(value.shape[1])]
            return self._wandb.Table(columns=columns, data=value.tolist())
        if value is not None:
            logger.debug("No place in Weights & Biases for a %s", type(value).__name__)
        return None
