"""Metrics of continual learning: pure functions of the accuracy matrix.

``R[t, i]`` is the accuracy on the test images of experience i after training on experience t, a fraction in [0, 1];
shape [T, T], as an array or nested sequences. Entries above the diagonal are ignored and may be NaN or None.
Where a metric averages over earlier experiences and there is none (T = 1) it is NaN, and None in :func:`summarize`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Matrix: TypeAlias = NDArray[np.floating] | Sequence[Sequence[float | None]]
_Array: TypeAlias = NDArray[np.float64]


class PairedDifference(NamedTuple):
    """Mean of n paired differences and the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


def final_average_accuracy(R: Matrix) -> float:
    r"""Accuracy after the last experience, each experience counting the same: :math:`\frac1T \sum_i R_{T-1,i}`.

    Args:
        R: accuracy matrix, shape [T, T]; only the last row need be known.

    Raises:
        ValueError: if R isn't square, has a value outside [0, 1] or lacks one that is needed.

    >>> final_average_accuracy([[0.75, None], [0.25, 0.5]])
    0.375
    """
    return float(_known(_square(R), "final_average_accuracy", last_row=True)[-1].mean())


def pooled_accuracy(R: Matrix, n_test: Sequence[int] | NDArray[np.integer]) -> float:
    r"""Share of all test images that are right after the last experience: :math:`\sum_i n_i R_{T-1,i} / \sum_i n_i`.

    Args:
        R: accuracy matrix, shape [T, T]; only the last row need be known.
        n_test: number of test images of each experience, shape [T].

    Raises:
        ValueError: as :func:`final_average_accuracy`, and if `n_test` isn't T positive numbers.

    >>> pooled_accuracy([[0.75, None], [0.25, 0.5]], n_test=[300, 100])
    0.3125
    """
    matrix = _known(_square(R), "pooled_accuracy", last_row=True)
    counts = np.asarray(n_test, dtype=np.float64)
    if counts.shape != (len(matrix),) or not (np.isfinite(counts) & (counts > 0)).all():
        raise ValueError(
            f"Expected `n_test` to be {len(matrix)} positive numbers, one for each experience, but got {n_test!r}: "
            "give the number of test images of each experience."
        )
    return float(matrix[-1] @ counts / counts.sum())


def average_anytime_accuracy(R: Matrix) -> float:
    r"""Mean over time of the accuracy on what was seen: :math:`\frac1T \sum_t \frac1{t+1} \sum_{i \le t} R_{t,i}`.

    Also called average incremental accuracy (arXiv 1611.07725).

    Args:
        R: accuracy matrix, shape [T, T]; the lower triangle must be known.

    Raises:
        ValueError: as :func:`final_average_accuracy`.

    >>> average_anytime_accuracy([[0.75, None], [0.25, 0.5]])
    0.5625
    """
    matrix = _known(_square(R), "average_anytime_accuracy")
    return float(np.mean([row[: t + 1].mean() for t, row in enumerate(matrix)]))


def forgetting(R: Matrix) -> float:
    r"""Mean drop from the best earlier accuracy.

    .. math:: \frac1{T-1} \sum_{i<T-1} \left( \max_{i \le t < T-1} R_{t,i} - R_{T-1,i} \right)

    arXiv 1801.10112; negative where the last experience raised the accuracy. The "forgetting" of Avalanche (first minus
    last) and that of CODA-Prompt (mean drop a step) are other quantities.

    Args:
        R: accuracy matrix, shape [T, T]; the lower triangle must be known.

    Returns:
        A fraction in [-1, 1]; NaN if T = 1.

    Raises:
        ValueError: as :func:`final_average_accuracy`.

    >>> forgetting([[0.5, None, None], [0.75, 1.0, None], [0.25, 0.5, 1.0]])
    0.5
    """
    matrix = _known(_square(R), "forgetting")
    last = len(matrix) - 1
    return float(np.mean([matrix[i:last, i].max() - matrix[last, i] for i in range(last)])) if last else math.nan


