"""Accuracy of the chunked path per head: rounding at length, every decay around tile borders, gradients across them.

Judged against fp64. The fp64 chunked path stands in for the recurrence at 128K tokens; test_chunked.py holds it to the
recurrence at 1e-13.
"""

from __future__ import annotations

import pytest
import torch

from kernels_cuda.lightning.blocks import CHUNK_TOKENS
from kernels_cuda.lightning.chunked import lightning_scan, state_dtype_for
from kernels_cuda.lightning.decay import lightning_slopes
from kernels_cuda.lightning.op import lightning_attention
from tests.kernels_cuda.lightning.backward import lightning_scan_backward
from tests.tolerances import BF16_OUTPUT_RMS, BF16_STATE_RMS

SHORT, LONG = 4096, 131_072
# the fastest and the slowest head of layer 40 of 80, and the slowest of the last lightning layer: they forget within 2,
# 500 and 20,000 tokens
SLOPES = torch.cat([lightning_slopes(64, 40, 80)[[0, 63]], lightning_slopes(64, 78, 80)[[63]]])
OUTPUTS, STATES = ("o", "dq", "dk", "dv"), ("state", "dstate_in")


def forward_and_gradients(
    operands: list[torch.Tensor], states: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Everything the operator gives: q, k, v, dO in `dtype`; the entering state and the later state's gradient."""
    q, k, v, grad_o = (x.to(dtype) for x in operands)
    state_in, later_state = (x.to(state_dtype_for(dtype)) for x in states)
    borders = (0, len(q))
    o, state = lightning_scan(q, k, v, SLOPES, state_in, borders)
    dq, dk, dv, dstate_in = lightning_scan_backward(
        grad_o, later_state, (q, k, v), SLOPES, state_in, borders, False, 1.0, True
    )
    return {"o": o, "dq": dq, "dk": dk, "dv": dv, "state": state, "dstate_in": dstate_in}


def errors_per_head(got: torch.Tensor, exact: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Relative RMS over `dims`; the heads stay apart."""
    return ((got.double() - exact).square().sum(dims) / exact.square().sum(dims)).sqrt()


def test_bf16_errors_stay_in_bounds_per_head_and_do_not_grow_to_128k_tokens():
    torch.manual_seed(0)
    heads, dim = len(SLOPES), 64
    qkv = torch.nn.functional.silu(torch.randn(LONG, heads, 3 * dim)).bfloat16()
    operands = [*qkv.split(dim, dim=-1), torch.randn(LONG, heads, dim).bfloat16()]
    states = [torch.randn(1, heads, dim, dim) for _ in range(2)]
    errors = {}
    for tokens in (SHORT, LONG):
        parts = [x[:tokens] for x in operands]
        got = forward_and_gradients(parts, states, torch.bfloat16)
        exact = forward_and_gradients(parts, states, torch.float64)
        for name in OUTPUTS:
            windows = (x.unflatten(0, (-1, SHORT)) for x in (got[name], exact[name]))
            errors[name, tokens] = errors_per_head(*windows, (1, 3))
        for name in STATES:
            errors[name, tokens] = errors_per_head(got[name], exact[name], (2, 3))
    for (name, tokens), error_WH in errors.items():
        limit = BF16_STATE_RMS if name in STATES else BF16_OUTPUT_RMS
        assert error_WH.max() <= limit, (name, tokens, error_WH.amax(0))
        # a window of 4K tokens anywhere in 128K is as exact as 4K tokens alone
        assert (error_WH.amax(0) <= 1.3 * errors[name, SHORT][0]).all(), (name, tokens, error_WH)


def decays(slope: float, num_tokens: int, borders: tuple[int, ...], reverse: bool) -> torch.Tensor:
    """[T, T]: what token i must read of token j, lambda^|i-j| inside its document, from the formula alone."""
    token = torch.arange(num_tokens)
    distance = token[:, None] - token[None, :]
    owner = torch.bucketize(token, torch.tensor(borders[1:-1]), right=True)
    seen = (distance <= 0) if reverse else (distance >= 0)
    weight = torch.exp(-slope * distance.abs().double())
    return torch.where(seen & (owner[:, None] == owner[None, :]), weight, 0.0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", ["one", "several"])
def test_impulses_decay_exactly_over_every_distance_and_every_tile_border(documents, dtype, reverse):
    # one head per place of the impulse: one call gives the whole matrix of decays, forward and for each gradient
    chunk, slope = CHUNK_TOKENS, 0.0625
    tokens = 2 * chunk + 3
    cuts = () if documents == "one" else (1, chunk - 1, chunk, chunk + 1)
    borders = (0, *cuts, tokens)
    slopes = torch.full((tokens,), slope)
    ones = torch.ones(tokens, tokens, 1, dtype=dtype)
    impulse = torch.eye(tokens, dtype=dtype)[:, :, None]
    expected = decays(slope, tokens, borders, reverse)
    # bf16 rounds up to five times on the way through a state; one decay too many would be 6%
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-6}[dtype]

    def close(got_TT1: torch.Tensor, expected_TT: torch.Tensor) -> bool:
        return torch.allclose(got_TT1[..., 0].double(), expected_TT, rtol=rtol, atol=0)

    o, _ = lightning_scan(ones, impulse, ones, slopes, None, borders, reverse)
    assert close(o, expected)
    o, _ = lightning_scan(ones, ones, impulse, slopes, None, borders, reverse)
    assert close(o, expected)
    # dq_i reads dO_i and v_j of the past; dk_j and dv_j read dO_i of the future: the transpose
    dq, _, _, _ = lightning_scan_backward(
        ones, None, (ones, ones, impulse), slopes, None, borders, reverse, 1.0, False
    )
    assert close(dq, expected)
    _, dk, dv, _ = lightning_scan_backward(
        impulse, None, (ones, ones, ones), slopes, None, borders, reverse, 1.0, False
    )
    assert close(dk, expected.T)
    assert close(dv, expected.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_parts_chained_by_their_states_equal_one_pass(dtype):
    torch.manual_seed(1)
    slopes, tokens = torch.tensor([0.0, 0.01, 0.9, 8.0]), 300
    whole = [torch.randn(tokens, 4, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    state_in = torch.randn(1, 4, 16, 16, dtype=state_dtype_for(dtype), requires_grad=True)
    grad_o, grad_state = torch.randn(tokens, 4, 16, dtype=dtype), torch.randn_like(state_in)
    o, state = lightning_attention(*whole, slopes, state_in)
    expected = torch.autograd.grad([o, state], [*whole, state_in], [grad_o, grad_state])
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: BF16_OUTPUT_RMS}[dtype]
    for cuts in ([1, 299], [63, 65], [64, 127], [128, 192], [129, 257]):
        carried, parts = state_in, []
        for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
            part, carried = lightning_attention(*(x[start:stop] for x in whole), slopes, carried)
            parts.append(part)
        assert errors_per_head(torch.cat(parts), o.double(), (0, 2)).max() <= limit
        assert errors_per_head(carried, state.double(), (0, 2, 3)).max() <= limit
        got = torch.autograd.grad([torch.cat(parts), carried], [*whole, state_in], [grad_o, grad_state])
        for one, other in zip(got, expected, strict=True):
            heads_apart = (0, 2) if one.ndim == 3 else (0, 2, 3)
            assert errors_per_head(one, other.double(), heads_apart).max() <= limit


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_across_tile_borders_pass_gradcheck(reverse):
    torch.manual_seed(2)
    borders = torch.tensor([0, 70, 71, 71, 205], dtype=torch.int32)
    assert 2 * CHUNK_TOKENS < 205 - 71, "the last document must fill several tiles"
    slopes = torch.tensor([0.0, 0.02, 1.0])
    shapes = ((205, 3, 3), (205, 3, 3), (205, 3, 2), (4, 3, 3, 2))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def call(q, k, v, state_in):
        return lightning_attention(q, k, v, slopes, state_in, borders, reverse, 0.7)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
