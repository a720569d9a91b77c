"""The judges of the GPU runs: per head, never pooled, and NaN never passes."""

from __future__ import annotations

import math

import torch

from kernels_cuda.bench.measure import worst_head_error, worst_state_error


def test_one_wrong_head_among_many_is_not_averaged_away():
    exact = torch.ones(10, 64, 8, dtype=torch.float64)
    got = exact.clone()
    got[:, 7] *= 1.1
    assert math.isclose(worst_head_error(got, exact), 0.1, rel_tol=1e-9)


def test_a_single_nan_is_no_small_error():
    exact = torch.ones(10, 4, 8)
    got = exact.clone()
    got[3, 2, 1] = math.nan
    assert not worst_head_error(got, exact) <= 1.0


def test_states_are_judged_per_document_and_a_zero_state_must_stay_zero():
    exact = torch.zeros(2, 3, 4, 4)
    exact[0] = 1.0
    got = exact.clone()
    assert worst_state_error(got, exact) == 0
    got[1, 2, 0, 0] = 0.5
    assert worst_state_error(got, exact) == 0.5
