"""The lightning kernels' own source, run by the emulator, against the fp64 recurrence."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from kernels_cuda.bench.measure import worst_head_error, worst_state_error
from kernels_cuda.lightning.plan import ScanPlan, cut_document, for_every_column
from kernels_cuda.lightning.reference import recurrence
from tests.kernels_cuda.emulator.harness import (
    DECODE,
    LIGHTNING,
    compile_kernel,
    emulate_decode,
    emulate_scan,
    emulate_states,
)
from tests.tolerances import BF16_OUTPUT_RMS, BF16_STATE_RMS

SLOPES = torch.tensor([0.0, 0.02, 8.0])


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return compile_kernel(LIGHTNING)


def interleaved_qkv(
    num_tokens: int, key_dim: int, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Strided views of one projection buffer, as the model passes them."""
    normal = torch.randn(num_tokens, len(SLOPES), 2 * key_dim + value_dim)
    q, k, v = torch.nn.functional.silu(normal).bfloat16().split([key_dim, key_dim, value_dim], dim=-1)
    return q, k, v


def segmented_plan(borders: tuple[int, ...], segment_tokens: int, value_dim: int, reverse: bool) -> ScanPlan:
    """plan_scan with shorter segments than a real one, so that few tokens make many."""
    rows: list[tuple[int, ...]] = []
    slots = 0
    for document, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        cuts = cut_document(start, stop, segment_tokens, reverse)
        rows += [
            (first, tokens, 0, 0, document, i, slots, int(i == len(cuts) - 1))
            for i, (first, tokens) in enumerate(cuts)
        ]
        slots += len(cuts) - 1
    items = for_every_column(rows, len(SLOPES), value_dim // 64)
    return ScanPlan(
        items=items,
        state_items=items[items[:, 7] == 0].contiguous(),
        num_slots=slots,
        segment_tokens=segment_tokens,
    )


def assert_matches(got: tuple, expected: tuple) -> None:
    assert worst_head_error(got[0], expected[0]) <= BF16_OUTPUT_RMS
    assert worst_state_error(got[1], expected[1]) <= BF16_STATE_RMS


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (128, 128), (128, 64), (64, 128)])
def test_scan_matches_the_recurrence_on_ragged_documents(library, key_dim, value_dim, with_state, reverse):
    torch.manual_seed(0)
    borders = (0, 1, 64, 64, 127, 192, 449, 450)
    q, k, v = interleaved_qkv(borders[-1], key_dim, value_dim)
    # The state comes transposed, as backward passes it.
    state = (
        torch.randn(len(borders) - 1, len(SLOPES), value_dim, key_dim).transpose(2, 3) if with_state else None
    )
    got = emulate_scan(library, (q, k, v), SLOPES, state, borders, reverse, 0.5)
    exact = recurrence(q.double(), k.double(), v.double(), SLOPES, state, torch.tensor(borders), reverse, 0.5)
    assert_matches(got, exact)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 257])
def test_scan_matches_the_recurrence_at_lengths_around_a_chunk(library, num_tokens, reverse):
    torch.manual_seed(num_tokens)
    q, k, v = interleaved_qkv(num_tokens, 64, 64)
    exact = recurrence(q.double(), k.double(), v.double(), SLOPES, reverse=reverse)
    assert_matches(emulate_scan(library, (q, k, v), SLOPES, None, (0, num_tokens), reverse), exact)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_segments_and_their_prepass_match_the_recurrence(library, with_state, reverse):
    torch.manual_seed(1)
    borders = (0, 5, 133, 700)
    q, k, v = interleaved_qkv(borders[-1], 64, 64)
    state = torch.randn(3, len(SLOPES), 64, 64) if with_state else None
    plan = segmented_plan(borders, 128, 64, reverse)
    assert plan.num_slots == 4
    got = emulate_scan(library, (q, k, v), SLOPES, state, borders, reverse, plan=plan)
    exact = recurrence(q.double(), k.double(), v.double(), SLOPES, state, torch.tensor(borders), reverse)
    assert_matches(got, exact)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 128), (128, 64)])
def test_a_prepass_alone_gives_the_states_of_ragged_spans(library, key_dim, value_dim, reverse):
    torch.manual_seed(6)
    spans = ((1, 2), (10, 73), (80, 209), (210, 500))
    _, k, v = interleaved_qkv(520, key_dim, value_dim)
    alone = torch.full((520, 1, 1), math.nan)
    for span in spans:
        alone[slice(*span)] = 0
    states = emulate_states(library, (k + alone).bfloat16(), (v + alone).bfloat16(), SLOPES, spans, reverse)
    for state, (start, stop) in zip(states, spans, strict=True):
        part = [x[start:stop].double() for x in (k, k, v)]
        _, exact = recurrence(*part, SLOPES, reverse=reverse)
        assert worst_state_error(state[None], exact) <= BF16_STATE_RMS, (start, stop)


