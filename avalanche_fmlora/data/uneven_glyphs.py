"""The characters of split_glyphs in experiences of unequal difficulty: where an experience's rank could matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from avalanche_fmlora.data.base import ImageSet, class_incremental, order_of, split_hash
from avalanche_fmlora.data.glyph_render import GLYPH_MEAN, GLYPH_STD, IMAGE_SIZE
from avalanche_fmlora.data.glyph_styles import broken_outline
from avalanche_fmlora.data.glyphs import (
    SPLIT_CHARACTERS,
    SPLITS,
    class_after_class,
    drawn_glyph,
    rendering_facts,
    require_counts,
)

EASIEST, HARDEST = 0.2, 1.0
"""Difficulties of the looks at level 0 and 1, see :func:`~avalanche_fmlora.data.glyph_render.draw_looks`."""

_STREAM = 100


def uneven_glyphs(
    *,
    n_experiences: int = 10,
    class_order_seed: int | None = None,
    image_size: int = IMAGE_SIZE,
    train_per_class: int = 36,
    test_per_class: int = 10,
    seed: int = 0,
    mean: Sequence[float] = GLYPH_MEAN,
    std: Sequence[float] = GLYPH_STD,
) -> Any:
    """The 100 classes of :func:`split_glyphs`, class-incremental, each experience at a level of difficulty of its own.

    Levels lie evenly between 0, clear filled strokes as the packaged backbone was pretrained on, and 1, strongly
    distorted broken outlines. All images of a class, test images too, have its experience's level.

    Args:
        n_experiences: must divide 100.
        class_order_seed: seeds the order of the classes and that of the levels; None keeps that of the characters and
            takes hard and easy in turn, the hardest first.
        image_size: side of the images; they are rendered with 32 and resized to any other.
        train_per_class: training images of each class.
        test_per_class: test images of each class, in faces that no training image of the class uses.
        seed: of the renderings.
        mean: of each channel in [0, 1], subtracted; the default is that of the packaged backbone.
        std: of each channel, divided by.

    Returns:
        An Avalanche benchmark with ``info``, see :func:`~avalanche_fmlora.data.base.class_incremental`;
        ``info.extra["levels"]`` has the level of each experience. ``info.split_hash`` is the same for all class orders.

    Raises:
        ValueError: if a count is below 1, `image_size` below 8 or the classes can't be divided.
    """
    require_counts(image_size, train_per_class, test_per_class)
    levels = levels_of(n_experiences, class_order_seed)
    counts = (train_per_class, test_per_class)
    of_class = _levels_of_classes(n_experiences, class_order_seed)
    train, test = (_images(of_class, s, counts[s], seed, image_size) for s in range(2))
    benchmark = class_incremental(
        "uneven_glyphs",
        train,
        test,
        list(SPLIT_CHARACTERS),
        n_experiences=n_experiences,
        class_order_seed=class_order_seed,
        mean=mean,
        std=std,
        extra=rendering_facts(seed, levels=[round(level, 4) for level in levels]),
    )
    # A class has other images at another place in the order; the same data in all orders are these drawings.
    unordered = _levels_of_classes(n_experiences, None)
    drawings = [_images(unordered, s, 1, seed, image_size).digest() for s in range(2)]
    benchmark.info = replace(benchmark.info, split_hash=split_hash(*drawings, str(counts)))
    return benchmark


def _levels_of_classes(n_experiences: int, class_order_seed: int | None) -> tuple[float, ...]:
    """The level of each character, in the order of the characters."""
    of_class = np.zeros(len(SPLIT_CHARACTERS))
    if n_experiences > 0 and len(of_class) % n_experiences == 0:  # else class_incremental says what is wrong
        levels = levels_of(n_experiences, class_order_seed)
        of_class[list(order_of(len(of_class), class_order_seed))] = np.repeat(levels, len(of_class) // n_experiences)
    return tuple(of_class.tolist())


def levels_of(n_experiences: int, class_order_seed: int | None) -> tuple[float, ...]:
    """Levels of the experiences, in order.

    >>> levels_of(5, None)
    (1.0, 0.0, 0.75, 0.25, 0.5)
    """
    levels = np.linspace(0, 1, n_experiences) if n_experiences > 1 else np.ones(1)
    if class_order_seed is None:
        in_turn = [i for pair in zip(range(n_experiences)[::-1], range(n_experiences), strict=True) for i in pair]
        return tuple(float(levels[i]) for i in in_turn[:n_experiences])
    return tuple(float(level) for level in np.random.default_rng((class_order_seed, _STREAM)).permutation(levels))


@lru_cache(maxsize=8)
def _images(levels: tuple[float, ...], split: int, count: int, seed: int, image_size: int) -> ImageSet:
    """`count` images of each class at its level, class after class; read-only, since all callers share it."""
    return class_after_class(
        [
            drawn_glyph(
                *(char, index, SPLITS[split]),
                partial(broken_outline, share=level),
                EASIEST + (HARDEST - EASIEST) * level,
                stream=_STREAM,
                seed=seed,
                image_size=image_size,
            )
            for char, level in zip(SPLIT_CHARACTERS, levels, strict=True)
            for index in range(count)
        ],
        count,
    )
