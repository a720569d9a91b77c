"""Parts of a pack: the states that spans leave, and documents that need not touch, on every device."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda.bench.measure import worst_head_error, worst_state_error
from kernels_cuda.lightning.reference import recurrence
from kernels_cuda.lightning.spans import leaving_states, scan_backward_into, scan_into
from tests import tolerances

SLOPES_H = torch.tensor([0.9, 0.03, 1e-4])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [
    (torch.float64, 1e-13, 1e-13),
    (torch.float32, tolerances.LOSS, tolerances.LOSS),
    (torch.bfloat16, tolerances.BF16_STATE_RMS, tolerances.BF16_OUTPUT_RMS),
]
# products of a state are 512 tokens on a CPU, chunks of the kernel 64: one token, around a chunk, several products
SPANS = ((3, 4), (70, 133), (140, 205), (300, 1600))


def draw(count: int, tokens: int = 1700) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    # strided, as q, k and v are in the layer
    normal = torch.randn(tokens, 3, count, 64, generator=generator, dtype=torch.float64)
    return [torch.nn.functional.silu(x) for x in normal.unbind(2)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance", "_"), DTYPES)
def test_leaving_states_equal_their_definition(device, reverse, dtype, tolerance, _):
    k, v = (x.to(dtype) for x in draw(2))
    # rows outside the spans belong to others
    outside = torch.ones(len(k), dtype=torch.bool)
    for span in SPANS:
        outside[slice(*span)] = False
    given = [x.masked_fill(outside[:, None, None], float("nan")).to(device) for x in (k, v)]
    found = leaving_states(*given, SLOPES_H.to(device), SPANS, reverse)
    for state, (start, stop) in zip(found.cpu(), SPANS, strict=True):
        steps = torch.arange(stop - start, dtype=torch.float64)
        weights = torch.exp(-(steps if reverse else steps.flip(0))[:, None] * SLOPES_H.double())
        expected = torch.einsum("th,thk,thv->hkv", weights, k[start:stop].double(), v[start:stop].double())
        assert worst_state_error(state[None], expected[None]) <= tolerance, (start, stop)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "_", "tolerance"), DTYPES)
def test_spans_are_documents_and_nothing_else_is_written(device, dtype, _, tolerance):
    q, k, v, grad_o = (x.to(dtype) for x in draw(4))
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    states = torch.randn(2, len(SPANS), 3, 64, 64, dtype=state_dtype)
    earlier, later = states.to(device)
    on_device = [x.to(device) for x in (q, k, v, grad_o)]
    o, *grads = (torch.full_like(x, float("nan")).contiguous() for x in (on_device[2], *on_device[:3]))
    last = torch.full_like(earlier, float("nan"))
    order: list[bool] = []

    def arrives() -> torch.Tensor:
        order.append(bool(grads[0][SPANS[0][0]].isfinite().all()) and not grads[1].isfinite().any())
        return later

    scan_into(o, tuple(on_device[:3]), SLOPES_H.to(device), earlier, SPANS, state_out=last)
    scan_backward_into(
        (grads[0], grads[1], grads[2]),
        on_device[3],
        arrives,
        tuple(on_device[:3]),
        SLOPES_H.to(device),
        earlier,
        SPANS,
    )
    assert order == [True], "the states of dk and dv are asked for once, after dq"
    found = dict(zip(("o", "dq", "dk", "dv"), (o.cpu(), *(x.cpu() for x in grads)), strict=True))
    calls = {"o": (q, k, v), "dq": (grad_o, v, k), "dk": (v, grad_o, q), "dv": (k, q, grad_o)}
    entering = {"o": states[0], "dq": states[0].mT, "dk": states[1].mT, "dv": states[1]}
    for name, operands in calls.items():
        inside = torch.zeros(len(q), dtype=torch.bool)
        for number, (start, stop) in enumerate(SPANS):
            inside[start:stop] = True
            exact, state = recurrence(
                *(x[start:stop].double() for x in operands),
                SLOPES_H,
                entering[name][number : number + 1].double(),
                reverse=name in ("dk", "dv"),
            )
            assert worst_head_error(found[name][start:stop], exact) <= tolerance, (name, start)
            if name == "o":
                assert worst_state_error(last[number : number + 1].cpu(), state) <= tolerance, start
        assert not found[name][~inside].isfinite().any(), name
