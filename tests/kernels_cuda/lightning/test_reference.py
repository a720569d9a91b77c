"""The definition itself, against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from kernels_cuda.lightning.reference import recurrence


def ones(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, 1, 1, dtype=torch.float64)


def test_a_token_sees_itself_undecayed_and_the_past_decayed():
    o, state = recurrence(ones(3), ones(3), ones(3), torch.tensor([math.log(2.0)], dtype=torch.float64))
    assert o.flatten().tolist() == pytest.approx([1.0, 1.5, 1.75], rel=1e-15)
    assert state.item() == pytest.approx(1.75, rel=1e-15)


def test_the_entering_state_decays_before_the_first_token_reads_it():
    state_in = torch.full((1, 1, 1, 1), 8.0, dtype=torch.float64)
    slopes = torch.tensor([math.log(2.0)], dtype=torch.float64)
    o, state = recurrence(ones(2), ones(2), ones(2), slopes, state_in, scale=0.5)
    assert o.flatten().tolist() == pytest.approx([2.5, 1.75], rel=1e-15)
    assert state.item() == pytest.approx(3.5, rel=1e-15)


def test_documents_do_not_mix_and_an_empty_one_passes_its_state():
    state_in = torch.arange(3.0, dtype=torch.float64).reshape(3, 1, 1, 1)
    o, state = recurrence(ones(2), ones(2), ones(2), torch.zeros(1), state_in, torch.tensor([0, 1, 1, 2]))
    assert o.flatten().tolist() == [1.0, 3.0]
    assert state.flatten().tolist() == [1.0, 1.0, 3.0]


def test_reversed_time_is_the_flipped_sequence():
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, 3, dtype=torch.float64) for _ in range(3))
    slopes = torch.tensor([0.1, 1.0])
    o, state = recurrence(q, k, v, slopes, reverse=True)
    flipped, flipped_state = recurrence(q.flip(0), k.flip(0), v.flip(0), slopes)
    assert torch.equal(o, flipped.flip(0))
    assert torch.equal(state, flipped_state)
