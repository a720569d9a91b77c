"""Lightning attention of an interleaved projection, whose gradient is written where it is needed.

Autograd would stack the gradients of q, k and v into that of the projection: three tensors read and written, half of
what the backward kernels move. Here each is written into its place. Everything else is op.py's.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels_cuda.lightning import check, op
from kernels_cuda.lightning.blocks import spans_of
from kernels_cuda.lightning.spans import scan_backward_into

torch.library.define(
    "m1::lightning_projection_backward",
    "(Tensor grad_o, Tensor qkv, Tensor slopes, Tensor? cu_seqlens) -> Tensor grad_qkv",
)


def lightning_of_projection(
    qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """op.lightning_attention of q, k and v that lie together per token and head, without states.

    qkv: [T, H, 3, D]; dtype, device and strides as of q in op.lightning_attention. slopes and cu_seqlens as there.
    Returns o [T, H, D], differentiable in qkv. Raises: ValueError naming the argument, before any launch.
    """
    if qkv.dim() != 4 or qkv.shape[2] != 3:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}: [T, H, 3, head_dim] is allowed, query, key and value of a head side by "
            "side; view the projection so"
        )
    return _OfProjection.apply(qkv, slopes, cu_seqlens)


class _OfProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: Any) -> torch.Tensor:
        ctx.save_for_backward(qkv, slopes, cu_seqlens)
        q, k, v = qkv.unbind(2)
        return op.lightning_attention(q, k, v, slopes, cu_seqlens=cu_seqlens, output_state=False)[0]

    @staticmethod
    def backward(ctx: Any, grad_o: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # autograd hands over expanded gradients (of a sum, say); the kernels read rows
        grad_qkv = torch.ops.m1.lightning_projection_backward(grad_o.contiguous(), *ctx.saved_tensors)
        return grad_qkv, None, None


@torch.library.impl("m1::lightning_projection_backward", "CompositeExplicitAutograd")
def _lightning_projection_backward(
    grad_o: torch.Tensor, qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    grad_qkv = qkv.new_empty(qkv.shape)
    spans = spans_of(check.checked_borders(cu_seqlens, qkv.shape[0]))
    gradients, operands = grad_qkv.unbind(2), qkv.unbind(2)
    scan_backward_into(gradients, grad_o, lambda: None, operands, slopes, None, spans)  # type: ignore[arg-type]
    return grad_qkv


@torch.library.register_fake("m1::lightning_projection_backward")
def _lightning_projection_backward_fake(
    grad_o: torch.Tensor, qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)
