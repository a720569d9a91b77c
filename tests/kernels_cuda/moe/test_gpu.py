"""The MoE operators on a Hopper GPU against fp64: the checks of bench/moe.py."""

import pytest

from kernels_cuda import build
from kernels_cuda.bench import moe


@pytest.mark.gpu
def test_every_result_on_this_gpu_matches_fp64_and_repeats_bit_for_bit():
    assert build.load_library(), build.why_not()
    rows = moe.correctness()
    assert [row for row in rows if not row["passed"]] == []
