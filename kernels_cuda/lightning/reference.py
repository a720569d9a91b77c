"""The definition of lightning attention: one token after another, in any floating dtype.

Slow on purpose and independent of its neighbours: it shares no code and no constant with them.
    S_t = lambda S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t,   lambda = exp(-slope)
Legend: T packed tokens, N documents, H heads, K key dim, V value dim.
Source: MiniMax-M1 (arXiv 2506.13585) section 2; the recurrence of its published modelling code.
"""

from __future__ import annotations

import torch


def recurrence(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    v_THV: torch.Tensor,
    slopes_H: torch.Tensor,
    state_in_NHKV: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    reverse: bool = False,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence in the dtype of q; differentiable by plain autograd.

    cu_seqlens: int [N+1] borders of the documents, None for one document. reverse: time runs backwards
    within each document (o_t then sees tokens j >= t). Returns o [T, H, V] and the final states [N, H, K, V].
    """
    num_tokens, num_heads, key_dim = q_THK.shape
    borders = [0, num_tokens] if cu_seqlens is None else cu_seqlens.tolist()
    decay_H11 = torch.exp(-slopes_H.to(q_THK.dtype))[:, None, None]
    outputs: list[torch.Tensor | None] = [None] * num_tokens
    states = []
    for document, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        if state_in_NHKV is None:
            state_HKV = q_THK.new_zeros(num_heads, key_dim, v_THV.shape[-1])
        else:
            state_HKV = state_in_NHKV[document].to(q_THK.dtype)
        order = range(stop - 1, start - 1, -1) if reverse else range(start, stop)
        for token in order:
            outer_HKV = k_THK[token][:, :, None] * v_THV[token][:, None, :]
            state_HKV = decay_H11 * state_HKV + outer_HKV
            outputs[token] = scale * (state_HKV * q_THK[token][:, :, None]).sum(dim=1)
        states.append(state_HKV)
    written = [output for output in outputs if output is not None]
    o_THV = torch.stack(written) if written else q_THK.new_zeros(0, num_heads, v_THV.shape[-1])
    return o_THV, torch.stack(states)
