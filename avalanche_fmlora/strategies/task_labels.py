"""A class index means one class in all tasks, since there is one head; who numbers each task from zero is told."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


class TaskLabels:
    """The task label under which each class was trained last."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._warned = False

    def check(self, experience: Any, classes: list[int]) -> None:
        """Warn once of classes that come back under another task label."""
        labels = getattr(experience, "task_labels", [])
        label = labels[0] if len(labels) == 1 else 0
        again = [c for c in classes if self._last.get(c, label) != label]
        if again and not self._warned:
            self._warned = True
            logger.warning(
                "Classes %s of task %s were of another task before, and share one row of the head with it: right where "
                "domains have the same classes. If they are other classes, number those of all tasks through "
                "(class_ids_from_zero_in_each_exp=False): there are no heads of single tasks here.",
                again[:5],
                label,
            )
        self._last |= dict.fromkeys(classes, label)
