"""The backward scans of all documents of a pack, into new tensors."""

from __future__ import annotations

import torch

from kernels_cuda.lightning.blocks import spans_of
from kernels_cuda.lightning.chunked import scan_backward_into, state_dtype_for


def lightning_scan_backward(
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
    """dq, dk, dv and the state at the end of the walk, [0, H, K, V] without output_state."""
    q, _, v = operands
    grads = tuple(torch.full(x.shape, float("nan"), dtype=x.dtype) for x in operands)
    shape = (len(borders) - 1 if output_state else 0, *q.shape[1:], v.shape[2])
    last_state = torch.full(shape, float("nan"), dtype=state_dtype_for(q.dtype))
    scan_backward_into(
        (grads[0], grads[1], grads[2]),
        grad_o,
        lambda: later_state,
        operands,
        slopes,
        state_in,
        spans_of(borders),
        reverse,
        scale,
        last_state if output_state else None,
    )
    return grads[0], grads[1], grads[2], last_state
