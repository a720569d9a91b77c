"""The chunked path against the recurrence: packs, states, both directions of time. Accuracy is tested on its own."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda.bench.measure import worst_head_error, worst_state_error
from kernels_cuda.lightning.blocks import BLOCK_BYTES, CHUNK_TOKENS, plan_blocks, spans_of
from kernels_cuda.lightning.chunked import lightning_scan, state_dtype_for
from kernels_cuda.lightning.reference import recurrence
from tests.kernels_cuda.lightning.backward import lightning_scan_backward
from tests.tolerances import BF16_OUTPUT_RMS, BF16_STATE_RMS

LIMITS = {
    torch.float64: (1e-13, 1e-13),
    torch.float32: (1e-6, 1e-6),
    torch.bfloat16: (BF16_OUTPUT_RMS, BF16_STATE_RMS),
}
PACKS = [(0, 300), (0, 1, 1, 60, 64, 65, 200, 300), (0, 0, 150, 300, 300)]
SLOPES = torch.tensor([0.0, 0.01, 0.9, 8.0])


def operands(
    num_tokens: int, dtype: torch.dtype, head_dims: tuple[int, int] = (32, 48)
) -> list[torch.Tensor]:
    dims = (head_dims[0], head_dims[0], head_dims[1])
    buffer = torch.nn.functional.silu(torch.randn(num_tokens, len(SLOPES), sum(dims))).to(dtype)
    return list(buffer.split(dims, dim=-1))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("borders", PACKS)
def test_matches_the_recurrence(dtype, reverse, with_state, borders):
    torch.manual_seed(0)
    q, k, v = operands(300, dtype)
    state_shape = (len(borders) - 1, len(SLOPES), 32, 48)
    state = torch.randn(state_shape, dtype=state_dtype_for(dtype)) if with_state else None
    got = lightning_scan(q, k, v, SLOPES, state, borders, reverse, 0.7)
    exact = recurrence(
        q.double(), k.double(), v.double(), SLOPES.double(), state, torch.tensor(borders), reverse, 0.7
    )
    assert got[1].dtype == state_dtype_for(dtype)
    assert worst_head_error(got[0], exact[0]) <= LIMITS[dtype][0]
    assert worst_state_error(got[1], exact[1]) <= LIMITS[dtype][1]


def test_blocks_cover_every_token_once_and_never_mix_a_cut_document():
    borders = (0, 10, 10, 40, 64, 200, 210, 211, 500)
    blocks = plan_blocks(spans_of(borders), 3)
    assert [token for block in blocks for token in range(block.start, block.stop)] == list(range(500))
    assert all(len(block.lengths) == 1 for block in blocks if not (block.opens and block.closes))
    assert [(block.num_tiles, block.tile_tokens) for block in blocks] == [
        (1, 64),
        (2, 64),
        (1, 8),
        (1, 11),
        (3, 64),
        (1, 64),
        (1, 33),
    ]
    assert [block.documents for block in blocks[:3]] == [slice(0, 4), slice(4, 5), slice(4, 5)]


@pytest.mark.parametrize("reverse", [False, True])
def test_the_size_of_blocks_changes_no_bit(reverse, monkeypatch):
    torch.manual_seed(4)
    borders, results = (0, 70, 71, 71, 500), []
    operands_THD = [torch.randn(500, 4, 16) for _ in range(4)]
    state = torch.randn(4, 4, 16, 16)
    for block_bytes in (1, 1 << 30):
        monkeypatch.setitem(BLOCK_BYTES, 4, block_bytes)
        q, k, v, grad_o = operands_THD
        forward = lightning_scan(q, k, v, SLOPES, state, borders, reverse)
        backward = lightning_scan_backward(
            grad_o, state, (q, k, v), SLOPES, state, borders, reverse, 1.0, True
        )
        results.append([*forward, *backward])
    for one_tile, many_tiles in zip(*results, strict=True):
        assert torch.equal(one_tile, many_tiles)


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 130, 299])
def test_two_parts_joined_by_their_state_equal_one_pass(cut):
    torch.manual_seed(1)
    q, k, v = operands(300, torch.float64)
    whole, last = lightning_scan(q, k, v, SLOPES, None, (0, 300))
    first, between = lightning_scan(q[:cut], k[:cut], v[:cut], SLOPES, None, (0, cut))
    second, end = lightning_scan(q[cut:], k[cut:], v[cut:], SLOPES, between, (0, 300 - cut))
    assert torch.allclose(torch.cat([first, second]), whole, rtol=1e-11, atol=1e-11)
    assert torch.allclose(end, last, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reverse", [False, True])
def test_an_impulse_decays_exactly_at_every_distance(reverse):
    start, slope = 150, torch.tensor([0.05])
    q = torch.ones(300, 1, 1, dtype=torch.float64)
    k = torch.zeros_like(q)
    k[start] = 1.0
    o, _ = lightning_scan(q, k, k, slope, None, (0, 300), reverse)
    distance = (torch.arange(300) - start) * (-1 if reverse else 1)
    expected = torch.where(distance >= 0, torch.exp(-slope.double() * distance.clamp(min=0)), 0.0)
    assert torch.allclose(o.flatten(), expected, rtol=1e-12, atol=0)


def test_without_output_state_the_output_is_the_same():
    torch.manual_seed(2)
    q, k, v = operands(300, torch.float32)
    o, state = lightning_scan(q, k, v, SLOPES, None, PACKS[1], output_state=False)
    assert state.shape == (0, 4, 32, 48)
    assert torch.equal(o, lightning_scan(q, k, v, SLOPES, None, PACKS[1])[0])


def test_a_slope_of_eight_overflows_nowhere():
    assert CHUNK_TOKENS * 8 > 88, "exp(8 * chunk) overflows fp32: it must not be formed"
    q, k, v = operands(130, torch.float32)
    o, state = lightning_scan(q, k, v, torch.full((4,), 8.0), None, (0, 130))
    assert torch.isfinite(o).all()
    assert torch.isfinite(state).all()
