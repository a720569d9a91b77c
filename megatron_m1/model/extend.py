"""Attention of both kinds for documents that continue cached sequences: decode and prefill in one microbatch.

    lightning:  decode S <- lambda S + k v^T, o = S^T q; longer documents run the training operator from the cached
                state
    softmax:    attention to the cached keys; a longer document's own part is the training kernel's, and the part over
                its past is merged by log-sum-exp
So a token's output is that of the whole sequence in one pass, to rounding.
Legend: T tokens, the first n of them decode steps, N documents, h and g heads and key/value heads, K and V channels.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from kernels_cuda.lightning.op import lightning_attention, lightning_decode
from megatron_m1.model.cache import extension_of
from megatron_m1.model.packed import Packed
from parallel.attention import attend, merge_keys


def extend_lightning(
    q_ThK: torch.Tensor,
    k_ThK: torch.Tensor,
    v_ThV: torch.Tensor,
    slopes_h: torch.Tensor,
    layer: int,
    packed: Packed,
) -> torch.Tensor:
    """Outputs [T, h, V] of one lightning layer; moves its cached states on."""
    extension = extension_of(packed)
    states = extension.cache.states(layer, q_ThK.shape[1], q_ThK.shape[2], v_ThV.shape[2])
    n = extension.num_single
    outputs = []
    if n:
        rows = extension.single_rows
        state_nhKV = states[rows]
        outputs.append(lightning_decode(q_ThK[:n], k_ThK[:n], v_ThV[:n], slopes_h, state_nhKV))
        if isinstance(rows, torch.Tensor):
            states[rows] = state_nhKV
    if n < len(extension.slots_N):
        rows = torch.tensor(extension.slots_N[n:], device=states.device)
        o_ThV, state_out = lightning_attention(
            q_ThK[n:], k_ThK[n:], v_ThV[n:], slopes_h, states[rows], packed.cu_seqlens[n:] - n
        )
        states[rows] = state_out
        outputs.append(o_ThV)
    return torch.cat(outputs)


def extend_softmax(
    q_ThK: torch.Tensor, k_TgK: torch.Tensor, v_TgK: torch.Tensor, layer: int, packed: Packed
) -> torch.Tensor:
    """Outputs [T, h, K] of one softmax layer; keeps its keys (rotated) and values."""
    extension = extension_of(packed)
    past = extension.cache.lengths
    keys, values = extension.cache.append(layer, k_TgK, v_TgK, packed)
    n = extension.num_single
    outputs = []
    if n:
        rows = extension.single_rows
        room = 1 + max(past[slot] for slot in extension.slots_N[:n])
        outputs.append(_attend_one(q_ThK[:n], keys[rows, :room], values[rows, :room], packed.positions_T[:n]))
    if n < len(extension.slots_N):
        borders = tuple(accumulate(packed.document_lengths[n:], initial=0))
        own = q_ThK[n:], k_TgK[n:].contiguous(), v_TgK[n:].contiguous()
        o_ThK, lse_Th = attend(*own, borders)
        for slot, start, stop in zip(extension.slots_N[n:], borders, borders[1:], strict=False):
            if past[slot]:
                over_past = attend(
                    own[0][start:stop], keys[slot, : past[slot]], values[slot, : past[slot]], None
                )
                o = o_ThK[start:stop].to(lse_Th.dtype)
                merge_keys(o, lse_Th[start:stop], *over_past)
                o_ThK[start:stop] = o
        outputs.append(o_ThK)
    return torch.cat(outputs)


def _attend_one(
    q_nhK: torch.Tensor, k_nCgK: torch.Tensor, v_nCgK: torch.Tensor, positions_n: torch.Tensor
) -> torch.Tensor:
    """One query per sequence, to the keys up to and with its own position."""
    seen_nC = torch.arange(k_nCgK.shape[1], device=q_nhK.device) <= positions_n[:, None]
    o_nh1K = torch.nn.functional.scaled_dot_product_attention(
        q_nhK[:, :, None],
        k_nCgK.transpose(1, 2),
        v_nCgK.transpose(1, 2),
        attn_mask=seen_nC[:, None, None],
        enable_gqa=True,
    )
    return o_nh1K.squeeze(2)
