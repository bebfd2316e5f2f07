"""Checkpoints after each experience, in any Avalanche loop around a strategy of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avalanche.core import SupervisedPlugin

from avalanche_fmlora.checkpoint import CheckpointFolder


class CheckpointPlugin(SupervisedPlugin):
    """Saves after each experience what going on with the next one needs, without the backbone.

    A script that begins with :meth:`resume` and calls `train` once an experience can be stopped or killed at any time
    and started again: it ends with the same model, on a CPU to the bit, as one that was never stopped.

    >>> import tempfile, timm
    >>> from avalanche_fmlora import SeqLoRAStrategy
    >>> checkpoints = CheckpointPlugin(tempfile.mkdtemp())
    >>> vit = timm.create_model("test_vit", num_classes=0)
    >>> strategy = SeqLoRAStrategy(model=vit, plugins=[checkpoints], evaluator=None)
    >>> checkpoints.resume(strategy)  # and then: for experience in benchmark.train_stream[start:]
    0

    It is written when training on an experience ends, and again when an evaluation after it ends, so that it knows what
    the metrics know. Killed in between, a run goes on with the next experience, and the metrics lack that evaluation:
    call `eval` when `resume` has returned, if it may have been broken off.

    Args:
        folder: of this run's checkpoints and nothing else; made with the first one.
        keep: how many are kept; the one before the last is used if the last is damaged.
    """

    checkpointed = False
    runs_last = True
    """It stands behind all other plugins, the evaluator too, so that it sees what they have made of the experience."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        super().__init__()
        self.checkpoints = CheckpointFolder(folder, keep)
        self._identity: dict[str, Any] | None = None

    def resume(self, strategy: Any) -> int:
        """Put a fresh strategy where the last good checkpoint was written, random generators too.

        Args:
            strategy: built as the one that was saved, with the same plugins and metrics, and not trained yet.

        Returns:
            How many experiences are finished: the index of the one to go on with, 0 if there is no checkpoint.

        Raises:
            ValueError: if there are checkpoints but none of them is whole and of such a strategy.
        """
        self._identity = _check(strategy).training_identity()
        try:
            found = self.checkpoints.latest(self._identity)
        except ValueError as error:
            raise ValueError(
                f"{error}\nThere is no other checkpoint: build the strategy as the one that was saved, or delete "
                f"{self.checkpoints.folder} to start anew."
            ) from None
        if found is None:
            return 0
        finished, state = found
        strategy.load_training_state(state)
        return finished

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse to write over the checkpoints of another run.

        Raises:
            ValueError: if there are checkpoints and :meth:`resume` was not called, or for a foreign strategy.
        """
        if self._identity is not None:
            return
        self._identity = _check(strategy).training_identity()
        if self.checkpoints.files():
            raise ValueError(
                f"Expected an empty folder but {self.checkpoints.folder} holds checkpoints: call "
                "`start = plugin.resume(strategy)` before training to go on from them, or choose another folder."
            )

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Save."""
        self._save(strategy)

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Save again, with what the metrics know now, unless this was within training."""
        within_training = strategy._eval_streams is not None
        if strategy.clock.train_exp_counter and not within_training:
            self._save(strategy)

    def _save(self, strategy: Any) -> None:
        if self._identity is not None:
            self.checkpoints.save(strategy.clock.train_exp_counter, strategy.training_state(), self._identity)


def _check(strategy: Any) -> Any:
    if not hasattr(strategy, "training_state"):
        raise ValueError(
            f"CheckpointPlugin expects a strategy of avalanche_fmlora but got {type(strategy).__name__}: "
            "other strategies don't say what belongs into a checkpoint. Leave the plugin out."
        )
    return strategy
