"""Calls the CUDA kernels of lightning attention: when they can serve a call, and how tensors reach them.

Where a CUDA tensor cannot be served the chunked path takes over, and the reason is logged once.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch

from kernels_cuda import build
from kernels_cuda.lightning.blocks import Span
from kernels_cuda.lightning.chunked import LaterState
from kernels_cuda.lightning.plan import ScanPlan, plan_spans, plan_states

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
        reason = _refusal_of_layout(x.dtype, x.shape, x.stride(), x.data_ptr() % ALIGNMENT_BYTES)
        if reason is not None:
            return reason
    return None


@functools.lru_cache(maxsize=1024)
def _refusal_of_layout(
    dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], bytes_off_border: int
) -> str | None:
    """The same few layouts come with every layer, and the host has little time between two launches."""
    if dtype != torch.bfloat16:
        return f"operands are {dtype}, the kernels take torch.bfloat16"
    if shape[-1] not in HEAD_DIMS:
        return f"a head dim is {shape[-1]}, the kernels take {HEAD_DIMS}"
    if bytes_off_border or any(stride * dtype.itemsize % ALIGNMENT_BYTES for stride in strides[:-1]):
        return f"strides {strides} put rows off the 16-byte borders that the copy engine needs"
    if any(stride <= 0 for stride, count in zip(strides, shape, strict=True) if count > 1):
        return f"strides {strides} repeat rows, the copy engine reads distinct ones"
    return None


@functools.cache
def _announce(reason: str) -> None:
    logger.warning("lightning attention takes its chunked path on this GPU: %s", reason)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """A plan whose items are on the device."""

    plan: ScanPlan
    items: torch.Tensor
    state_items: torch.Tensor


@functools.lru_cache(maxsize=64)
def _planned(
    spans: tuple[Span, ...],
    num_tokens: int,
    num_heads: int,
    value_dim: int,
    device: torch.device,
    stream: int,
) -> tuple[DevicePlan, DevicePlan]:
    """The plans of a packed batch, forwards and backwards in time: the same for every layer.

    One copy that the host does not wait for; who asks on another stream gets a copy of its own.
    """
    blocks = _num_multiprocessors(device)
    plans = [
        plan_spans(spans, num_tokens, num_heads, value_dim, reverse, blocks) for reverse in (False, True)
    ]
    parts = [part for plan in plans for part in (plan.items, plan.state_items)]
    moved = torch.cat(parts).pin_memory().to(device, non_blocking=True)
    on_device = moved.split([len(part) for part in parts])
    return DevicePlan(plans[0], *on_device[:2]), DevicePlan(plans[1], *on_device[2:])


def _plan_for(spans: tuple[Span, ...], v: torch.Tensor, reverse: bool) -> DevicePlan:
    stream = torch.cuda.current_stream(v.device).cuda_stream
    return _planned(spans, v.shape[0], v.shape[1], v.shape[2], v.device, stream)[reverse]


def scan_into(
    o: torch.Tensor,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slopes: torch.Tensor,
    state_in: torch.Tensor | None,
    spans: tuple[Span, ...],
    reverse: bool,
    scale: float,
    state_out: torch.Tensor | None,
) -> None:
    """chunked.scan_into as one pass of the kernel; arguments checked and served (can_serve)."""
    q, k, v = operands
    with torch.cuda.device(q.device):
        plan = _plan_for(spans, v, reverse)
        state_shape = (plan.plan.num_slots, q.shape[1], q.shape[2], v.shape[2])
        workspace = q.new_empty(state_shape, dtype=torch.float32) if plan.plan.num_slots else None
        torch.ops.m1_sm90.lightning_scan(
            q,
            k,
            v,
            slopes.float(),
            state_in,
            plan.items,
            plan.state_items,
            plan.plan.segment_tokens,
            reverse,
            scale,
            _num_multiprocessors(q.device),
            o,
            state_out,
            workspace,
        )


def scan_backward_into(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grad_o: torch.Tensor,
    later_state: LaterState,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slopes: torch.Tensor,
    state_in: torch.Tensor | None,
    spans: tuple[Span, ...],
    reverse: bool,
    scale: float,
    last_state: torch.Tensor | None,
) -> None:
    """chunked.scan_backward_into as three passes of the forward kernel, on permuted operands and states."""
    q, k, v = operands
    grad_q, grad_k, grad_v = gradients
    earlier = None if state_in is None else state_in.transpose(2, 3)
    scan_into(grad_q, (grad_o, v, k), slopes, earlier, spans, reverse, scale, None)
    later = later_state()
    turned = None if later is None else later.transpose(2, 3)
    scan_into(grad_k, (v, grad_o, q), slopes, turned, spans, not reverse, scale, None)
    scan_into(grad_v, (k, q, grad_o), slopes, later, spans, not reverse, scale, last_state)


@functools.lru_cache(maxsize=64)
def _planned_states(
    spans: tuple[Span, ...], num_heads: int, value_dim: int, reverse: bool, device: torch.device, stream: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Items, and which segments make which span how far apart, on the device."""
    plan = plan_states(spans, num_heads, value_dim, reverse, _num_multiprocessors(device))
    items, owned, after = (
        x.pin_memory().to(device, non_blocking=True) for x in (plan.items, plan.owned_MS, plan.after_MS)
    )
    return items, owned, after


def leaving_states(
    k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, spans: tuple[Span, ...], reverse: bool
) -> torch.Tensor:
    """chunked.leaving_states as the kernel's prepass, which leaves out what is below 2^-25 of each head; segments of
    long spans are summed in fp32."""
    num_heads, key_dim, value_dim = k.shape[1], k.shape[2], v.shape[2]
    with torch.cuda.device(k.device):
        stream = torch.cuda.current_stream(k.device).cuda_stream
        items, owned_MS, after_MS = _planned_states(spans, num_heads, value_dim, reverse, k.device, stream)
        num_spans, num_slots = owned_MS.shape
        states_SHKV = k.new_empty(num_slots, num_heads, key_dim, value_dim, dtype=torch.float32)
        torch.ops.m1_sm90.lightning_states(
            k, v, slopes.float(), items, reverse, _num_multiprocessors(k.device), states_SHKV
        )
    if num_spans == num_slots:
        return states_SHKV
    weights_MSH = owned_MS[:, :, None] * torch.exp(-slopes.double() * after_MS[:, :, None])
    return torch.einsum("msh,shkv->mhkv", weights_MSH.float(), states_SHKV)


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, state: torch.Tensor, scale: float
) -> torch.Tensor:
    """One token per sequence, state [B, H, K, V] contiguous and updated in place; returns o [B, H, V]."""
    o = q.new_empty(v.shape)
    with torch.cuda.device(q.device):
        torch.ops.m1_sm90.lightning_decode(q, k, v, slopes.float(), state, scale, o)
    return o
