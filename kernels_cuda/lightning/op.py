"""The ops m1::lightning_attention and m1::lightning_decode: checks, schemas, fake kernels, autograd, dispatch.

Backward is the forward operator on permuted operands, so it runs on the same kernels. With
LA+(a, b, c; X)_i = sum_{j<=i} lambda^(i-j) (a_i . b_j) c_j + lambda^(i+1) X^T a_i and LA- on reversed time:
    dq = LA+(dO, v, k; S_in^T)   dk = LA-(v, dO, q; G^T/lambda)   dv = LA-(k, q, dO; G/lambda) -> R, dS_in = lambda R
where G is the gradient of state_out. Source: MiniMax-01 (arXiv 2501.08313) section 2.2, differentiated.
"""

from __future__ import annotations

import torch

from kernels_cuda.gradients import register_gradient
from kernels_cuda.lightning import check, sm90
from kernels_cuda.lightning.blocks import spans_of
from kernels_cuda.lightning.chunked import state_dtype_for
from kernels_cuda.lightning.spans import scan_backward_into, scan_into

torch.library.define(
    "m1::lightning_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor slopes, Tensor? state_in=None, Tensor? cu_seqlens=None, "
    "bool reverse=False, float scale=1.0, bool output_state=True) -> (Tensor o, Tensor state_out)",
)
torch.library.define(
    "m1::lightning_attention_backward",
    "(Tensor grad_o, Tensor? grad_state, Tensor q, Tensor k, Tensor v, Tensor slopes, Tensor? state_in, "
    "Tensor? cu_seqlens, bool reverse, float scale, bool needs_state) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_state_in)",
)
torch.library.define(
    "m1::lightning_decode",
    "(Tensor q, Tensor k, Tensor v, Tensor slopes, Tensor(a!) state, float scale=1.0) -> Tensor o",
)


