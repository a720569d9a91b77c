"""The MoE kernels' own source in the emulator: values against fp64, borders, determinism, planted faults."""

import ctypes

import pytest
import torch

from tests.kernels_cuda.moe import emulated
from tests.kernels_cuda.moe.faults import FAULTS, plant_faults

# bf16 operands and results, fp32 sums: relative RMS against fp64 of the same bf16 inputs.
RELATIVE_RMS = 5e-3
RELATIVE_RMS_FP32 = 1e-5

# rows per expert, width, ffn width: tails of rows, columns and depth; an empty expert; several tiles each way.
SHAPES = {
    "ragged": ([70, 0, 131, 1], 136, 72),
    "whole tiles": ([128, 256], 256, 256),
    "several column tiles": ([5, 64, 65], 328, 392),
    "pairs above and beside each other": ([460, 410], 72, 328),
    "one row": ([0, 0, 1], 64, 64),
    "empty ends": ([0, 129, 0], 72, 136),
    "more than one band of pairs": ([2400, 3], 72, 264),
}


@pytest.fixture(scope="module")
def kernels():
    return emulated.Kernels(emulated.compile_emulated())


def rms(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


class Problem:
    """Inputs of one grouped MLP in bf16 and what fp64 makes of them."""

    def __init__(self, counts: list[int], width: int, ffn_width: int) -> None:
        generator = torch.Generator().manual_seed(sum(counts) + width)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.counts, self.width, self.ffn_width = torch.tensor(counts), width, ffn_width
        self.rows, self.experts = sum(counts), len(counts)
        self.expert_of_row = torch.repeat_interleave(torch.arange(self.experts), self.counts)
        self.x = normal(self.rows, width).bfloat16()
        self.d_y = normal(self.rows, width).bfloat16()
        self.gate_up = (normal(self.experts, 2, ffn_width, width) / width**0.5).bfloat16()
        self.down = (normal(self.experts, width, ffn_width) / ffn_width**0.5).bfloat16()
        self.hidden = normal(self.rows, 2, ffn_width).bfloat16()
        self.row_weights = torch.rand(self.rows, generator=generator)

    def swiglu(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return hidden[:, 0] * torch.sigmoid(hidden[:, 0]) * hidden[:, 1] * weights[:, None]

    def times_weight(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Every row times the transpose of its expert's [N, K] matrix, in fp64."""
        groups = zip(rows.double().split(self.counts.tolist()), weight.double(), strict=True)
        return torch.cat([group @ matrix.T for group, matrix in groups])

    def per_expert(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        mine = [self.expert_of_row == expert for expert in range(self.experts)]
        return torch.stack([left.double()[rows].T @ right.double()[rows] for rows in mine])


@pytest.fixture(params=SHAPES, scope="module")
def problem(request):
    return Problem(*SHAPES[request.param])


def run_gate_up(kernels, p):
    hidden, act = kernels.gate_up(p.x, p.gate_up, p.counts, p.row_weights)
    want = p.times_weight(p.x, p.gate_up.flatten(1, 2)).view(p.rows, 2, p.ffn_width)
    return [(hidden, want), (act, p.swiglu(want, p.row_weights.double()))]


def run_product(kernels, p):
    out = kernels.product(p.hidden[:, 0].contiguous(), p.down, p.counts, transposed=False)
    return [(out, p.times_weight(p.hidden[:, 0], p.down))]


def run_product_transposed(kernels, p):
    weight = p.gate_up.view(p.experts, 2 * p.ffn_width, p.width)
    d_hidden = p.hidden.view(p.rows, -1)
    out = kernels.product(d_hidden, weight, p.counts, transposed=True)
    return [(out, p.times_weight(d_hidden, weight.mT))]


def run_down_backward(kernels, p):
    results = kernels.down_backward(p.d_y, p.down, p.hidden, p.counts, p.row_weights)
    hidden, weights = p.hidden.double().requires_grad_(), p.row_weights.double().requires_grad_()
    act = p.swiglu(hidden, weights)
    d_act = p.times_weight(p.d_y, p.down.mT)
    act.backward(d_act)
    return list(zip(results, (hidden.grad, act.detach(), weights.grad), strict=True))


def run_gradient_fp32(kernels, p):
    grad = torch.full((p.experts, 2 * p.ffn_width, p.width), 0.5)
    kernels.weight_gradient(p.hidden.view(p.rows, -1), p.x, p.counts, grad)
    return [(grad - 0.5, p.per_expert(p.hidden.view(p.rows, -1), p.x))]


def run_gradient_bf16(kernels, p):
    grad = emulated.poisoned(p.experts, p.width, p.ffn_width)
    act = p.hidden[:, 1].contiguous()
    kernels.weight_gradient(p.d_y, act, p.counts, grad)
    return [(grad, p.per_expert(p.d_y, act))]


RUNS = {
    "gate_up": run_gate_up,
    "product": run_product,
    "product transposed": run_product_transposed,
    "down backward": run_down_backward,
    "gradient fp32": run_gradient_fp32,
    "gradient bf16": run_gradient_bf16,
}


@pytest.mark.parametrize("run", RUNS)
def test_the_kernel_matches_fp64(kernels, problem, run):
    for got, want in RUNS[run](kernels, problem):
        # The fp32 gradient starts at 0.5, whose rounding is in the difference.
        assert rms(got, want) < (RELATIVE_RMS_FP32 if got.dtype == torch.float32 else RELATIVE_RMS)


def test_no_row_weights_means_ones_and_no_gradient_for_them(kernels):
    p = Problem([9, 70], 72, 72)
    ones = kernels.gate_up(p.x, p.gate_up, p.counts, torch.ones(p.rows))
    none = kernels.gate_up(p.x, p.gate_up, p.counts, None)
    assert all(torch.equal(*pair) for pair in zip(ones, none, strict=True))
    *_, d_weights = kernels.down_backward(p.d_y, p.down, p.hidden, p.counts, None)
    assert d_weights is None


def test_strided_rows_are_read_where_they_lie(kernels):
    p = Problem([9, 70], 72, 72)
    wide = torch.full((p.rows, 160), float("nan"), dtype=torch.bfloat16)
    wide[:, 8:80] = p.x
    strided = kernels.gate_up(wide[:, 8:80], p.gate_up, p.counts, p.row_weights)[0]
    assert torch.equal(strided, kernels.gate_up(p.x, p.gate_up, p.counts, p.row_weights)[0])


def test_an_expert_is_untouched_by_nan_in_its_neighbours(kernels):
    p = Problem([70, 3, 61], 72, 72)
    clean = run_gate_up(kernels, p)[0][0], run_gradient_fp32(kernels, p)[0][0]
    p.x[70:73] = float("nan")
    p.hidden[70:73] = float("nan")
    dirty = run_gate_up(kernels, p)[0][0], run_gradient_fp32(kernels, p)[0][0]
    others = torch.cat([torch.arange(70), torch.arange(73, 134)])
    assert torch.equal(clean[0][others], dirty[0][others])
    assert torch.equal(clean[1][[0, 2]], dirty[1][[0, 2]])
    assert dirty[1][1].isnan().all()


def test_results_do_not_depend_on_the_number_of_blocks(kernels, monkeypatch):
    p = Problem([70, 131], 136, 72)
    monkeypatch.setattr(emulated, "NUM_BLOCKS", 1)
    one = [got for run in RUNS.values() for got, _ in run(kernels, p)]
    monkeypatch.setattr(emulated, "NUM_BLOCKS", 5)
    five = [got for run in RUNS.values() for got, _ in run(kernels, p)]
    assert all(torch.equal(*pair) for pair in zip(one, five, strict=True))


def test_counts_beyond_the_rows_are_clamped(kernels):
    p = Problem([70, 31], 72, 72)
    want = kernels.gate_up(p.x, p.gate_up, p.counts, p.row_weights)[0]
    assert torch.equal(kernels.gate_up(p.x, p.gate_up, torch.tensor([70, 5000]), p.row_weights)[0], want)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    root = plant_faults(tmp_path_factory.mktemp("faults"))
    kernels = emulated.Kernels(emulated.compile_emulated(root))
    return kernels, ctypes.c_int.in_dll(kernels.library, "m1_fault")


def find_fault(kernels) -> str | None:
    """Return how the first wrong run shows, or None when all are right."""
    for shape in ("ragged", "pairs above and beside each other", "several column tiles"):
        p = Problem(*SHAPES[shape])
        for name, run in RUNS.items():
            try:
                results = run(kernels, p)
            except RuntimeError as error:
                return f"{name}: {error}"
            for got, want in results:
                limit = RELATIVE_RMS_FP32 if got.dtype == torch.float32 else RELATIVE_RMS
                if not rms(got, want) < limit:
                    return f"{name}: relative RMS {rms(got, want):.1e}"
    return None


def test_the_planted_copy_is_right_while_no_fault_is_active(faulty):
    assert find_fault(faulty[0]) is None


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=list(FAULTS))
def test_a_planted_fault_is_caught(faulty, number):
    kernels, switch = faulty
    switch.value = number
    try:
        found = find_fault(kernels)
    finally:
        switch.value = 0
    assert found is not None
    print(found)
