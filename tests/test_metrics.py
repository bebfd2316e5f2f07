"""Metrics of the accuracy matrix against hand-worked matrices and literal twins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from avalanche_fmlora.metrics import (
    average_anytime_accuracy,
    backward_transfer,
    final_average_accuracy,
    forgetting,
    learning_accuracy,
    matrix_of,
    paired_difference,
    pooled_accuracy,
    summarize,
)

# Worked by hand. Last row 0.2 0.5 0.9; diagonal 0.8 0.7 0.9; best before the last: 0.9 (after experience 1) and 0.7.
HAND: list[list[float | None]] = [[0.8, None, None], [0.9, 0.7, None], [0.2, 0.5, 0.9]]


def reference_forgetting(R: Any) -> float:
    T, total = len(R), 0.0
    for i in range(T - 1):
        best = -1.0
        for t in range(T - 1):
            if t >= i and R[t][i] > best:
                best = R[t][i]
        total += best - R[T - 1][i]
    return total / (T - 1)


def reference_backward_transfer(R: Any) -> float:
    T, total = len(R), 0.0
    for i in range(T - 1):
        total += R[T - 1][i] - R[i][i]
    return total / (T - 1)


def reference_anytime(R: Any) -> float:
    T, total = len(R), 0.0
    for t in range(T):
        row = 0.0
        for i in range(t + 1):
            row += R[t][i]
        total += row / (t + 1)
    return total / T


def reference_learning(R: Any) -> float:
    total = 0.0
    for i in range(len(R)):
        total += R[i][i]
    return total / len(R)


def reference_final(R: Any) -> float:
    total = 0.0
    for i in range(len(R)):
        total += R[-1][i]
    return total / len(R)


def test_hand_worked_matrix() -> None:
    assert final_average_accuracy(HAND) == pytest.approx((0.2 + 0.5 + 0.9) / 3)
    assert pooled_accuracy(HAND, [10, 20, 70]) == pytest.approx(0.02 + 0.1 + 0.63)
    assert average_anytime_accuracy(HAND) == pytest.approx((0.8 + 0.8 + 1.6 / 3) / 3)
    assert forgetting(HAND) == pytest.approx((0.7 + 0.2) / 2)
    assert backward_transfer(HAND) == pytest.approx((-0.6 - 0.2) / 2)
    assert learning_accuracy(HAND) == pytest.approx(2.4 / 3)


def test_forgetting_is_negative_when_the_last_experience_helps() -> None:
    assert forgetting([[0.5, 0.0], [0.75, 1.0]]) == -0.25
    assert backward_transfer([[0.5, 0.0], [0.75, 1.0]]) == 0.25


@pytest.mark.parametrize("T", [2, 3, 10])
@pytest.mark.parametrize(
    ("fast", "reference"),
    [
        (forgetting, reference_forgetting),
        (backward_transfer, reference_backward_transfer),
        (average_anytime_accuracy, reference_anytime),
        (learning_accuracy, reference_learning),
        (final_average_accuracy, reference_final),
    ],
)
def test_against_literal_twin(T: int, fast: Callable[..., float], reference: Callable[..., float]) -> None:
    full = np.random.default_rng(T).random((T, T))
    assert fast(full) == pytest.approx(reference(full.tolist()), abs=1e-14)
    lower = np.where(np.tri(T, dtype=bool), full, np.nan)
    assert fast(lower) == fast(full), "entries above the diagonal must not count"
    assert fast(lower.tolist()) == fast(full)


def test_pooled_equals_the_share_of_right_images() -> None:
    right, n_test = np.array([3, 50, 7]), [4, 100, 7]
    R = np.full((3, 3), np.nan)
    R[-1] = right / n_test
    assert pooled_accuracy(R, n_test) == pytest.approx(60 / 111)
    assert pooled_accuracy(HAND, [5, 5, 5]) == pytest.approx(final_average_accuracy(HAND))


def test_summarize_keys_and_values() -> None:
    assert summarize(HAND, [10, 20, 70]) == {
        "final_average_accuracy": final_average_accuracy(HAND),
        "pooled_final_accuracy": pooled_accuracy(HAND, [10, 20, 70]),
        "average_anytime_accuracy": average_anytime_accuracy(HAND),
        "forgetting": forgetting(HAND),
        "backward_transfer": backward_transfer(HAND),
        "learning_accuracy": learning_accuracy(HAND),
    }


def test_one_experience_has_nothing_to_forget() -> None:
    assert math.isnan(forgetting([[0.5]]))
    assert math.isnan(backward_transfer([[0.5]]))
    got = summarize([[0.5]], [8])
    assert [k for k, v in got.items() if v is None] == ["forgetting", "backward_transfer"]
    assert {v for v in got.values() if v is not None} == {0.5}


def test_joint_training_knows_only_the_last_row() -> None:
    R = np.full((3, 3), np.nan)
    R[-1] = 0.5, 0.75, 1.0
    got = summarize(R, [1, 1, 2])
    assert got.pop("final_average_accuracy") == 0.75
    assert got.pop("pooled_final_accuracy") == 0.8125
    assert set(got.values()) == {None}


@pytest.mark.parametrize(
    ("R", "message"),
    [
        ([[0.5, 0.5]], "shape"),
        ([], "shape"),
        ([0.5, 0.5], "shape"),
        ([[0.5], [0.5, 0.5]], "None where unknown"),
        ([["a"]], "numbers"),
        ([[55.0]], r"R\[0, 0\] = 55: divide per cent"),
        ([[0.5, -0.1], [0.5, 0.5]], "fractions"),
        ([[0.5, math.inf], [0.5, 0.5]], "fractions"),
        ([[0.5, None], [None, 0.5]], r"R\[1, 0\].*evaluate experience 0 after training on experience 1"),
        ([[0.5, None, None], [None, 0.5, None], [0.5, 0.5, 0.5]], r"R\[1, 0\]"),
    ],
)
def test_bad_matrices_are_refused(R: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarize(R, [1] * len(R))


def test_only_needed_entries_are_asked_for() -> None:
    sparse: list[list[float | None]] = [[0.5, None, None], [None, 0.75, None], [0.25, 0.5, 1.0]]
    assert learning_accuracy(sparse) == 0.75
    assert backward_transfer(sparse) == -0.25
    with pytest.raises(ValueError, match="forgetting"):
        forgetting(sparse)


@pytest.mark.parametrize("n_test", [[1], [1, 0], [1, -1], [1, math.nan]])
def test_bad_counts_are_refused(n_test: Any) -> None:
    with pytest.raises(ValueError, match="2 positive numbers"):
        pooled_accuracy([[0.5, None], [0.5, 0.5]], n_test)


@pytest.mark.parametrize("n", [2, 5, 31, 32, 60])
def test_paired_interval_against_scipy(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(n)
    a, b = rng.random(n), rng.random(n)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    got = paired_difference(a.tolist(), b.tolist())
    assert got.n == n
    assert got.mean == pytest.approx((a - b).mean(), abs=1e-14)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-8)


def test_equal_results_of_different_sums_are_no_difference() -> None:
    assert paired_difference([0.1 + 0.2] * 3, [0.3] * 3)[:3] == (0, 0, 0)


def test_paired_difference_edges() -> None:
    mean, low, high, n = paired_difference([0.75], [0.5])
    assert (mean, n) == (0.25, 1)
    assert math.isnan(low)
    assert math.isnan(high)
    for a, b in (([], []), ([1.0], [1.0, 2.0]), ([math.nan, 1.0], [0.0, 0.0])):
        with pytest.raises(ValueError, match=r"class orders|finite"):
            paired_difference(a, b)


def test_the_matrix_of_avalanches_results() -> None:
    name = "Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp{:03d}"
    results: list[dict[str, float]] = [
        {name.format(i): 0.1 * t + 0.01 * i for i in range(12)} | {"Top1_Acc_Stream/eval_phase/test_stream": 0.9}
        for t in range(3)
    ]
    R = matrix_of(results)
    np.testing.assert_allclose(R, [[0, np.nan, np.nan], [0.1, 0.11, np.nan], [0.2, 0.21, 0.22]])
    assert matrix_of([{"Top1_Acc_Exp/eval_phase/test_stream/Exp000": 0.5}]).tolist() == [[0.5]], "without task labels"
    del results[2][name.format(1)]
    with pytest.raises(ValueError, match=r"0 to 2 in `results\[2\]` but \[1\] are missing: .*experience=True"):
        matrix_of(results)
