"""Planted faults: each changes one line of the kernel source, and the emulator or the comparison must notice.

`told` is a part of the emulator's message; None where the run ends and the numbers are wrong.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from kernels_cuda.bench.measure import worst_head_error, worst_state_error
from kernels_cuda.lightning.reference import recurrence
from tests.kernels_cuda.emulator.harness import (
    LIGHTNING,
    EmulatorFault,
    compile_kernel,
    emulate_scan,
    emulate_states,
)
from tests.tolerances import BF16_OUTPUT_RMS, BF16_STATE_RMS

TILES = LIGHTNING.parents[1] / "csrc" / "tile.cuh"
INCLUDE = '#include "tile.cuh"'

FAULTS = {
    "leading and stride offsets swapped": (
        "tile.cuh",
        "descriptor(tile + step * 16 * kRowBytes, kTileBytes, kSwizzlePeriodBytes)",
        "descriptor(tile + step * 16 * kRowBytes, kSwizzlePeriodBytes, kTileBytes)",
        None,
    ),
    "swizzle left out of the scores": ("tile.cuh", "((unit ^ (row & 7)) << 4)", "(unit << 4)", None),
    "scores not waited for": (
        "kernel",
        "barrier_wait(shared.scores_full(buffer), turn / kBuffers & 1);",
        "",
        "without a proxy fence",
    ),
    "loads not waited for": ("kernel", "barrier_wait(shared.full(stage), turn / kStages & 1);", "", None),
    "last wgmma wait missing": (
        "kernel",
        "wgmma_wait<0>();\n      sync_warp();\n      if (at.lane == 0) barrier_arrive(shared.empty(stage));\n    }",
        "sync_warp();\n      if (at.lane == 0) barrier_arrive(shared.empty(stage));\n    }",
        "operand changed",
    ),
    "output read before its wgmma": ("kernel", "wgmma_wait<1>();", "", None),
    "values' lane map transposed": (
        "kernel",
        "ldmatrix_x4_trans(plain[depth], tile + swizzled(row + 16 * uint32_t(depth), unit));",
        "ldmatrix_x4_trans(plain[depth], tile + swizzled(at.lane % 16 + 16 * depth, 2 * at.warp + at.lane / 16));",
        None,
    ),
    "stage never given back": (
        "kernel",
        "wgmma_wait<0>();\n      sync_warp();\n      if (at.lane == 0) barrier_arrive(shared.empty(stage));\n"
        "      barrier_wait",
        "wgmma_wait<0>();\n      barrier_wait",
        "deadlock",
    ),
    "scores announced twice": (
        "kernel",
        "if (at.lane == 0) barrier_arrive(shared.scores_full(buffer));",
        "if (at.lane <= 1) barrier_arrive(shared.scores_full(buffer));",
        "deadlock",
    ),
    "bytes of a load miscounted": (
        "kernel",
        "barrier_expect(shared.full(stage), kBytes);",
        "barrier_expect(shared.full(stage), kBytes + 128);",
        "deadlock",
    ),
    "entering state decays one step less": (
        "kernel",
        "entered = kReverse ? valid - token : token + 1",
        "entered = kReverse ? valid - token : token",
        None,
    ),
    "last chunk's keys weighted as in a whole one": (
        "kernel",
        "left = kReverse ? token : valid - 1 - token",
        "left = kReverse ? token : int(kChunk) - 1 - token",
        None,
    ),
    "scores see the next token": (
        "kernel",
        "factor[eights][odd] = distance < 0 ?",
        "factor[eights][odd] = distance < -1 ?",
        None,
    ),
    "rows past the end not zeroed": (
        "kernel",
        "zero_rows_from(shared.v(stage), valid, at.thread);",
        "",
        None,
    ),
    "prepass: keys past the end not zeroed": (
        "kernel",
        "!kOutput && tile < kKeyDim / kTileColumns",
        "tile < 0",
        None,
    ),
    "scores not fenced for the tensor cores": (
        "kernel",
        "fence_async_proxy();\n      sync_warp();\n      if (at.lane == 0) barrier_arrive(shared.scores_full(buffer));",
        "sync_warp();\n      if (at.lane == 0) barrier_arrive(shared.scores_full(buffer));",
        "without a proxy fence",
    ),
    "accumulator scaled after the wgmma fence": (
        "kernel",
        "wgmma_fence();\n      if (kOutput) {\n#pragma unroll\n        for (uint32_t depth = 0; depth < 4;",
        "wgmma_fence();\n      output[0] += 1;\n      if (kOutput) {\n#pragma unroll\n"
        "        for (uint32_t depth = 0; depth < 4;",
        "wgmma_fence and wgmma",
    ),
    "no fence before the entering state's product": (
        "kernel",
        "if (kOutput) {\n        wgmma_fence();",
        "if (kOutput) {",
        "without a wgmma_fence",
    ),
    "no fence before the scores' product": (
        "kernel",
        "float scores[32];\n      wgmma_fence();",
        "float scores[32];",
        "without a wgmma_fence",
    ),
    "a fragment written after the wgmma fence": (
        "kernel",
        "wgmma_fence();\n      if (kOutput) {\n#pragma unroll\n        for (uint32_t depth = 0; depth < 4;",
        "wgmma_fence();\n      plain[0][0] ^= 1;\n      if (kOutput) {\n#pragma unroll\n"
        "        for (uint32_t depth = 0; depth < 4;",
        "a fragment changed",
    ),
    "output buffer reused too early": (
        "kernel",
        "if (at.thread == 0) tma_store_wait_read<1>();",
        "",
        "was reading",
    ),
    "block ends with a store under way": (
        "kernel",
        "if (kOutput && at.thread == 0) tma_store_wait_read<0>();",
        "",
        "block ended",
    ),
}


def planted(where: str, right: str, wrong: str) -> str:
    """The kernel's text with one line changed; a changed tile.cuh is put in place of its include."""
    kernel, tiles = LIGHTNING.read_text(), TILES.read_text()
    if where == "kernel":
        assert right in kernel, right
        return kernel.replace(right, wrong)
    assert tiles.count(right) == 1, right
    return kernel.replace(INCLUDE, tiles.replace(right, wrong).replace("#pragma once", ""))


