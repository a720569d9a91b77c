"""The grouped SwiGLU MLP with one matrix product per expert and per GEMM, on any device, in any float dtype.

The mathematics of the CUDA kernels with their rounding points, but for dA', which they keep in fp32: gate and
up are rounded to the activations' dtype and the activation is computed from the rounded values in fp32, so
backward recomputes exactly what forward used. Y is not saved: with dA' = W_down^T dY, the row weight's gradient
is <dA', A> (SonicMoE, arXiv 2512.14080). Checks, schema and autograd live in op.py.
Legend: R rows sorted by expert, D width, F ffn width, E experts.
"""

from collections.abc import Iterator

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums are kept in: fp64 for fp64 inputs (gradient checks), fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expert_slices(rows_per_expert_E: torch.Tensor, num_rows: int) -> Iterator[tuple[int, slice]]:
    """Yield (expert, slice of its rows) for every expert that has rows.

    Raises ValueError when a count is negative or the counts do not add up to num_rows.
    """
    counts = rows_per_expert_E.tolist()
    if any(count < 0 for count in counts) or sum(counts) != num_rows:
        raise ValueError(
            f"rows_per_expert_E sums to {sum(counts)} (smallest {min(counts, default=0)}) but x_RD has "
            f"{num_rows} rows: counts must be >= 0 and add up to the number of rows: "
            f"pass the counts that moe_sort returned for these rows"
        )
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def swiglu(hidden_R2F: torch.Tensor, row_weights_R: torch.Tensor | None) -> torch.Tensor:
    """Return silu(gate) * up [* weight] as [R, F] in hidden's dtype, computed in the accumulation dtype."""
    dtype = accumulation_dtype(hidden_R2F.dtype)
    act_RF = torch.nn.functional.silu(hidden_R2F[:, 0].to(dtype)).mul_(hidden_R2F[:, 1])
    if row_weights_R is not None:
        act_RF.mul_(row_weights_R.to(dtype).unsqueeze(1))
    return act_RF.to(hidden_R2F.dtype)


def swiglu_backward(
    d_act_RF: torch.Tensor, hidden_R2F: torch.Tensor, row_weights_R: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Differentiate swiglu given dA' = dL/d(weight * A) [R, F].

    Returns d_hidden [R, 2, F] and weight * A [R, F] in hidden's dtype, and d_row_weights [R] in the
    accumulation dtype (empty without weights).
    """
    dtype = accumulation_dtype(hidden_R2F.dtype)
    gate_RF, up_RF, d_act_RF = hidden_R2F[:, 0].to(dtype), hidden_R2F[:, 1].to(dtype), d_act_RF.to(dtype)
    silu_RF = torch.nn.functional.silu(gate_RF)
    act_RF = silu_RF * up_RF
    d_weights_R = act_RF.new_empty(0)
    if row_weights_R is not None:
        d_weights_R = torch.linalg.vecdot(d_act_RF, act_RF)
        weight_R1 = row_weights_R.to(dtype).unsqueeze(1)
        act_RF.mul_(weight_R1)
        d_act_RF = d_act_RF * weight_R1
    d_hidden_R2F = torch.empty_like(hidden_R2F, memory_format=torch.contiguous_format)
    d_hidden_R2F[:, 1] = silu_RF.mul_(d_act_RF)
    d_hidden_R2F[:, 0] = torch.ops.aten.silu_backward(up_RF * d_act_RF, gate_RF)
    return d_hidden_R2F, act_RF.to(hidden_R2F.dtype), d_weights_R


def grouped_forward(
    x_RD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    rows_per_expert_E: torch.Tensor,
    row_weights_R: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [R, D] and the pre-activations hidden [R, 2, F] (gate, up) that backward needs."""
    experts, _, ffn_width, width = gate_up_E2FD.shape
    rows = list(expert_slices(rows_per_expert_E, x_RD.shape[0]))
    gate_up = gate_up_E2FD.view(experts, 2 * ffn_width, width)
    hidden = x_RD.new_empty(x_RD.shape[0], 2 * ffn_width)
    for expert, mine in rows:
        torch.mm(x_RD[mine], gate_up[expert].t(), out=hidden[mine])
    hidden_R2F = hidden.view(-1, 2, ffn_width)
    act_RF = swiglu(hidden_R2F, row_weights_R)
    y_RD = torch.empty_like(x_RD, memory_format=torch.contiguous_format)
    for expert, mine in rows:
        torch.mm(act_RF[mine], down_EDF[expert].t(), out=y_RD[mine])
    return y_RD, hidden_R2F


class WeightGradient:
    """Gradient of one stack of expert weights: added to an fp32 buffer where one is given, else a new
    tensor."""

    def __init__(self, weight: torch.Tensor, main_grad: torch.Tensor | None) -> None:
        self.main_grad = main_grad
        self.new_grad = weight.new_empty(0) if main_grad is not None else torch.zeros_like(weight)

    def add(self, expert: int, d_out_rN: torch.Tensor, input_rM: torch.Tensor) -> None:
        """Add d_out^T input to the expert's [N, M] gradient."""
        if self.main_grad is None:
            grad = self.new_grad[expert].view(d_out_rN.shape[1], input_rM.shape[1])
            torch.mm(d_out_rN.t(), input_rM, out=grad)
        else:
            grad = self.main_grad[expert].view(d_out_rN.shape[1], input_rM.shape[1])
            # A product of bf16 matrices comes back rounded to bf16; in fp32 the products are exact.
            grad.addmm_(d_out_rN.to(grad.dtype).t(), input_rM.to(grad.dtype))


def grouped_backward(
    d_y_RD: torch.Tensor,
    x_RD: torch.Tensor,
    hidden_R2F: torch.Tensor,
    row_weights_R: torch.Tensor | None,
    rows_per_expert_E: torch.Tensor,
    gate_up: tuple[torch.Tensor, torch.Tensor | None],
    down: tuple[torch.Tensor, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, gate_up, down and row_weights; gate_up and down are (weight, fp32 buffer or
    None).

    Where a buffer is given the weight gradient is added to it and the returned one is empty.
    """
    (gate_up_E2FD, _), (down_EDF, _) = gate_up, down
    experts, _, ffn_width, width = gate_up_E2FD.shape
    rows = list(expert_slices(rows_per_expert_E, x_RD.shape[0]))
    d_act_RF = x_RD.new_empty(x_RD.shape[0], ffn_width)
    for expert, mine in rows:
        torch.mm(d_y_RD[mine], down_EDF[expert], out=d_act_RF[mine])
    d_hidden_R2F, act_RF, d_weights_R = swiglu_backward(d_act_RF, hidden_R2F, row_weights_R)
    d_hidden = d_hidden_R2F.view(-1, 2 * ffn_width)
    gate_up_rows = gate_up_E2FD.view(experts, 2 * ffn_width, width)
    d_x_RD = torch.empty_like(x_RD, memory_format=torch.contiguous_format)
    d_gate_up, d_down = WeightGradient(*gate_up), WeightGradient(*down)
    for expert, mine in rows:
        torch.mm(d_hidden[mine], gate_up_rows[expert], out=d_x_RD[mine])
        d_gate_up.add(expert, d_hidden[mine], x_RD[mine])
        d_down.add(expert, d_y_RD[mine], act_RF[mine])
    return d_x_RD, d_gate_up.new_grad, d_down.new_grad, d_weights_R
