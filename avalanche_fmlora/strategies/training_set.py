"""Which images an experience trains, and of which classes: its own, a joint method's, or what a plugin brings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from avalanche.training.templates import SupervisedTemplate

from avalanche_fmlora.modules.network import ContinualNetwork


class TrainingSet(SupervisedTemplate):
    """The part of :class:`strategies.base.ContinualStrategy` that says what passes over an experience read."""

    model: ContinualNetwork
    experience: Any
    _training_set: Any = None
    _training_classes: list[int]
    _begun: Begun | None = None

    def training_experiences(self) -> list[Any]:
        """What trains at once: the current experience; a joint method has them all."""
        return [self.experience]

    def training_dataset(self) -> Any:
        """The images that train, with the evaluation transform: the experience's, or what a plugin puts in their place.

        A plugin does so if it leaves some of the experience's images out, brings classes that the head does not know,
        or other images to a head that knows none: GDumb's memory, with which the model starts anew. Samples of known
        classes beside the experience's own, as replay has them, only train.
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
        others = self.clock.train_exp_counter > 0 or len(self.adapted_dataset) != len(self.experience.dataset)
        replaced = bool(given - own - known) or (not known and others and len(experiences) == 1)
        replaced |= given <= own and len(self.adapted_dataset) < sum(len(e.dataset) for e in experiences)
        self._training_classes = sorted(given if replaced else given & own)
        self._training_set = self.adapted_dataset if replaced or len(experiences) > 1 else self.experience.dataset

    def _train_cleanup(self) -> None:
        """Let go of all data, as Avalanche does: a strategy between two experiences can be copied and pickled."""
        super()._train_cleanup()
        self._training_set = None
        self._begun = None if self._begun is None else replace(self._begun, experience=None)


def classes_of(experience: Any) -> list[int]:
    """Classes of an experience, which Avalanche gives as a list or a set, or, without a class timeline, not at all."""
    classes = getattr(experience, "classes_in_this_experience", None)
    return sorted(_labels_in(experience.dataset) if classes is None else {int(c) for c in classes})


@dataclass(frozen=True)
class Begun:
    """The experience that a strategy began last: its number and classes, and the object itself while it trains.

    Avalanche's streams make new objects each time they are asked; an experience on its own has no number.
    """

    number: int | None
    classes: tuple[int, ...]
    experience: Any = field(default=None, compare=False)

    @classmethod
    def of(cls, experience: Any) -> Begun:
        """That of an experience."""
        return cls(getattr(experience, "_current_experience", None), tuple(classes_of(experience)), experience)

    def is_same(self, experience: Any) -> bool:
        """Whether `experience` is this one."""
        return self.experience is experience or (self.number is not None and self == Begun.of(experience))


def _labels_in(dataset: Any) -> set[int]:
    """Labels that occur, which Avalanche's data sets know without reading all of them."""
    targets = getattr(dataset, "targets", None)
    if targets is None:
        raise ValueError(
            "Expected a data set that knows its labels as `targets`: make it with Avalanche's "
            "`as_classification_dataset(dataset)`, or give it a list of class indices of that name."
        )
    labels = [getattr(c, "item", lambda c=c: c)() for c in getattr(targets, "uniques", targets)]
    broken = [c for c in labels if not isinstance(c, int)]
    if broken:
        raise ValueError(f"Expected class indices as integers but got {broken[0]!r}: give the data set int64 labels.")
    return set(labels)
