"""DualGPM: the memory of feature directions against a numpy twin, and the directions that are left."""

from __future__ import annotations

import math

import pytest
import torch
from reference_memory import reference_memory
from torch import Tensor

from avalanche_fmlora.modules.dual_gpm import design_down, project_moment, update_memory


def moment_of(seed: int, size: int = 12, decay: float = 0.5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(50, size, generator=g, dtype=torch.float64) * decay ** torch.arange(size)
    x = x @ torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0]
    return x.T @ x / len(x)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99, 0.99999, 1.0])
@pytest.mark.parametrize("decay", [0.5, 0.97])
def test_memory_equals_a_literal_twin_over_many_experiences(threshold: float, decay: float) -> None:
    basis, retain = torch.zeros(12, 0, dtype=torch.float64), False
    memory, kind = None, "remove"
    for seed in range(6):
        moment = moment_of(seed, decay=decay)
        basis, retain = update_memory(basis, retain, moment, threshold)
        memory, kind = reference_memory(memory, kind, moment.numpy(), threshold)
        assert retain == (kind == "retain")
        assert basis.shape == memory.shape
        torch.testing.assert_close(basis @ basis.T, torch.from_numpy(memory @ memory.T), rtol=0, atol=1e-7)
        eye = torch.eye(basis.shape[1], dtype=torch.float64)
        torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=1e-9)
        assert basis.shape[1] <= 6


def test_memory_covers_what_it_promises_and_never_forgets_a_direction() -> None:
    basis, retain, taken = torch.zeros(12, 0, dtype=torch.float64), False, 0
    for seed in range(5):
        moment = moment_of(seed, decay=0.9)
        before = project_moment(torch.eye(12, dtype=torch.float64), basis, retain)
        first = basis.shape[1] == 0
        basis, retain = update_memory(basis, retain, moment, 0.95)
        free = project_moment(torch.eye(12, dtype=torch.float64), basis, retain)
        assert float((free @ moment).square().sum()) <= 0.05 * float(moment.square().sum()) + 1e-9 or first
        torch.testing.assert_close(before @ free, free, rtol=0, atol=1e-8)
        now = 12 - round(float(free.trace()))
        assert now >= taken
        taken = now


@pytest.mark.parametrize("retain", [False, True])
def test_new_directions_lie_where_the_past_is_not(retain: bool) -> None:
    moment = moment_of(3, decay=0.8)
    basis = torch.linalg.qr(torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    down = design_down(moment, basis, retain, 3)
    torch.testing.assert_close(down @ down.T, torch.eye(3, dtype=torch.float64) / 3, rtol=0, atol=1e-12)
    inside = down @ basis @ basis.T
    torch.testing.assert_close(inside, down if retain else torch.zeros_like(down), rtol=0, atol=1e-12)
    from_the_right = torch.linalg.svd(moment - moment @ basis @ basis.T)[0][:, :3].T / math.sqrt(3)
    assert float((from_the_right @ basis).norm()) > 0.1


def test_rows_without_a_free_direction_are_zero() -> None:
    moment = moment_of(4, decay=0.9)
    basis = torch.linalg.qr(torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    down = design_down(moment, basis, True, 4)
    assert float(down[2:].abs().max()) == 0
    torch.testing.assert_close(down[:2].norm(dim=1), torch.full((2,), 3**-0.5, dtype=torch.float64))
    assert float(design_down(moment, basis[:, :0], True, 4).abs().max()) == 0
