"""The definition of the MoE operators: one token, one expert, one row at a time, in the dtype of the inputs.

Slow on purpose and independent of its neighbours; gradients come from plain autograd. Run it in float64.
Legend: T tokens, K choices per token, R rows (token-expert pairs, sorted by expert), D width, F ffn width, E
experts. Follows MiniMax-01 (arXiv 2501.08313), section 2.1: top-2 routing, softmax over the chosen experts,
SwiGLU experts.
"""

import torch


def route_reference(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick the top_k largest logits of each token (lower expert first on ties) and softmax over them.

    logits_TE: [T, E] floating. Returns weights [T, top_k] in the logits' dtype and experts [T, top_k] int64.
    """
    weights, experts = [], []
    for logits_E in logits_TE:
        values = logits_E.tolist()
        chosen = sorted(range(len(values)), key=lambda expert: (-values[expert], expert))[:top_k]
        shifted = logits_E[chosen] - max(values[expert] for expert in chosen)
        weights.append(shifted.exp() / shifted.exp().sum())
        experts.append(chosen)
    return torch.stack(weights), torch.tensor(experts, dtype=torch.int64)


def sort_reference(
    experts_TK: torch.Tensor, num_experts: int
) -> tuple[list[int], list[list[int]], list[int]]:
    """List the pairs (token * K + choice) expert by expert, in token order inside an expert.

    Returns pair_of_row (R entries), row_of_pair (T lists of K) and rows_per_expert (E entries).
    """
    choices = experts_TK.shape[1]
    flat = experts_TK.flatten().tolist()
    pair_of_row: list[int] = []
    rows_per_expert: list[int] = []
    for expert in range(num_experts):
        mine = [pair for pair, chosen in enumerate(flat) if chosen == expert]
        pair_of_row.extend(mine)
        rows_per_expert.append(len(mine))
    row_of_pair = [
        [pair_of_row.index(token * choices + k) for k in range(choices)] for token in range(len(experts_TK))
    ]
    return pair_of_row, row_of_pair, rows_per_expert


def grouped_mlp_reference(
    x_RD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    rows_per_expert: list[int],
    row_weights_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply y = W_down (silu(W_gate x) * (W_up x)) * weight to every row with its own expert's weights.

    x_RD [R, D], gate_up_E2FD [E, 2, F, D] (0 gate, 1 up), down_EDF [E, D, F], row_weights_R [R] or None.
    Returns y [R, D].
    """
    rows = []
    row = 0
    for expert, count in enumerate(rows_per_expert):
        for _ in range(count):
            gate_F = (gate_up_E2FD[expert, 0] * x_RD[row]).sum(-1)
            up_F = (gate_up_E2FD[expert, 1] * x_RD[row]).sum(-1)
            hidden_F = gate_F / (1 + torch.exp(-gate_F)) * up_F
            y_D = (down_EDF[expert] * hidden_F).sum(-1)
            rows.append(y_D if row_weights_R is None else y_D * row_weights_R[row])
            row += 1
    return torch.stack(rows) if rows else x_RD.new_zeros(0, x_RD.shape[1])


def moe_layer_reference(
    x_TD: torch.Tensor,
    router_ED: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Compute sum_k w_tk expert_k(x_t) for every token, with no permutation at all. Returns [T, D]."""
    weights_TK, experts_TK = route_reference(x_TD @ router_ED.T, top_k)
    tokens = []
    for token in range(x_TD.shape[0]):
        total = torch.zeros_like(x_TD[token])
        for weight, expert in zip(weights_TK[token], experts_TK[token].tolist(), strict=True):
            chosen = slice(expert, expert + 1)
            total = total + weight * grouped_mlp_reference(
                x_TD[token : token + 1], gate_up_E2FD[chosen], down_EDF[chosen], [1]
            ).squeeze(0)
        tokens.append(total)
    return torch.stack(tokens)
