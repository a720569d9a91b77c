"""Routing on any device: top-k with softmax over the chosen, the stable sort by expert, and the two row
moves.

Permute (copy each token to its rows) and unpermute (sum a token's rows) are each other's transpose. No
atomics and no unordered sum: two runs are bit-equal. Legend: T tokens, K choices per token, R = T * K rows, D
width, E experts.
"""

import torch

from kernels_cuda.moe.experts import accumulation_dtype


def route(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [T, K] (softmax over the chosen, fp32 or fp64) and experts [T, K] int64, largest first.

    Equal logits are taken in expert order. For K = 2 the weights are sigmoid(a - b) and its complement.
    """
    values, experts = torch.sort(
        logits_TE.to(accumulation_dtype(logits_TE.dtype)), dim=1, descending=True, stable=True
    )
    return torch.softmax(values[:, :top_k], dim=1), experts[:, :top_k].contiguous()


def route_backward(
    d_weights_TK: torch.Tensor, weights_TK: torch.Tensor, experts_TK: torch.Tensor, num_experts: int
):
    """Return d_logits [T, E] = w * (dw - <dw, w>) at the chosen experts, zero elsewhere."""
    weighted_TK = d_weights_TK * weights_TK
    d_chosen_TK = weighted_TK - weights_TK * weighted_TK.sum(1, keepdim=True)
    d_logits_TE = d_chosen_TK.new_zeros(d_chosen_TK.shape[0], num_experts)
    return d_logits_TE.scatter_(1, experts_TK, d_chosen_TK)


def sort_by_expert(
    experts_TK: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the pairs t * K + k by expert, stably.

    Returns pair_of_row [R] int64, row_of_pair [T, K] int64 (its inverse) and rows_per_expert [E] int64.
    """
    experts_R = experts_TK.flatten()
    rows_per_expert_E = torch.bincount(experts_R, minlength=num_experts)
    if rows_per_expert_E.shape[0] > num_experts:
        raise ValueError(
            f"experts_TK names expert {rows_per_expert_E.shape[0] - 1} but num_experts is {num_experts}: "
            f"every entry must lie in 0..{num_experts - 1}: pass the experts that moe_route returned"
        )
    pair_of_row_R = torch.sort(experts_R, stable=True).indices
    row_of_pair_R = torch.empty_like(pair_of_row_R)
    row_of_pair_R[pair_of_row_R] = torch.arange(pair_of_row_R.shape[0], device=experts_TK.device)
    return pair_of_row_R, row_of_pair_R.view_as(experts_TK), rows_per_expert_E


def permute(x_TD: torch.Tensor, pair_of_row_R: torch.Tensor, row_of_pair_TK: torch.Tensor) -> torch.Tensor:
    """Return x_RD with x_RD[r] = x_TD[pair_of_row[r] // K]."""
    return x_TD.index_select(0, pair_of_row_R // row_of_pair_TK.shape[1])


def unpermute(y_RD: torch.Tensor, pair_of_row_R: torch.Tensor, row_of_pair_TK: torch.Tensor) -> torch.Tensor:
    """Return out_TD with out[t] = y[row_of_pair[t, 0]] + y[row_of_pair[t, 1]] + ..., summed in fp32 in that
    order."""
    tokens, choices = row_of_pair_TK.shape
    total_TD = y_RD.new_zeros(tokens, y_RD.shape[1], dtype=accumulation_dtype(y_RD.dtype))
    for choice in range(choices):
        total_TD += y_RD.index_select(0, row_of_pair_TK[:, choice])
    return total_TD.to(y_RD.dtype)
