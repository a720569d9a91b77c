"""What lightning attention accepts: every argument is checked here before anything is launched.

Each message names the argument, the value received, what is allowed, and what to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

OPERAND_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class CheckedBorders:
    """Document borders on the host, and the version of the tensor they were read from."""

    version: int
    borders: tuple[int, ...]


# One packed batch passes the same cu_seqlens to every layer, forward and backward: on a GPU each read would
# stall the host, so a tensor is read once for as long as it lives unchanged.
_checked_borders = WeakTensorKeyDictionary()


def check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    """q and k alike, v beside them: same dtype, device and heads, last dimension contiguous."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: {layout} is allowed; view it so")
        if x.dtype not in OPERAND_DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}: {OPERAND_DTYPES} are allowed; convert it first")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}: one dtype and one device "
                "are allowed; convert them alike"
            )
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} but q has {tuple(q.shape)}: equal tokens and heads are "
                "allowed; split the projections alike"
            )
        if x.stride(2) != 1 and x.numel() > 0 and x.shape[2] > 1:
            raise ValueError(
                f"{name} has strides {x.stride()}: any strides with a contiguous last dimension (stride 1) are "
                "allowed; call .contiguous() or split along the last dimension"
            )
    if k.shape != q.shape:
        raise ValueError(
            f"k has head dim {k.shape[2]} but q has {q.shape[2]}: equal key dims are allowed; split them alike"
        )
    if q.shape[1] == 0 or q.shape[2] == 0 or v.shape[2] == 0:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and v {tuple(v.shape)}: at least one head and head dims of at least 1 "
            "are allowed; check the split of the heads over tensor-parallel ranks"
        )


def check_scale(scale: float) -> None:
    if not math.isfinite(scale) or scale == 0.0:
        raise ValueError(
            f"scale={scale} is not usable: a finite factor other than 0 is allowed (backward divides by it); pass 1.0, "
            "which is MiniMax-M1's"
        )


def check_slopes_shape(slopes: torch.Tensor, q: torch.Tensor) -> None:
    num_heads = q.shape[1]
    if slopes.dtype not in (torch.float32, torch.float64) or tuple(slopes.shape) != (num_heads,):
        raise ValueError(
            f"slopes is {slopes.dtype} of shape {tuple(slopes.shape)}: float32 (or float64) of shape "
            f"({num_heads},), one per head of q, is allowed; slice lightning_slopes() to this rank's heads"
        )
    if slopes.device != q.device:
        raise ValueError(
            f"slopes is on {slopes.device} but q is on {q.device}: one device is allowed; register slopes as a "
            "buffer so that it moves with the model"
        )
    if slopes.requires_grad:
        raise ValueError(
            "slopes requires a gradient: only constant slopes are allowed, none is computed; register it as a buffer"
        )


# Slopes are buffers that live as long as the model: each is read once, not once per call.
_checked_slopes = WeakTensorKeyDictionary()


def check_slopes_values(slopes: torch.Tensor) -> None:
    if _checked_slopes.get(slopes) == slopes._version:
        return
    if not bool(((slopes >= 0) & torch.isfinite(slopes)).all()):
        raise ValueError(
            f"slopes={slopes.tolist()} has a negative or non-finite entry: finite values >= 0 are allowed (the decay "
            "is exp(-slope)); pass lightning_slopes() without a sign change"
        )
    _checked_slopes[slopes] = slopes._version


def check_state(
    name: str, state: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if state is None:
        return
    if tuple(state.shape) != shape or state.dtype != dtype or state.device != like.device:
        raise ValueError(
            f"{name} is {state.dtype} of shape {tuple(state.shape)} on {state.device}: {dtype} of shape {shape} "
            f"(documents or sequences, heads, key dim, value dim) on {like.device} is allowed; create it so"
        )


def check_borders_shape(cu_seqlens: torch.Tensor | None) -> None:
    if cu_seqlens is None:
        return
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}: int32 of shape (documents + 1,) "
            "is allowed; pass the cumulative document lengths with the leading 0"
        )


def checked_borders(cu_seqlens: torch.Tensor | None, num_tokens: int) -> tuple[int, ...]:
    """Document borders as host integers: ascending from 0 to num_tokens. An empty document is allowed."""
    if cu_seqlens is None:
        return (0, num_tokens)
    known = _checked_borders.get(cu_seqlens)
    if known is None or known.version != cu_seqlens._version:
        borders = tuple(cu_seqlens.tolist())
        if borders[0] != 0 or any(b < a for a, b in zip(borders[:-1], borders[1:], strict=True)):
            raise ValueError(
                f"cu_seqlens={list(borders)} does not ascend from 0: 0 first and no border below the one before it "
                "are allowed; pass cumulative lengths, not lengths"
            )
        known = CheckedBorders(cu_seqlens._version, borders)
        _checked_borders[cu_seqlens] = known
    if known.borders[-1] != num_tokens:
        raise ValueError(
            f"cu_seqlens ends at {known.borders[-1]} but q has {num_tokens} tokens: a last border equal to the tokens "
            "is allowed; give padding at the end a document of its own"
        )
    return known.borders
