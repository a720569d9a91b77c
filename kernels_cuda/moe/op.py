"""The MoE operators m1::moe_route, moe_sort, moe_permute, moe_unpermute and grouped_mlp: schema, fakes,
autograd.

Arguments are checked here; sm90.py does the work on a Hopper GPU, routing.py and experts.py anywhere else.
Gradients are operators too, so torch.compile sees no Python. Legend: T tokens, K choices per token, R rows
(token-expert pairs sorted by expert), D width, F ffn width, E experts.
"""

import torch

from kernels_cuda.gradients import register_gradient
from kernels_cuda.moe import checks, experts, routing, sm90

_library = torch.library.Library("m1", "FRAGMENT")
_library.define("moe_route(Tensor logits, int top_k) -> (Tensor weights, Tensor experts)")
_library.define(
    "moe_route_backward(Tensor d_weights, Tensor weights, Tensor experts, int num_experts) -> Tensor"
)
_library.define("moe_sort(Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor)")
_library.define("moe_permute(Tensor x, Tensor pair_of_row, Tensor row_of_pair) -> Tensor")
_library.define("moe_unpermute(Tensor y, Tensor pair_of_row, Tensor row_of_pair) -> Tensor")
_library.define(
    "grouped_mlp(Tensor x, Tensor gate_up, Tensor down, Tensor rows_per_expert, Tensor? row_weights, "
    "Tensor? gate_up_main_grad, Tensor? down_main_grad) -> (Tensor y, Tensor hidden)"
)
_library.define(
    "grouped_mlp_backward(Tensor d_y, Tensor x, Tensor hidden, Tensor gate_up, Tensor down, "
    "Tensor rows_per_expert, Tensor? row_weights, Tensor(a!)? gate_up_main_grad, Tensor(b!)? down_main_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def moe_route(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose top_k experts per token; weights are the softmax over the chosen logits.

    logits_TE: [T, E] fp32, fp64 or bf16. Returns weights [T, top_k] (fp32, fp64 for fp64 logits;
    differentiable) and experts [T, top_k] int64, largest logit first, lower expert first on ties. Raises
    ValueError on a wrong dtype, shape or top_k. Source: MiniMax-01 (arXiv 2501.08313), section 2.1.
    """
    checks.check_route(logits_TE, top_k)
    return torch.ops.m1.moe_route(logits_TE, top_k)


def moe_sort(experts_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the T * K token-expert pairs by expert, stably (token order inside an expert).

    experts_TK: [T, K] int64 in 0..num_experts-1. Returns pair_of_row [R] int64 (pair = token * K + choice),
    row_of_pair [T, K] int64 and rows_per_expert [E] int64. Raises ValueError on a wrong dtype, shape or
    expert.
    """
    checks.check_shape("experts_TK", experts_TK, (None, None), "the second output of moe_route")
    checks.check_integer("experts_TK", experts_TK)
    if num_experts < 1:
        checks.refuse("num_experts", num_experts, "at least 1", "pass the number of experts of the layer")
    return torch.ops.m1.moe_sort(experts_TK, num_experts)


def moe_permute(
    x_TD: torch.Tensor, pair_of_row_R: torch.Tensor, row_of_pair_TK: torch.Tensor
) -> torch.Tensor:
    """Copy every token to its K rows: returns [R, D] sorted by expert.

    x_TD: [T, D] fp32, fp64 or bf16; the maps come from moe_sort. Raises ValueError where they do not fit
    together.
    """
    checks.check_row_map("x_TD", x_TD, row_of_pair_TK.shape[0], pair_of_row_R, row_of_pair_TK)
    return torch.ops.m1.moe_permute(x_TD, pair_of_row_R, row_of_pair_TK)


def moe_unpermute(
    y_RD: torch.Tensor, pair_of_row_R: torch.Tensor, row_of_pair_TK: torch.Tensor
) -> torch.Tensor:
    """Sum the K rows of every token (already weighted) in fp32, in the order of its choices: returns [T, D].

    y_RD: [R, D] fp32, fp64 or bf16; the maps come from moe_sort. Raises ValueError where they do not fit
    together.
    """
    checks.check_row_map("y_RD", y_RD, pair_of_row_R.shape[0], pair_of_row_R, row_of_pair_TK)
    return torch.ops.m1.moe_unpermute(y_RD, pair_of_row_R, row_of_pair_TK)


def grouped_mlp(
    x_RD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    rows_per_expert_E: torch.Tensor,
    row_weights_R: torch.Tensor | None = None,
    gate_up_main_grad: torch.Tensor | None = None,
    down_main_grad: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply each row's expert: y = (silu(x W_gate^T) * (x W_up^T) [* weight]) W_down^T.

    x_RD [R, D] fp32, fp64 or bf16, rows sorted by expert; gate_up_E2FD [E, 2, F, D] (0 gate = w1, 1 up = w3)
    and down_EDF [E, D, F] (w2), contiguous, x's dtype; rows_per_expert_E [E] int64 on the CPU or on x's
    device, summing to R; row_weights_R [R] or None. Returns y [R, D] in x's dtype. Gradients flow to x, both
    weights and row_weights. With an fp32 main_grad buffer (the weight's shape) backward adds the weight
    gradient to it and autograd receives none for that weight. Raises ValueError on shapes, dtypes, devices or
    strides that do not fit. Source: MiniMax-01 (arXiv 2501.08313), section 2.1; backward without Y: SonicMoE
    (arXiv 2512.14080).
    """
    checks.check_grouped_mlp(x_RD, gate_up_E2FD, down_EDF, rows_per_expert_E, row_weights_R)
    checks.check_main_grad("gate_up_main_grad", gate_up_main_grad, gate_up_E2FD)
    checks.check_main_grad("down_main_grad", down_main_grad, down_EDF)
    buffers = (gate_up_main_grad, down_main_grad)
    return torch.ops.m1.grouped_mlp(x_RD, gate_up_E2FD, down_EDF, rows_per_expert_E, row_weights_R, *buffers)[
        0
    ]


def _route(logits, top_k):
    path = sm90 if sm90.serves_route(logits) else routing
    return path.route(logits, top_k)


def _sort(experts_TK, num_experts):
    path = sm90 if sm90.serves_sort(experts_TK, num_experts) else routing
    return path.sort_by_expert(experts_TK, num_experts)


def _permute(x, pair_of_row, row_of_pair):
    path = sm90 if sm90.serves_matrices(x) else routing
    return path.permute(x, pair_of_row, row_of_pair)


def _unpermute(y, pair_of_row, row_of_pair):
    path = sm90 if sm90.serves_matrices(y) else routing
    return path.unpermute(y, pair_of_row, row_of_pair)


def _grouped_mlp(x, gate_up, down, rows_per_expert, row_weights, gate_up_main_grad, down_main_grad):
    path = sm90 if sm90.serves_matrices(x, gate_up, down) else experts
    return path.grouped_forward(x, gate_up, down, rows_per_expert, row_weights)


def _grouped_mlp_backward(
    d_y, x, hidden, gate_up, down, rows_per_expert, row_weights, gate_up_main_grad, down_main_grad
):
    path = sm90 if sm90.serves_matrices(x, gate_up, down) else experts
    return path.grouped_backward(
        d_y, x, hidden, row_weights, rows_per_expert, (gate_up, gate_up_main_grad), (down, down_main_grad)
    )


for _name, _kernel in {
    "moe_route": _route,
    "moe_route_backward": routing.route_backward,
    "moe_sort": _sort,
    "moe_permute": _permute,
    "moe_unpermute": _unpermute,
    "grouped_mlp": _grouped_mlp,
    "grouped_mlp_backward": _grouped_mlp_backward,
}.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("m1::moe_route", lib=_library)
def _(logits, top_k):
    weights = logits.new_empty(logits.shape[0], top_k, dtype=experts.accumulation_dtype(logits.dtype))
    return weights, logits.new_empty(logits.shape[0], top_k, dtype=torch.int64)


@torch.library.register_fake("m1::moe_route_backward", lib=_library)
def _(d_weights, weights, experts_TK, num_experts):
    return weights.new_empty(weights.shape[0], num_experts)


@torch.library.register_fake("m1::moe_sort", lib=_library)
def _(experts_TK, num_experts):
    flat = experts_TK.new_empty(experts_TK.numel())
    return flat, experts_TK.new_empty(experts_TK.shape), experts_TK.new_empty(num_experts)


@torch.library.register_fake("m1::moe_permute", lib=_library)
def _(x, pair_of_row, row_of_pair):
    return x.new_empty(pair_of_row.shape[0], x.shape[1])


@torch.library.register_fake("m1::moe_unpermute", lib=_library)
def _(y, pair_of_row, row_of_pair):
    return y.new_empty(row_of_pair.shape[0], y.shape[1])


@torch.library.register_fake("m1::grouped_mlp", lib=_library)
def _(x, gate_up, down, rows_per_expert, row_weights, gate_up_main_grad, down_main_grad):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 2, gate_up.shape[2])


@torch.library.register_fake("m1::grouped_mlp_backward", lib=_library)
def _(d_y, x, hidden, gate_up, down, rows_per_expert, row_weights, gate_up_main_grad, down_main_grad):
    d_gate_up = gate_up.new_empty(gate_up.shape if gate_up_main_grad is None else (0,))
    d_down = down.new_empty(down.shape if down_main_grad is None else (0,))
    num_weights = 0 if row_weights is None else x.shape[0]
    d_weights = x.new_empty(num_weights, dtype=experts.accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), d_gate_up, d_down, d_weights


def _save_route(ctx, inputs, output):
    logits, _ = inputs
    ctx.save_for_backward(*output)
    ctx.num_experts, ctx.dtype = logits.shape[1], logits.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _route_backward(ctx, d_weights, _):
    return torch.ops.m1.moe_route_backward(d_weights, *ctx.saved_tensors, ctx.num_experts).to(ctx.dtype), None


def _save_maps(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _permute_backward(ctx, d_x_RD):
    return torch.ops.m1.moe_unpermute(d_x_RD, *ctx.saved_tensors), None, None


def _unpermute_backward(ctx, d_out_TD):
    return torch.ops.m1.moe_permute(d_out_TD, *ctx.saved_tensors), None, None


def _save_grouped_mlp(ctx, inputs, output):
    x, gate_up, down, rows_per_expert, row_weights, *main_grads = inputs
    _, hidden = output
    ctx.save_for_backward(x, hidden, gate_up, down, rows_per_expert, row_weights)
    # Buffers change between forward and backward by design: keep them out of the version check.
    ctx.main_grads = main_grads
    ctx.mark_non_differentiable(hidden)
    # Else autograd fills zeros the size of hidden for a gradient that nobody reads.
    ctx.set_materialize_grads(False)


def _grouped_mlp_autograd(ctx, d_y, _):
    row_weights = ctx.saved_tensors[-1]
    d_x, d_gate_up, d_down, d_weights = torch.ops.m1.grouped_mlp_backward(
        d_y, *ctx.saved_tensors, *ctx.main_grads
    )
    for_gate_up, for_down = (
        grad if main_grad is None else None
        for grad, main_grad in zip((d_gate_up, d_down), ctx.main_grads, strict=True)
    )
    return (
        d_x,
        for_gate_up,
        for_down,
        None,
        None if row_weights is None else d_weights.to(row_weights.dtype),
        None,
        None,
    )


register_gradient("m1::moe_route", _route_backward, _save_route)
register_gradient("m1::moe_permute", _permute_backward, _save_maps)
register_gradient("m1::moe_unpermute", _unpermute_backward, _save_maps)
register_gradient("m1::grouped_mlp", _grouped_mlp_autograd, _save_grouped_mlp)
