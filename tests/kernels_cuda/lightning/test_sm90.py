"""The way from the lightning operators to the kernels and back, without a GPU: which calls they take, and on the
emulator the order of arguments, states and gradients.

The operators of m1_sm90 get CPU kernels that call the emulated launchers, so everything but the GPU is the product's.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from types import SimpleNamespace

import pytest
import torch

from kernels_cuda import build
from kernels_cuda.bench.measure import worst_head_error, worst_state_error
from kernels_cuda.lightning import blocks, chunked, plan, sm90
from kernels_cuda.lightning.op import lightning_attention, lightning_decode
from kernels_cuda.lightning.projection import lightning_of_projection
from kernels_cuda.lightning.reference import recurrence
from kernels_cuda.lightning.spans import leaving_states
from tests.kernels_cuda.emulator import harness
from tests.tolerances import BF16_OUTPUT_RMS, BF16_STATE_RMS


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda", 0)


def interleaved(head_dim: int, extra: int = 0) -> torch.Tensor:
    """q as a view of one projection [T, H, 3 * head_dim + extra]."""
    return torch.zeros(5, 2, 3 * head_dim + extra).bfloat16()[..., :head_dim]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_views_of_one_projection_are_taken_as_they_are(head_dim, monkeypatch):
    monkeypatch.setattr(build, "load_library", lambda: True)
    assert sm90.can_serve(interleaved(head_dim).as_subclass(OnGpu))
    assert not sm90.can_serve(interleaved(head_dim))


@pytest.mark.parametrize(
    ("operand", "reason"),
    [
        (interleaved(64).float(), "torch.float32, the kernels take torch.bfloat16"),
        (interleaved(96), r"head dim is 96, the kernels take \(64, 128\)"),
        (interleaved(64, extra=4), "16-byte borders"),
        (torch.zeros(5, 2, 200).bfloat16()[..., 4:68], "16-byte borders"),
        (torch.zeros(5, 1, 64).bfloat16().expand(5, 2, 64), "repeat rows"),
    ],
)
def test_what_the_kernels_cannot_take_is_said_once(operand, reason, caplog, monkeypatch):
    monkeypatch.setattr(build, "load_library", lambda: pytest.fail("it was not refused"))
    sm90._announce.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not sm90.can_serve(operand.as_subclass(OnGpu))
        assert not sm90.can_serve(interleaved(64).as_subclass(OnGpu), operand.as_subclass(OnGpu))
    [record] = caplog.records
    assert re.search(reason, record.getMessage())


def test_constants_agree_with_the_sources():
    tiles = (build.PACKAGE / "csrc" / "tile.cuh").read_text()
    kernel = (build.PACKAGE / "lightning" / "lightning_sm90.cu").read_text()
    assert "constexpr uint32_t kChunk = kTileRows;" in kernel
    assert f"kTileRows = {plan.CHUNK_TOKENS};" in tiles
    assert f"kTileColumns = {plan.VALUE_COLUMNS};" in tiles
    assert blocks.CHUNK_TOKENS == plan.CHUNK_TOKENS, "the chunked path mirrors the kernel's tiles"
    allowed = " || ".join(f"kKeyDim == {head_dim}" for head_dim in sm90.HEAD_DIMS)
    assert f"static_assert({allowed}," in kernel


def lightning_schemas() -> list[str]:
    """The schemas of the lightning operators as bind.cpp registers them."""
    text = (build.PACKAGE / "csrc" / "bind.cpp").read_text()
    found = re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\)", text)
    schemas = ["".join(re.findall(r"\"([^\"]*)\"", schema)) for schema in found]
    return [schema for schema in schemas if schema.startswith("lightning")]


@pytest.fixture(scope="module")
def operators():
    scan, decode = (harness.compile_kernel(source) for source in (harness.LIGHTNING, harness.DECODE))
    launchers = {
        "lightning_scan": functools.partial(harness.launch_scan, scan),
        "lightning_states": functools.partial(harness.launch_states, scan),
        "lightning_decode": functools.partial(harness.launch_decode, decode),
    }
    library = torch.library.Library("m1_sm90", "FRAGMENT")
    for schema in lightning_schemas():
        library.define(schema)
    for name, launch in launchers.items():
        library.impl(name, launch, "CPU")
    yield
    library._destroy()


@pytest.fixture
def on_kernels(operators, monkeypatch):
    """Send every bf16 call to the kernels of a GPU with three multiprocessors."""
    monkeypatch.setattr(sm90, "can_serve", lambda *operands: operands[0].dtype == torch.bfloat16)
    monkeypatch.setattr(sm90, "_num_multiprocessors", lambda device: harness.FEW_MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    # the chunked path must not answer in their place
    monkeypatch.setattr(chunked, "scan_into", lambda *_: pytest.fail("the chunked path was taken"))
    monkeypatch.setattr(chunked, "scan_backward_into", lambda *_: pytest.fail("the chunked path was taken"))


def operands(num_tokens: int, num_heads: int, key_dim: int, value_dim: int) -> list[torch.Tensor]:
    """q, k, v as strided views of one projection."""
    dims = [key_dim, key_dim, value_dim]
    normal = torch.randn(num_tokens, num_heads, sum(dims))
    return list(torch.nn.functional.silu(normal).bfloat16().split(dims, dim=-1))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("borders", "slopes", "num_slots"),
    [((0, 1, 66, 200), [0.0, 0.05, 8.0], 0), ((0, 1100), [0.003], 2)],
    ids=["ragged documents", "one head in segments"],
)
def test_outputs_states_and_gradients_on_the_kernels_match_fp64(
    on_kernels, borders, slopes, num_slots, reverse
):
    torch.manual_seed(0)
    slopes_H, cu_seqlens = torch.tensor(slopes), torch.tensor(borders, dtype=torch.int32)
    heads, tokens = len(slopes), borders[-1]
    assert plan.plan_scan(borders, heads, 64, reverse, harness.FEW_MULTIPROCESSORS).num_slots == num_slots
    q, k, v = operands(tokens, heads, 128, 64)
    state, grad_state = torch.randn(2, len(borders) - 1, heads, 128, 64)
    grad_o = torch.randn(tokens, heads, 64).bfloat16()
    results = []
    for attention, dtype in ((recurrence, torch.float64), (lightning_attention, torch.bfloat16)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        leaves.append(state.to(chunked.state_dtype_for(dtype)).requires_grad_())
        found = attention(*leaves[:3], slopes_H, leaves[3], cu_seqlens, reverse, 0.5)
        cotangents = [grad_o.to(found[0].dtype), grad_state.to(found[1].dtype)]
        o, state_out, dq, dk, dv, dstate = (*found, *torch.autograd.grad(found, leaves, cotangents))
        results.append(((o, dq, dk, dv), (state_out, dstate)))
    exact, got = results
    errors = [worst_head_error(x.detach(), y.detach()) for x, y in zip(got[0], exact[0], strict=True)]
    assert max(errors) <= BF16_OUTPUT_RMS, errors
    errors = [worst_state_error(x.detach(), y.detach()) for x, y in zip(got[1], exact[1], strict=True)]
    assert max(errors) <= BF16_STATE_RMS, errors


def test_a_projections_gradient_is_written_in_its_place_by_the_kernels(on_kernels):
    torch.manual_seed(3)
    qkv = torch.nn.functional.silu(torch.randn(150, 2, 3, 64)).bfloat16().requires_grad_()
    grad_o, slopes = torch.randn(150, 2, 64).bfloat16(), torch.tensor([0.05, 0.9])
    borders = torch.tensor([0, 5, 150], dtype=torch.int32)
    whole = lightning_of_projection(qkv, slopes, borders)
    parts = lightning_attention(*qkv.unbind(2), slopes, None, borders, output_state=False)[0]
    # also one that autograd expands from a single number, whose rows the kernels could not read
    for cotangent in (grad_o, torch.ones((), dtype=torch.bfloat16).expand_as(grad_o)):
        gradients = [torch.autograd.grad(o, qkv, cotangent, retain_graph=True)[0] for o in (whole, parts)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("reverse", [False, True])
def test_states_that_spans_leave_on_the_kernels_equal_the_chunked_ones(on_kernels, reverse):
    torch.manual_seed(1)
    _, k, v = operands(1300, 1, 64, 64)
    slopes, spans = torch.tensor([0.004]), ((3, 4), (10, 1210))
    got = leaving_states(k, v, slopes, spans, reverse)
    exact = chunked.leaving_states(k.double(), v.double(), slopes, spans, reverse)
    assert worst_state_error(got, exact) <= BF16_STATE_RMS


def test_a_decoded_token_on_the_kernels_matches_the_recurrence(on_kernels):
    torch.manual_seed(2)
    q, k, v = operands(4, 3, 64, 128)
    slopes, state = torch.tensor([0.0, 0.05, 8.0]), torch.randn(4, 3, 64, 128)
    each_alone = torch.arange(5)
    exact = recurrence(q.double(), k.double(), v.double(), slopes, state.double(), each_alone, False, 0.5)
    o = lightning_decode(q, k, v, slopes, state, 0.5)
    assert worst_head_error(o, exact[0]) <= BF16_OUTPUT_RMS
    assert worst_state_error(state, exact[1]) <= 1e-6