def worst_errors(library: ctypes.CDLL) -> tuple[float, float]:
    """Errors of o and of the states of two documents before one of NaN, those of the prepass alone added; head dim
    128, more chunks than stages."""
    torch.manual_seed(0)
    borders = (0, 65, 417, 481)
    slopes = torch.tensor([0.01, 0.9])
    qkv = torch.nn.functional.silu(torch.randn(481, 2, 384)).bfloat16()
    qkv[417:] = float("nan")
    q, k, v = qkv.split(128, dim=-1)
    o, states = emulate_scan(library, (q, k, v), slopes, None, borders)
    q64, k64, v64 = (x[:417].double() for x in (q, k, v))
    exact_o, exact_states = recurrence(q64, k64, v64, slopes, None, torch.tensor(borders[:3]))
    alone = emulate_states(library, k, v, slopes, ((0, 65), (65, 417)), False)
    state_errors = [worst_state_error(found, exact_states) for found in (states[:2], alone)]
    return worst_head_error(o[:417], exact_o), sum(state_errors)


def test_without_a_fault_the_same_run_is_right():
    o_error, state_error = worst_errors(compile_kernel(LIGHTNING))
    assert o_error <= BF16_OUTPUT_RMS
    assert state_error <= 2 * BF16_STATE_RMS


@pytest.mark.parametrize("name", FAULTS)
def test_the_planted_fault_is_caught(name):
    where, right, wrong, told = FAULTS[name]
    library = compile_kernel(LIGHTNING, planted(where, right, wrong))
    if told is not None:
        with pytest.raises(EmulatorFault, match=told):
            worst_errors(library)
        return
    try:
        errors = worst_errors(library)
    except EmulatorFault:
        return
    assert not (errors[0] <= BF16_OUTPUT_RMS and errors[1] <= 2 * BF16_STATE_RMS), errors