def backward_transfer(R: Matrix) -> float:
    r"""Mean change since an experience was learned: :math:`\frac1{T-1} \sum_{i<T-1} R_{T-1,i} - R_{i,i}`.

    arXiv 1706.08840.

    Args:
        R: accuracy matrix, shape [T, T]; the diagonal and the last row must be known.

    Returns:
        A fraction in [-1, 1], negative where experiences are forgotten; NaN if T = 1.

    Raises:
        ValueError: as :func:`final_average_accuracy`.

    >>> backward_transfer([[0.75, None], [0.25, 0.5]])
    -0.5
    """
    matrix = _known(_square(R), "backward_transfer", last_row=True, diagonal=True)
    return float((matrix[-1] - np.diag(matrix))[:-1].mean()) if len(matrix) > 1 else math.nan


def learning_accuracy(R: Matrix) -> float:
    r"""Accuracy on each experience right after training on it: :math:`\frac1T \sum_i R_{i,i}`.

    Args:
        R: accuracy matrix, shape [T, T]; only the diagonal need be known.

    Raises:
        ValueError: as :func:`final_average_accuracy`.

    >>> learning_accuracy([[0.75, None], [0.25, 0.5]])
    0.625
    """
    return float(np.diag(_known(_square(R), "learning_accuracy", diagonal=True)).mean())


def summarize(R: Matrix, n_test: Sequence[int] | NDArray[np.integer]) -> dict[str, float | None]:
    """All metrics of a run, None where one is undefined.

    A matrix of which only the last row is known (joint training) has final and pooled accuracy and nothing else; with
    T = 1 there is nothing to forget. A lower triangle that is known in part is an error, as in each function.

    Args:
        R: accuracy matrix, shape [T, T].
        n_test: number of test images of each experience, shape [T].

    Raises:
        ValueError: as :func:`pooled_accuracy`.

    >>> summarize([[None, None], [0.25, 0.5]], n_test=[1, 1])["forgetting"] is None
    True
    """
    matrix = _square(R)
    earlier = matrix[:-1][np.tri(len(matrix), dtype=bool)[:-1]]
    last_row_only = len(earlier) > 0 and bool(np.isnan(earlier).all())
    values = {
        "final_average_accuracy": final_average_accuracy(matrix),
        "pooled_final_accuracy": pooled_accuracy(matrix, n_test),
        "average_anytime_accuracy": math.nan if last_row_only else average_anytime_accuracy(matrix),
        "forgetting": math.nan if last_row_only else forgetting(matrix),
        "backward_transfer": math.nan if last_row_only else backward_transfer(matrix),
        "learning_accuracy": math.nan if last_row_only else learning_accuracy(matrix),
    }
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def experience_accuracies(result: Mapping[str, Any]) -> dict[int, float]:
    """Accuracy on each experience of the test stream, from what ``strategy.eval`` of Avalanche returned.

    Args:
        result: names of Avalanche's metrics -> values; those of ``accuracy_metrics(experience=True)`` count.

    >>> experience_accuracies({"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp002": 0.5, "Loss": 0.1})
    {2: 0.5}
    """
    pattern = re.compile(r"Top1_Acc_Exp/eval_phase/test_stream(?:/Task\d+)?/Exp(\d+)")
    return {int(found[1]): float(value) for name, value in result.items() if (found := pattern.fullmatch(name))}