@pytest.mark.parametrize("borders", [(0, 65, 200), (0, 1, 65, 128, 385)])
def test_gradients_of_the_four_calls_match_fp64_autograd(library, borders):
    torch.manual_seed(2)
    q, k, v = interleaved_qkv(borders[-1], 64, 64)
    state, grad_state = torch.randn(2, len(borders) - 1, 3, 64, 64)
    grad_o = torch.randn(borders[-1], 3, 64).bfloat16()
    leaves = [x.double().requires_grad_() for x in (q, k, v, state)]
    o, state_out = recurrence(*leaves[:3], SLOPES, leaves[3], torch.tensor(borders))
    exact = torch.autograd.grad([o, state_out], leaves, [grad_o.double(), grad_state.double()])
    growth = SLOPES.exp()[None, :, None, None]
    later = grad_state * growth
    dq, _ = emulate_scan(library, (grad_o, v, k), SLOPES, state.transpose(2, 3), borders)
    dk, _ = emulate_scan(library, (v, grad_o, q), SLOPES, later.transpose(2, 3), borders, True)
    dv, last = emulate_scan(library, (k, q, grad_o), SLOPES, later, borders, True)
    errors = [worst_head_error(got, expected) for got, expected in zip((dq, dk, dv), exact[:3], strict=True)]
    assert max(errors) <= BF16_OUTPUT_RMS, errors
    assert worst_state_error(last / growth, exact[3]) <= BF16_STATE_RMS


@pytest.mark.parametrize("reverse", [False, True])
def test_a_document_does_not_see_nan_in_its_neighbours(library, reverse):
    torch.manual_seed(3)
    q, k, v = interleaved_qkv(100, 64, 64)
    alone, _ = emulate_scan(library, (q, k, v), SLOPES, None, (0, 100), reverse)
    packed = [torch.full((230, *x.shape[1:]), math.nan, dtype=x.dtype) for x in (q, k, v)]
    for target, source in zip(packed, (q, k, v), strict=True):
        target[30:130] = source
    between, _ = emulate_scan(
        library, (packed[0], packed[1], packed[2]), SLOPES, None, (0, 30, 130, 230), reverse
    )
    assert torch.equal(between[30:130], alone)


def test_two_runs_are_bit_equal_on_any_number_of_blocks(library):
    torch.manual_seed(4)
    q, k, v = interleaved_qkv(200, 64, 64)
    plan = segmented_plan((0, 70, 200), 256, 64, False)
    shuffled = ScanPlan(
        items=plan.items.flip(0).contiguous(), state_items=plan.state_items, num_slots=0, segment_tokens=256
    )
    first = emulate_scan(library, (q, k, v), SLOPES, None, (0, 70, 200), plan=plan)
    second = emulate_scan(library, (q, k, v), SLOPES, None, (0, 70, 200), plan=shuffled)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("distance", [0, 1, 62, 63, 64, 65, 127, 128, 129])
def test_an_impulse_decays_exactly_around_chunk_edges(library, distance):
    start, slope = 63, torch.tensor([0.03, 0.0, 0.5])
    q = torch.zeros(200, 3, 64, dtype=torch.bfloat16)
    k, v = torch.zeros_like(q), torch.zeros_like(q)
    k[start, :, 5] = v[start, :, 9] = 1.0
    q[start + distance, :, 5] = 1.0
    o, _ = emulate_scan(library, (q, k, v), slope, None, (0, 200))
    expected = torch.exp(-slope.double() * distance)
    assert torch.allclose(o[start + distance, :, 9].double(), expected, rtol=1e-2, atol=0)
    o[start + distance, :, 9] = 0
    assert o.abs().max() == 0


def test_decode_matches_one_step_of_the_recurrence():
    torch.manual_seed(5)
    library = compile_kernel(DECODE)
    for key_dim, value_dim in ((64, 128), (128, 64)):
        q, k, v = interleaved_qkv(4, key_dim, value_dim)
        state = torch.randn(4, 3, key_dim, value_dim)
        exact_o, exact_state = recurrence(
            q.double(), k.double(), v.double(), SLOPES, state.double(), torch.arange(5), False, 0.5
        )
        o = emulate_decode(library, (q, k, v), SLOPES, state, 0.5)
        assert worst_head_error(o, exact_o) <= BF16_OUTPUT_RMS
        assert worst_state_error(state, exact_state) <= 1e-6
