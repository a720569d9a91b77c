"""Calls the CUDA kernels of the MoE operators: when they can serve a call, and how tensors reach them.

Every function takes the arguments of its namesake in routing.py or experts.py, which serve all other calls;
where a CUDA tensor cannot be served the reason is logged once. Shapes: launch.h beside this.
"""

import functools
import logging

import torch

from kernels_cuda import build

logger = logging.getLogger(__name__)

ALIGNMENT_ELEMENTS = 8
MAX_SORTED_EXPERTS = 1024
COLUMNS_PER_TILE = 256
SHARES_PER_TILE = 4
SORT_CHUNK_PAIRS = 512


def serves_matrices(*matrices: torch.Tensor) -> bool:
    """Whether the kernels take these tensors: on a Hopper GPU, bf16, last dim contiguous, 16-byte borders."""
    if matrices[0].device.type != "cuda" or matrices[0].shape[0] == 0:
        return False
    reason = next(filter(None, map(_refusal, matrices)), None)
    if reason is not None:
        _announce(reason)
        return False
    return build.load_library()


def serves_route(logits_TE: torch.Tensor) -> bool:
    """Whether the routing kernel takes these logits: fp32 on a Hopper GPU."""
    return (
        logits_TE.is_cuda
        and logits_TE.dtype == torch.float32
        and logits_TE.numel() > 0
        and build.load_library()
    )


def serves_sort(experts_TK: torch.Tensor, num_experts: int) -> bool:
    """Whether the sort kernels take these experts."""
    return (
        experts_TK.is_cuda
        and 0 < num_experts <= MAX_SORTED_EXPERTS
        and experts_TK.numel() > 0
        and build.load_library()
    )


def _refusal(matrix: torch.Tensor) -> str | None:
    if matrix.dtype != torch.bfloat16:
        return f"operands are {matrix.dtype}, the kernels take torch.bfloat16"
    if matrix.shape[-1] % ALIGNMENT_ELEMENTS or matrix.stride(-1) != 1:
        return f"a row has {matrix.shape[-1]} elements, the kernels take contiguous multiples of {ALIGNMENT_ELEMENTS}"
    off_border = any(stride % ALIGNMENT_ELEMENTS for stride in matrix.stride()[:-1])
    if off_border or matrix.data_ptr() % (2 * ALIGNMENT_ELEMENTS):
        return f"strides {matrix.stride()} put rows off the 16-byte borders that the copy engine needs"
    return None


@functools.cache
def _announce(reason: str) -> None:
    logger.warning("an MoE operator takes its PyTorch path on this GPU: %s", reason)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def schedule_on(device: torch.device) -> tuple[int, torch.Tensor]:
    """Multiprocessors, and the counters by which blocks take tiles; launches of one stream may share them."""
    return _num_multiprocessors(device), torch.empty(2, dtype=torch.int32, device=device)


