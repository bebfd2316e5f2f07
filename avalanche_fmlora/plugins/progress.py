"""A progress bar for each experience, silent where there is no terminal."""

from __future__ import annotations

from typing import Any

from avalanche.core import SupervisedPlugin
from tqdm import tqdm


class ProgressPlugin(SupervisedPlugin):
    """Shows iterations done of an experience on standard error, if that is a terminal."""

    checkpointed = False
    """Nothing of it is kept in checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Start a bar of the experience's length."""
        total = strategy.train_epochs * len(strategy.dataloader)
        name = f"experience {strategy.experience.current_experience}"
        self._bar = tqdm(total=total, desc=name, leave=False, disable=None)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """One step further; reads nothing from the device."""
        self._bar.update(1)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self._bar.close()