def lightning_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state_in: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    output_state: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = exp(-slope) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t, per head and per packed document.

    q, k: [T, H, K], v: [T, H, V], one of bf16, fp16, fp32, fp64, any strides with a contiguous last dim.
    slopes: fp32 [H], >= 0, no gradient. state_in: fp32 (fp64 for fp64 operands) [N, H, K, V] or None for zeros.
    cu_seqlens: int32 [N + 1] ascending from 0 to T, None for one document; do not change it in place between
    forward and backward. reverse: time runs backwards. output_state False saves the state's memory: state_out is
    then [0, H, K, V] and carries no gradient.
    Returns o [T, H, V] in the dtype of q and state_out [N, H, K, V]; differentiable in q, k, v and state_in.
    Raises: ValueError naming the argument, before any launch.
    """
    return torch.ops.m1.lightning_attention(
        q, k, v, slopes, state_in, cu_seqlens, reverse, scale, output_state
    )


def lightning_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor,
    scale: float = 1.0,
) -> torch.Tensor:
    """One token of each of B sequences: updates state in place, then reads it. No gradient.

    q, k: [B, H, K], v: [B, H, V]; state: fp32 (fp64 for fp64 operands) [B, H, K, V]. Returns o [B, H, V].
    """
    return torch.ops.m1.lightning_decode(q, k, v, slopes, state, scale)


def check_shapes(q, k, v, slopes, state_in, cu_seqlens) -> int:
    """Everything that needs no values; returns the number of documents."""
    check.check_operands(q, k, v, "[T, H, head_dim]")
    check.check_slopes_shape(slopes, q)
    check.check_borders_shape(cu_seqlens)
    num_documents = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    state_shape = (num_documents, q.shape[1], q.shape[2], v.shape[2])
    check.check_state("state_in", state_in, q, state_shape, state_dtype_for(q.dtype))
    return num_documents


@torch.library.impl("m1::lightning_attention", "CompositeExplicitAutograd")
def _lightning_attention(
    q, k, v, slopes, state_in=None, cu_seqlens=None, reverse=False, scale=1.0, output_state=True
):
    num_documents = check_shapes(q, k, v, slopes, state_in, cu_seqlens)
    check.check_scale(scale)
    check.check_slopes_values(slopes)
    spans = spans_of(check.checked_borders(cu_seqlens, q.shape[0]))
    o, state_out = q.new_empty(v.shape), _new_states(q, v, num_documents if output_state else 0)
    scan_into(o, (q, k, v), slopes, state_in, spans, reverse, scale, state_out if output_state else None)
    return o, state_out


def _new_states(q: torch.Tensor, v: torch.Tensor, num_states: int) -> torch.Tensor:
    state_shape = (num_states, q.shape[1], q.shape[2], v.shape[2])
    return q.new_empty(state_shape, dtype=state_dtype_for(q.dtype))


@torch.library.register_fake("m1::lightning_attention")
def _lightning_attention_fake(
    q, k, v, slopes, state_in=None, cu_seqlens=None, reverse=False, scale=1.0, output_state=True
):
    num_documents = check_shapes(q, k, v, slopes, state_in, cu_seqlens)
    return q.new_empty(v.shape), _new_states(q, v, num_documents if output_state else 0)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, slopes, state_in, cu_seqlens, ctx.reverse, ctx.scale, ctx.output_state = inputs
    ctx.save_for_backward(q, k, v, slopes, state_in, cu_seqlens)
    ctx.set_materialize_grads(False)
    if not ctx.output_state:
        ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_o: torch.Tensor | None, grad_state: torch.Tensor | None):
    saved = ctx.saved_tensors
    # Autograd hands over expanded gradients (of a sum, say); the kernels read rows.
    grad_o = saved[0].new_zeros(saved[2].shape) if grad_o is None else grad_o.contiguous()
    if not ctx.output_state:
        grad_state = None
    needs_state = ctx.needs_input_grad[4]
    grad_q, grad_k, grad_v, grad_state_in = torch.ops.m1.lightning_attention_backward(
        grad_o, grad_state, *saved, ctx.reverse, ctx.scale, needs_state
    )
    return grad_q, grad_k, grad_v, None, grad_state_in if needs_state else None, None, None, None, None


register_gradient("m1::lightning_attention", _backward, _setup_context)


@torch.library.impl("m1::lightning_attention_backward", "CompositeExplicitAutograd")
def _lightning_attention_backward(
    grad_o, grad_state, q, k, v, slopes, state_in, cu_seqlens, reverse, scale, needs_state
):
    spans = spans_of(check.checked_borders(cu_seqlens, q.shape[0]))
    later_state = None
    if grad_state is not None:
        growth_1H11 = torch.exp(slopes.to(grad_state.dtype))[None, :, None, None]
        later_state = grad_state * growth_1H11 / scale
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    last_state = _new_states(q, v, len(spans) if needs_state else 0)
    scan_backward_into(
        grads,
        grad_o,
        lambda: later_state,
        (q, k, v),
        slopes,
        state_in,
        spans,
        reverse,
        scale,
        last_state if needs_state else None,
    )
    if needs_state:
        decay_1H11 = torch.exp(-slopes.to(last_state.dtype))[None, :, None, None]
        last_state = scale * decay_1H11 * last_state
    return *grads, last_state


@torch.library.register_fake("m1::lightning_attention_backward")
def _lightning_attention_backward_fake(
    grad_o, grad_state, q, k, v, slopes, state_in, cu_seqlens, reverse, scale, needs_state
):
    num_documents = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    states = _new_states(q, v, num_documents if needs_state else 0)
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape), states


def _check_decode_shapes(q, k, v, slopes, state) -> None:
    check.check_operands(q, k, v, "[B, H, head_dim]")
    check.check_slopes_shape(slopes, q)
    state_shape = (*q.shape, v.shape[2])
    check.check_state("state", state, q, state_shape, state_dtype_for(q.dtype))
    if not state.is_contiguous():
        raise ValueError(
            f"state has strides {state.stride()}: a contiguous state is allowed, it is updated in place; keep it so"
        )


@torch.library.impl("m1::lightning_decode", "CompositeExplicitAutograd")
def _lightning_decode(q, k, v, slopes, state, scale=1.0):
    _check_decode_shapes(q, k, v, slopes, state)
    check.check_slopes_values(slopes)
    if sm90.can_serve(q, k, v):
        return sm90.decode(q, k, v, slopes, state, scale)
    state.mul_(torch.exp(-slopes.to(state.dtype))[:, None, None])
    state.addcmul_(k.to(state.dtype)[..., :, None], v.to(state.dtype)[..., None, :])
    o_BHV = torch.matmul(q.to(state.dtype)[..., None, :], state).squeeze(-2)
    return (scale * o_BHV).to(q.dtype)


@torch.library.register_fake("m1::lightning_decode")
def _lightning_decode_fake(q, k, v, slopes, state, scale=1.0):
    _check_decode_shapes(q, k, v, slopes, state)
    return q.new_empty(v.shape)