def route(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights_TK = logits_TE.new_empty(logits_TE.shape[0], top_k)
    experts_TK = torch.empty_like(weights_TK, dtype=torch.int64)
    with torch.cuda.device(logits_TE.device):
        torch.ops.m1_sm90.moe_route(logits_TE.contiguous(), weights_TK, experts_TK)
    return weights_TK, experts_TK


def sort_by_expert(
    experts_TK: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pairs = experts_TK.numel()
    pair_of_row_R = experts_TK.new_empty(pairs)
    row_of_pair_TK = torch.empty_like(experts_TK, memory_format=torch.contiguous_format)
    rows_per_expert_E = experts_TK.new_empty(num_experts)
    num_chunks = -(-pairs // SORT_CHUNK_PAIRS)
    chunk_counts = experts_TK.new_empty(num_chunks, num_experts, dtype=torch.int32)
    with torch.cuda.device(experts_TK.device):
        torch.ops.m1_sm90.moe_sort(
            experts_TK.contiguous(), pair_of_row_R, row_of_pair_TK, rows_per_expert_E, chunk_counts
        )
    return pair_of_row_R, row_of_pair_TK, rows_per_expert_E


def permute(x_TD: torch.Tensor, pair_of_row_R: torch.Tensor, row_of_pair_TK: torch.Tensor) -> torch.Tensor:
    x_RD = x_TD.new_empty(pair_of_row_R.shape[0], x_TD.shape[1])
    with torch.cuda.device(x_TD.device):
        torch.ops.m1_sm90.moe_permute(
            x_TD.contiguous(), pair_of_row_R.contiguous(), row_of_pair_TK.shape[1], x_RD
        )
    return x_RD


def unpermute(y_RD: torch.Tensor, pair_of_row_R: torch.Tensor, row_of_pair_TK: torch.Tensor) -> torch.Tensor:
    out_TD = y_RD.new_empty(row_of_pair_TK.shape[0], y_RD.shape[1])
    with torch.cuda.device(y_RD.device):
        torch.ops.m1_sm90.moe_unpermute(
            y_RD.contiguous(), row_of_pair_TK.contiguous(), row_of_pair_TK.shape[1], out_TD
        )
    return out_TD


def grouped_forward(
    x_RD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    rows_per_expert_E: torch.Tensor,
    row_weights_R: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x_RD.shape
    ffn_width = gate_up_E2FD.shape[2]
    hidden_R2F = x_RD.new_empty(rows, 2, ffn_width)
    act_RF, y_RD = x_RD.new_empty(rows, ffn_width), x_RD.new_empty(rows, width)
    counts_E, weights_R = _on_device(x_RD, rows_per_expert_E, row_weights_R)
    scheduling = schedule_on(x_RD.device)
    with torch.cuda.device(x_RD.device):
        torch.ops.m1_sm90.grouped_gate_up(
            x_RD, gate_up_E2FD, counts_E, weights_R, *scheduling, hidden_R2F, act_RF
        )
        torch.ops.m1_sm90.grouped_product(act_RF, down_EDF, counts_E, False, *scheduling, y_RD)
    return y_RD, hidden_R2F


def grouped_backward(
    d_y_RD: torch.Tensor,
    x_RD: torch.Tensor,
    hidden_R2F: torch.Tensor,
    row_weights_R: torch.Tensor | None,
    rows_per_expert_E: torch.Tensor,
    gate_up: tuple[torch.Tensor, torch.Tensor | None],
    down: tuple[torch.Tensor, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (gate_up_E2FD, _), (down_EDF, _) = gate_up, down
    experts, _, ffn_width, width = gate_up_E2FD.shape
    rows = x_RD.shape[0]
    counts_E, weights_R = _on_device(x_RD, rows_per_expert_E, row_weights_R)
    scheduling = schedule_on(x_RD.device)
    d_y_RD = d_y_RD.contiguous()
    d_hidden_R2F, act_RF = torch.empty_like(hidden_R2F), x_RD.new_empty(rows, ffn_width)
    partials = d_weights_R = None
    if weights_R is not None:
        num_shares = SHARES_PER_TILE * -(-ffn_width // COLUMNS_PER_TILE)
        partials, d_weights_R = weights_R.new_empty(rows, num_shares), torch.empty_like(weights_R)
    d_x_RD = x_RD.new_empty(rows, width)
    with torch.cuda.device(x_RD.device):
        torch.ops.m1_sm90.grouped_down_backward(
            d_y_RD,
            down_EDF,
            hidden_R2F,
            counts_E,
            weights_R,
            *scheduling,
            d_hidden_R2F,
            act_RF,
            partials,
            d_weights_R,
        )
        d_hidden = d_hidden_R2F.view(rows, 2 * ffn_width)
        gate_up_rows = gate_up_E2FD.view(experts, 2 * ffn_width, width)
        torch.ops.m1_sm90.grouped_product(d_hidden, gate_up_rows, counts_E, True, *scheduling, d_x_RD)
        d_gate_up = _weight_gradient(d_hidden, x_RD, counts_E, scheduling, gate_up)
        d_down = _weight_gradient(d_y_RD, act_RF, counts_E, scheduling, down)
    return (
        d_x_RD,
        d_gate_up,
        d_down,
        x_RD.new_empty(0, dtype=torch.float32) if d_weights_R is None else d_weights_R,
    )


def _weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    counts_E: torch.Tensor,
    scheduling: tuple[int, torch.Tensor],
    weight_and_main_grad: tuple[torch.Tensor, torch.Tensor | None],
) -> torch.Tensor:
    """Add to the fp32 buffer and return an empty tensor, or return a new bf16 gradient."""
    weight, main_grad = weight_and_main_grad
    grad = torch.empty_like(weight) if main_grad is None else main_grad
    torch.ops.m1_sm90.grouped_weight_gradient(left, right, counts_E, main_grad is not None, *scheduling, grad)
    return grad if main_grad is None else weight.new_empty(0)


def _on_device(
    x_RD: torch.Tensor, rows_per_expert_E: torch.Tensor, row_weights_R: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Counts on x's device and weights in fp32, as the kernels read them."""
    counts_E = rows_per_expert_E.to(x_RD.device, non_blocking=True).contiguous()
    return counts_E, None if row_weights_R is None else row_weights_R.float().contiguous()
