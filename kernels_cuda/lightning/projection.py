"""Lightning attention of an interleaved projection, whose gradient is written where it is needed.

Autograd would stack the gradients of q, k and v into that of the projection: three tensors read and written, half of
what the backward kernels move. Here each is written into its place. On a CPU the forward keeps the decayed scores, 64
numbers per token and head, and the backward does one product of fifteen less; on a GPU memory is worth more, and the
kernel computes them again. Everything else is op.py's.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels_cuda.lightning import check, op
from kernels_cuda.lightning.blocks import CHUNK_TOKENS, spans_of
from kernels_cuda.lightning.spans import scan_backward_into, scan_into

torch.library.define(
    "m1::lightning_projection",
    "(Tensor qkv, Tensor slopes, Tensor? cu_seqlens, bool keep_scores) -> (Tensor o, Tensor scores)",
)
torch.library.define(
    "m1::lightning_projection_backward",
    "(Tensor grad_o, Tensor qkv, Tensor slopes, Tensor? cu_seqlens, Tensor scores) -> Tensor grad_qkv",
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
    # not in a forward that is only computed again later (activation checkpointing): it has no gradient enabled
    keep_scores = qkv.device.type == "cpu" and qkv.requires_grad and torch.is_grad_enabled()
    return _OfProjection.apply(qkv, slopes, cu_seqlens, keep_scores)


class _OfProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: Any, keep_scores: bool
    ) -> torch.Tensor:
        o, scores = torch.ops.m1.lightning_projection(qkv, slopes, cu_seqlens, keep_scores)
        ctx.save_for_backward(qkv, slopes, cu_seqlens, scores)
        return o

    @staticmethod
    def backward(ctx: Any, grad_o: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # autograd hands over expanded gradients (of a sum, say); the kernels read rows
        grad_qkv = torch.ops.m1.lightning_projection_backward(grad_o.contiguous(), *ctx.saved_tensors)
        return grad_qkv, None, None, None


def _check_shapes(qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    q, k, v = qkv.unbind(2)
    op.check_shapes(q, k, v, slopes, None, cu_seqlens)


def _new_results(qkv: torch.Tensor, keep_scores: bool) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, _, head_dim = qkv.shape
    o = qkv.new_empty(num_tokens, num_heads, head_dim)
    return o, qkv.new_empty(num_tokens if keep_scores else 0, num_heads, CHUNK_TOKENS)


@torch.library.impl("m1::lightning_projection", "CompositeExplicitAutograd")
def _lightning_projection(
    qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor | None, keep_scores: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_shapes(qkv, slopes, cu_seqlens)
    check.check_slopes_values(slopes)
    spans = spans_of(check.checked_borders(cu_seqlens, qkv.shape[0]))
    o, scores = _new_results(qkv, keep_scores)
    q, k, v = qkv.unbind(2)
    scan_into(o, (q, k, v), slopes, None, spans, scores=scores if keep_scores else None)
    return o, scores


@torch.library.register_fake("m1::lightning_projection")
def _lightning_projection_fake(
    qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor | None, keep_scores: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_shapes(qkv, slopes, cu_seqlens)
    return _new_results(qkv, keep_scores)


@torch.library.impl("m1::lightning_projection_backward", "CompositeExplicitAutograd")
def _lightning_projection_backward(
    grad_o: torch.Tensor,
    qkv: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scores: torch.Tensor,
) -> torch.Tensor:
    grad_qkv = qkv.new_empty(qkv.shape)
    spans = spans_of(check.checked_borders(cu_seqlens, qkv.shape[0]))
    scan_backward_into(
        grad_qkv.unbind(2),  # type: ignore[arg-type]
        grad_o,
        lambda: None,
        qkv.unbind(2),  # type: ignore[arg-type]
        slopes,
        None,
        spans,
        scores=scores if len(scores) else None,
    )
    return grad_qkv


@torch.library.register_fake("m1::lightning_projection_backward")
def _lightning_projection_backward_fake(
    grad_o: torch.Tensor,
    qkv: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scores: torch.Tensor,
) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)
