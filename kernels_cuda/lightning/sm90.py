"""Calls the CUDA kernels of lightning attention: when they can serve a call, and how tensors reach them.

Where a CUDA tensor cannot be served the chunked path takes over, and the reason is logged once.
"""

from __future__ import annotations

import functools
import logging

import torch

from kernels_cuda import build
from kernels_cuda.lightning.plan import plan_scan

logger = logging.getLogger(__name__)

HEAD_DIMS = (64, 128)
ALIGNMENT_BYTES = 16


def can_serve(*operands: torch.Tensor) -> bool:
    """Whether the kernels take these CUDA operands: bf16, head dims 64 or 128, rows on 16-byte borders."""
    if operands[0].device.type != "cuda":
        return False
    reason = _refusal(operands)
    if reason is not None:
        _announce(reason)
        return False
    return build.load_library()


def _refusal(operands: tuple[torch.Tensor, ...]) -> str | None:
    for x in operands:
        if x.dtype != torch.bfloat16:
            return f"operands are {x.dtype}, the kernels take torch.bfloat16"
        if x.shape[-1] not in HEAD_DIMS:
            return f"a head dim is {x.shape[-1]}, the kernels take {HEAD_DIMS}"
        strides_bytes = [stride * x.element_size() for stride in x.stride()[:-1]]
        if x.data_ptr() % ALIGNMENT_BYTES or any(stride % ALIGNMENT_BYTES for stride in strides_bytes):
            return f"strides {x.stride()} put rows off the 16-byte borders that the copy engine needs"
        if any(stride <= 0 for stride, count in zip(x.stride(), x.shape, strict=True) if count > 1):
            return f"strides {x.stride()} repeat rows, the copy engine reads distinct ones"
    return None


@functools.cache
def _announce(reason: str) -> None:
    logger.warning("lightning attention takes its chunked path on this GPU: %s", reason)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=64)
def _planned(borders: tuple[int, ...], num_heads: int, value_dim: int, reverse: bool, device: torch.device):
    """The plan of a packed batch and its items on the device: the same for every layer."""
    plan = plan_scan(borders, num_heads, value_dim, reverse, _num_multiprocessors(device))
    return plan, plan.items.to(device), plan.state_items.to(device)


def scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state_in: torch.Tensor | None,
    borders: tuple[int, ...],
    reverse: bool,
    scale: float,
    output_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """chunked.lightning_scan on the kernels; arguments checked and served (can_serve)."""
    num_tokens, num_heads, key_dim = q.shape
    value_dim = v.shape[2]
    plan, items, state_items = _planned(borders, num_heads, value_dim, reverse, q.device)
    state_shape = (num_heads, key_dim, value_dim)
    num_states = len(borders) - 1 if output_state else 0
    o = q.new_empty(num_tokens, num_heads, value_dim)
    state_out = q.new_empty(num_states, *state_shape, dtype=torch.float32)
    workspace = q.new_empty(plan.num_slots, *state_shape, dtype=torch.float32) if plan.num_slots else None
    with torch.cuda.device(q.device):
        torch.ops.m1_sm90.lightning_scan(
            q,
            k,
            v,
            slopes.float(),
            state_in,
            items,
            state_items,
            plan.segment_tokens,
            reverse,
            scale,
            _num_multiprocessors(q.device),
            o,
            state_out if output_state else None,
            workspace,
        )
    return o, state_out


def scan_backward(
    grad_o: torch.Tensor,
    later_state: torch.Tensor | None,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slopes: torch.Tensor,
    state_in: torch.Tensor | None,
    borders: tuple[int, ...],
    reverse: bool,
    scale: float,
    output_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """chunked.lightning_scan_backward as three calls of the forward kernel, on permuted operands and states."""
    q, k, v = operands
    earlier, later = (None if state is None else state.transpose(2, 3) for state in (state_in, later_state))
    grad_q, _ = scan(grad_o, v, k, slopes, earlier, borders, reverse, scale, False)
    grad_k, _ = scan(v, grad_o, q, slopes, later, borders, not reverse, scale, False)
    grad_v, last_state = scan(k, q, grad_o, slopes, later_state, borders, not reverse, scale, output_state)
    return grad_q, grad_k, grad_v, last_state


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, state: torch.Tensor, scale: float
) -> torch.Tensor:
    """One token per sequence, state [B, H, K, V] contiguous and updated in place; returns o [B, H, V]."""
    o = q.new_empty(v.shape)
    with torch.cuda.device(q.device):
        torch.ops.m1_sm90.lightning_decode(q, k, v, slopes.float(), state, scale, o)
    return o