def matrix_of(results: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """The accuracy matrix of a pipeline of one's own, shape [T, T], NaN above the diagonal.

    Args:
        results: what ``strategy.eval`` of Avalanche returned after each of T experiences, for a stream with at least
            the experiences seen so far (``test_stream[: t + 1]``, or all) and ``accuracy_metrics(experience=True)`` in
            the evaluator. Not for each experience's own test set alone: Avalanche repeats the last value of what it
            does not evaluate, and nothing would seem forgotten.

    Raises:
        ValueError: if the accuracy on an experience seen so far is not there.

    >>> name = "Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp00"
    >>> matrix_of([{f"{name}0": 0.75}, {f"{name}0": 0.25, f"{name}1": 0.5}]).tolist()
    [[0.75, nan], [0.25, 0.5]]
    """
    matrix = np.full((len(results), len(results)), math.nan)
    for t, result in enumerate(results):
        known = experience_accuracies(result)
        missing = sorted(set(range(t + 1)) - set(known))
        if missing:
            raise ValueError(
                f"Expected the accuracies on experiences 0 to {t} in `results[{t}]` but {missing} are missing: put "
                "accuracy_metrics(experience=True) into the evaluator, and evaluate on test_stream[: t + 1]."
            )
        matrix[t, : t + 1] = [known[i] for i in range(t + 1)]
    return matrix


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference:
    r"""Mean of a - b over pairs with its 95 % interval :math:`\bar d \pm t_{0.975,n-1} \, s_d / \sqrt n`.

    Args:
        a: a metric of one method, shape [n], one entry for each class order.
        b: the same metric of the other method, shape [n], in the same order.

    Returns:
        ``(mean, low, high, n)``; the bounds are NaN if n = 1. Below 1e-12 there is no difference, as in tables.

    Raises:
        ValueError: if the lengths differ or are 0, or if a value isn't finite.

    >>> paired_difference([0.5, 0.75, 1.0], [0.25, 0.5, 0.75])
    PairedDifference(mean=0.25, low=0.25, high=0.25, n=3)
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) == 0:
        raise ValueError(
            f"Expected `a` and `b` to be two lists of one length, but got shapes {first.shape} and {second.shape}: "
            "keep the class orders that both methods have, in the same order."
        )
    from scipy.special import stdtrit

    difference = first - second
    difference[np.abs(difference) < 1e-12] = 0.0  # equal results of different sums differ in the last bits
    if not np.isfinite(difference).all():
        raise ValueError("Expected finite values in `a` and `b` but got NaN or infinity: leave these pairs out.")
    n, mean = len(difference), float(difference.mean())
    if n == 1:
        return PairedDifference(mean, math.nan, math.nan, 1)
    half = float(stdtrit(n - 1, 0.975)) * float(difference.std(ddof=1)) / math.sqrt(n)
    return PairedDifference(mean, mean - half, mean + half, n)


def _square(R: Matrix) -> _Array:
    """The matrix as float64 [T, T] with NaN for None, checked."""
    try:
        matrix = np.array([[math.nan if value is None else value for value in row] for row in R], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected an accuracy matrix of shape [T, T] but the rows can't be read as one ({error}): "
            "give T rows of T numbers, None where unknown."
        ) from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(
            f"Expected an accuracy matrix of shape [T, T] with T >= 1 but got shape {list(matrix.shape)}: "
            "give one row and one column for each experience."
        )
    wrong = ~np.isnan(matrix) & ((matrix < 0) | (matrix > 1))
    if wrong.any():
        t, i = (int(k) for k in np.argwhere(wrong)[0])
        raise ValueError(
            f"Expected accuracies as fractions in [0, 1] but got R[{t}, {i}] = {matrix[t, i]:g}: "
            "divide per cent by 100."
        )
    return matrix


def _known(matrix: _Array, metric: str, last_row: bool = False, diagonal: bool = False) -> _Array:
    """The matrix if the needed entries are known: last row and/or diagonal, or without either the lower triangle."""
    needed = np.zeros(matrix.shape, dtype=bool)
    if not (last_row or diagonal):
        needed |= np.tri(len(matrix), dtype=bool)
    if last_row:
        needed[-1] = True
    if diagonal:
        np.fill_diagonal(needed, True)
    unknown = np.argwhere(np.isnan(matrix) & needed)
    if len(unknown):
        t, i = (int(k) for k in unknown[0])
        raise ValueError(
            f"Expected R[{t}, {i}] to be known for {metric} but got NaN: evaluate experience {i} after training on "
            f"experience {t}."
        )
    return matrix
