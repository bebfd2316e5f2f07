"""Which images an experience trains, and of which classes: its own, a joint method's, or what a plugin brings."""

from __future__ import annotations

from typing import Any

from avalanche.training.templates import SupervisedTemplate

from avalanche_fmlora.modules.network import ContinualNetwork


class TrainingSet(SupervisedTemplate):
    """The part of :class:`strategies.base.ContinualStrategy` that says what passes over an experience read."""

    model: ContinualNetwork
    experience: Any
    _training_set: Any = None
    _training_classes: list[int]

    def training_experiences(self) -> list[Any]:
        """What trains at once: the current experience; a joint method has them all."""
        return [self.experience]

    def training_dataset(self) -> Any:
        """The images that train, with the evaluation transform: the experience's, or what a plugin puts in their place.

        A plugin does so if it brings classes that the head does not know: GDumb's memory, with which the model starts
        anew. Samples of known classes beside the experience's own, as replay has them, only train.
        """
        return (self.experience.dataset if self._training_set is None else self._training_set).eval()

    def training_classes(self) -> list[int]:
        """Classes of these images."""
        return classes_of(self.experience) if self._training_set is None else self._training_classes

    def _take_training_set(self) -> None:
        experiences = self.training_experiences()
        own = {c for e in experiences for c in classes_of(e)}
        given = _labels_in(self.adapted_dataset)
        if min(own | given, default=0) < 0:
            raise ValueError(
                f"Expected class indices from 0 but got {min(own | given)}: leave images without a class out."
            )
        known = set(self.model.head.seen.nonzero().flatten().tolist())
        replaced = bool(given - own - known)
        self._training_classes = sorted(given if replaced else own)
        self._training_set = self.adapted_dataset if replaced or len(experiences) > 1 else self.experience.dataset

    def _train_cleanup(self) -> None:
        super()._train_cleanup()
        self._training_set = None


def classes_of(experience: Any) -> list[int]:
    """Classes of an experience, which Avalanche gives as a list or a set, or, without a class timeline, not at all."""
    classes = getattr(experience, "classes_in_this_experience", None)
    return sorted(_labels_in(experience.dataset) if classes is None else {int(c) for c in classes})


def is_same(one: Any, other: Any) -> bool:
    """Whether two experiences are one: Avalanche's streams make new objects each time they are asked."""
    numbers = [getattr(e, "current_experience", None) for e in (one, other)]
    return one is other or (numbers[0] == numbers[1] is not None and classes_of(one) == classes_of(other))


def _labels_in(dataset: Any) -> set[int]:
    """Labels that occur, which Avalanche's data sets know without reading all of them."""
    labels = [getattr(c, "item", lambda c=c: c)() for c in getattr(dataset.targets, "uniques", dataset.targets)]
    broken = [c for c in labels if not isinstance(c, int)]
    if broken:
        raise ValueError(f"Expected class indices as integers but got {broken[0]!r}: give the data set int64 labels.")
    return set(labels)
