"""Argument checks of the MoE operators, made before any launch and without reading device memory.

Every message says what, the value received, what is allowed, and what to do. Counts that live on a device are
not read back (that would stall it): the per-expert path checks them, the kernels clamp to the row count.
"""

import torch

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def refuse(name: str, received: object, allowed: str, advice: str) -> None:
    """Raise the four-part ValueError."""
    raise ValueError(f"{name} is {received}: expected {allowed}: {advice}")


def describe(tensor: torch.Tensor) -> str:
    """Return shape, dtype and device in a few words."""
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """Refuse a tensor whose shape differs from shape (None allows any size)."""
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(
        want not in (None, got) for want, got in zip(shape, sizes, strict=True)
    ):
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        refuse(name, describe(tensor), f"shape {wanted}", meaning)


def check_like(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Refuse a tensor whose dtype or device differs from other's."""
    if tensor.dtype != other.dtype or tensor.device != other.device:
        refuse(
            name,
            describe(tensor),
            f"{other.dtype} on {other.device} like {other_name}",
            "convert one of the two",
        )


def check_float(name: str, tensor: torch.Tensor) -> None:
    """Refuse dtypes the operators have no path for."""
    if tensor.dtype not in FLOAT_DTYPES:
        refuse(name, describe(tensor), "float32, float64 or bfloat16", "convert it before the call")


def check_integer(name: str, tensor: torch.Tensor) -> None:
    """Refuse anything but int64."""
    if tensor.dtype != torch.int64:
        refuse(name, describe(tensor), "int64", "convert it with .long()")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Refuse tensors with gaps or permuted axes."""
    if not tensor.is_contiguous():
        received = f"{describe(tensor)} with strides {tuple(tensor.stride())}"
        refuse(name, received, "a contiguous tensor", "call .contiguous() once, where the tensor is made")


def check_grouped_mlp(
    x_RD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    rows_per_expert_E: torch.Tensor,
    row_weights_R: torch.Tensor | None,
) -> None:
    """Check the tensors of grouped_mlp against each other."""
    check_float("x_RD", x_RD)
    check_shape("x_RD", x_RD, (None, None), "rows of tokens sorted by expert, [R, D]")
    if x_RD.shape[1] > 1 and x_RD.stride(1) != 1:
        refuse("x_RD", f"strided {tuple(x_RD.stride())}", "a last dim of stride 1", "call .contiguous()")
    rows, width = x_RD.shape
    check_shape(
        "gate_up_E2FD", gate_up_E2FD, (None, 2, None, width), "w1 (gate) and w3 (up) of each expert, stacked"
    )
    experts, _, ffn_width, _ = gate_up_E2FD.shape
    check_shape("down_EDF", down_EDF, (experts, width, ffn_width), "w2 of each expert, stacked")
    check_shape(
        "rows_per_expert_E", rows_per_expert_E, (experts,), "one count per expert, as moe_sort returns"
    )
    check_integer("rows_per_expert_E", rows_per_expert_E)
    for name, weight in (("gate_up_E2FD", gate_up_E2FD), ("down_EDF", down_EDF)):
        check_like(name, weight, "x_RD", x_RD)
        check_contiguous(name, weight)
    if row_weights_R is not None:
        check_float("row_weights_R", row_weights_R)
        check_shape("row_weights_R", row_weights_R, (rows,), "one weight per row")
        if row_weights_R.device != x_RD.device:
            refuse(
                "row_weights_R",
                describe(row_weights_R),
                f"a tensor on {x_RD.device}",
                "move it to x_RD's device",
            )


def check_main_grad(name: str, main_grad: torch.Tensor | None, weight: torch.Tensor) -> None:
    """Check an fp32 buffer that weight gradients are added to."""
    if main_grad is None:
        return
    check_shape(name, main_grad, tuple(weight.shape), "the buffer has its weight's shape")
    check_contiguous(name, main_grad)
    if main_grad.dtype != torch.float32 or main_grad.device != weight.device:
        refuse(
            name,
            describe(main_grad),
            f"float32 on {weight.device}",
            "allocate the gradient buffer in float32 there",
        )


def check_route(logits_TE: torch.Tensor, top_k: int) -> None:
    """Check the logits and the number of choices."""
    check_float("logits_TE", logits_TE)
    check_shape("logits_TE", logits_TE, (None, None), "one row of expert logits per token, [T, E]")
    if not 1 <= top_k <= logits_TE.shape[1]:
        refuse(
            "top_k", top_k, f"1..{logits_TE.shape[1]}, the number of experts", "lower top_k or add experts"
        )


def check_row_map(
    name: str,
    tensor: torch.Tensor,
    rows: int | None,
    pair_of_row_R: torch.Tensor,
    row_of_pair_TK: torch.Tensor,
) -> None:
    """Check a tensor that is moved between tokens and rows, and the two maps of moe_sort."""
    check_float(name, tensor)
    check_shape(
        name, tensor, (rows, None), "the sort was made for another number of tokens, or is another layer's"
    )
    check_shape("row_of_pair_TK", row_of_pair_TK, (None, None), "the second output of moe_sort")
    check_shape(
        "pair_of_row_R", pair_of_row_R, (row_of_pair_TK.numel(),), "the first output of the same moe_sort"
    )
    for map_name, row_map in (("pair_of_row_R", pair_of_row_R), ("row_of_pair_TK", row_of_pair_TK)):
        check_integer(map_name, row_map)
        if row_map.device != tensor.device:
            refuse(map_name, describe(row_map), f"a tensor on {tensor.device}", f"move it to {name}'s device")
