"""Joint training: all experiences at once with a LoRA. The upper bound of a table, not a continual learner."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from avalanche.benchmarks.utils.utils import concat_datasets
from pydantic import Field

from avalanche_fmlora.strategies.registry import register
from avalanche_fmlora.strategies.seq_lora import SeqLoRAConfig, SeqLoRAStrategy


class JointConfig(SeqLoRAConfig):
    """Options of joint training: those of sequential LoRA, with a rank and rate that suit one long training."""

    rank: int = Field(16, ge=1)
    """Rank of the LoRA."""
    lr_lora: float = Field(1e-3, ge=0)
    """Learning rate of A and B."""
    epochs: int | None = Field(None, ge=1)
    """Epochs over all data; null means as many as a continual method has for each experience."""


@register
class JointStrategy(SeqLoRAStrategy):
    """Trains once, on the whole stream: ``strategy.train(benchmark.train_stream)``.

    Options are the fields of :class:`JointConfig`, arguments of the frame in :class:`ContinualStrategy`.
    """

    method: ClassVar[str] = "joint"
    summary: ClassVar[str] = "LoRA on all experiences at once (upper bound)"
    config_class = JointConfig
    joint: ClassVar[bool] = True
    config: JointConfig

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._experiences: list[Any] = []
        if self.config.epochs is not None:
            self.train_epochs = self.config.epochs

    def train(self, experiences: Any, eval_streams: Any = None, **kwargs: Any) -> Any:
        """Train on all experiences as one.

        Raises:
            ValueError: when called a second time, or without an experience.
        """
        if self.clock.train_exp_counter:
            raise ValueError("Joint training sees all data at once: call `train` once, with the whole stream.")
        self._experiences = list(experiences) if isinstance(experiences, Iterable) else [experiences]
        if not self._experiences:
            raise ValueError("Expected the experiences to train on but got none: pass the whole stream.")
        streams = [self._experiences] if eval_streams is None else eval_streams  # as Avalanche: what is trained
        return super().train(self._experiences[0], streams, **kwargs)

    def _train_cleanup(self) -> None:
        super()._train_cleanup()
        self._experiences = []

    def training_experiences(self) -> list[Any]:
        """All of them."""
        return self._experiences

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """All training sets, one behind the other."""
        self.adapted_dataset = concat_datasets([e.dataset for e in self._experiences]).train()

    def make_train_dataloader(self, num_workers: int = 0, **kwargs: Any) -> None:
        """One loader of all images, each once an epoch; Avalanche's would balance tasks by repeating their images."""
        several = len({int(task) for task in getattr(self.adapted_dataset, "targets_task_labels", ())}) > 1
        make = self.plain_train_dataloader if several else super().make_train_dataloader
        make(num_workers, **kwargs)
