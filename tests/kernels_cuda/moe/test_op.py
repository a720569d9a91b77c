"""The MoE operators against the row-by-row definition, in values, gradients, dtypes and messages."""

import copy
from functools import partial

import pytest
import torch

from kernels_cuda.moe import reference
from kernels_cuda.moe.op import grouped_mlp, moe_permute, moe_route, moe_sort, moe_unpermute

# Relative RMS per tensor against float64; bf16 has 8 bits of mantissa and three roundings on the way.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def make_inputs(counts, width=24, ffn_width=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, num_experts = sum(counts), len(counts)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x_RD": normal(rows, width),
        "gate_up_E2FD": normal(num_experts, 2, ffn_width, width) / width**0.5,
        "down_EDF": normal(num_experts, width, ffn_width) / ffn_width**0.5,
        "rows_per_expert_E": torch.tensor(counts),
        "row_weights_R": torch.rand(rows, generator=generator, dtype=torch.float64).to(dtype),
    }


def moe_layer(x_TD, router_ED, gate_up_E2FD, down_EDF, top_k=2):
    weights_TK, experts_TK = moe_route(x_TD @ router_ED.T, top_k)
    pair_of_row_R, row_of_pair_TK, rows_per_expert_E = moe_sort(experts_TK, router_ED.shape[0])
    x_RD = moe_permute(x_TD, pair_of_row_R, row_of_pair_TK)
    y_RD = grouped_mlp(x_RD, gate_up_E2FD, down_EDF, rows_per_expert_E, weights_TK.flatten()[pair_of_row_R])
    return moe_unpermute(y_RD, pair_of_row_R, row_of_pair_TK)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", [[3, 0, 65, 1], [0, 0, 4], [7], [0, 0]])
def test_grouped_mlp_and_every_gradient_equal_the_reference(counts, dtype):
    inputs = make_inputs(counts, dtype=dtype)
    tensors = [inputs[name] for name in ("x_RD", "gate_up_E2FD", "down_EDF", "row_weights_R")]
    mine = [tensor.clone().requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    y_RD = grouped_mlp(mine[0], mine[1], mine[2], inputs["rows_per_expert_E"], mine[3])
    want_RD = reference.grouped_mlp_reference(exact[0], exact[1], exact[2], counts, exact[3])
    assert y_RD.dtype == dtype
    assert relative_rms(y_RD, want_RD) < TOLERANCE[dtype]
    if not sum(counts):
        return
    seed_RD = torch.randn(want_RD.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
        dtype
    )
    y_RD.backward(seed_RD)
    want_RD.backward(seed_RD.double())
    for name, got, want in zip(("x", "gate_up", "down", "row_weights"), mine, exact, strict=True):
        assert got.grad.dtype == dtype
        assert relative_rms(got.grad, want.grad) < TOLERANCE[dtype], name


def test_backward_allocates_no_gradient_of_the_saved_hidden_rows():
    """Autograd fills one with zeros for every output unless told not to: 2.4 GB at 64K rows of MiniMax-M1."""
    inputs = make_inputs([2, 3])
    inputs["gate_up_E2FD"].requires_grad_()
    y_RD = grouped_mlp(**inputs)
    with torch.profiler.profile(record_shapes=True) as profile:
        y_RD.backward(torch.ones_like(y_RD))
    zeroed = [
        list(shape)
        for event in profile.events()
        if event.name == "aten::zero_"
        for shape in event.input_shapes
    ]
    rows, ffn_width = 5, inputs["down_EDF"].shape[2]
    assert [rows, 2, ffn_width] not in zeroed
    assert list(inputs["gate_up_E2FD"].shape) in zeroed, "the profile shows no zeroing at all"


def test_experts_without_rows_get_a_zero_gradient():
    inputs = make_inputs([2, 0, 3])
    weight = inputs["gate_up_E2FD"].requires_grad_()
    grouped_mlp(**inputs).sum().backward()
    assert weight.grad[1].abs().max() == 0
    assert weight.grad[0].abs().min() > 0


def test_no_row_weights_means_weights_of_one():
    inputs = make_inputs([2, 3])
    ones = inputs | {"row_weights_R": torch.ones(5, dtype=torch.float64)}
    assert torch.equal(grouped_mlp(**inputs | {"row_weights_R": None}), grouped_mlp(**ones))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_buffers_accumulate_over_microbatches_in_fp32(dtype):
    inputs = make_inputs([40, 0, 60], dtype=dtype)
    names = ("gate_up_E2FD", "down_EDF")
    weights = {name: inputs[name].requires_grad_() for name in names}
    buffers = [torch.full(weights[name].shape, 0.5, dtype=torch.float32) for name in names]
    for _ in range(2):
        grouped_mlp(**inputs, gate_up_main_grad=buffers[0], down_main_grad=buffers[1]).sum().backward()
    assert all(weight.grad is None for weight in weights.values())
    exact = {
        key: value.detach().double() if value.is_floating_point() else value for key, value in inputs.items()
    }
    for name, buffer in zip(names, buffers, strict=True):
        exact[name].requires_grad_()
        exact_y = grouped_mlp(**exact)
        (want,) = torch.autograd.grad(exact_y.sum(), exact[name])
        # dtype rounding of the operands remains, rounding of the sums must not.
        assert relative_rms(buffer - 0.5, 2 * want) < TOLERANCE[dtype]


def test_a_bf16_main_grad_holds_more_than_bf16_digits():
    inputs = make_inputs([64], dtype=torch.bfloat16)
    buffer = torch.zeros(inputs["down_EDF"].shape)
    inputs["down_EDF"].requires_grad_()
    grouped_mlp(**inputs, down_main_grad=buffer).sum().backward()
    assert not torch.equal(buffer, buffer.bfloat16().float())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_whole_layer_equals_the_reference_and_passes_gradcheck(top_k):
    torch.manual_seed(3)
    inputs = make_inputs([1] * 4, width=5, ffn_width=3)
    x_TD, router_ED = torch.randn(7, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    arguments = (x_TD, router_ED, inputs["gate_up_E2FD"], inputs["down_EDF"])
    want_TD = reference.moe_layer_reference(*arguments, top_k=top_k)
    assert relative_rms(moe_layer(*arguments, top_k=top_k), want_TD) < 1e-13
    for tensor in arguments:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(partial(moe_layer, top_k=top_k), arguments)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_route_equals_the_reference_and_takes_the_lower_expert_on_ties(dtype):
    logits_TE = torch.randint(-2, 3, (50, 64), generator=torch.Generator().manual_seed(1)).to(dtype)
    weights_TK, experts_TK = moe_route(logits_TE, 2)
    want_weights, want_experts = reference.route_reference(logits_TE.double(), 2)
    assert torch.equal(experts_TK, want_experts)
    assert weights_TK.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(weights_TK.double(), want_weights, rtol=1e-6, atol=1e-7)
    assert moe_route(torch.zeros(1, 5, dtype=dtype), 3)[1].tolist() == [[0, 1, 2]]


def test_two_choices_are_the_sigmoid_of_the_difference():
    weights_TK, experts_TK = moe_route(torch.tensor([[0.0, 3.0, 1.0]]), 2)
    assert experts_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(weights_TK, torch.tensor([[0.880797, 0.119203]]), rtol=0, atol=1e-6)


def test_sort_is_stable_and_its_maps_are_inverse():
    experts_TK = torch.randint(0, 5, (40, 2), generator=torch.Generator().manual_seed(2))
    experts_TK[experts_TK == 3] = 4
    maps = moe_sort(experts_TK, 6)
    want = reference.sort_reference(experts_TK, 6)
    assert [part.tolist() for part in maps] == list(want)
    assert torch.equal(maps[1].flatten()[maps[0]], torch.arange(80))


def test_permute_and_unpermute_are_each_others_transpose():
    generator = torch.Generator().manual_seed(4)
    maps = moe_sort(torch.randint(0, 3, (11, 2), generator=generator), 3)[:2]
    x_TD = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    y_RD = torch.randn(22, 4, generator=generator, dtype=torch.float64)
    left, right = (moe_permute(x_TD, *maps) * y_RD).sum(), (x_TD * moe_unpermute(y_RD, *maps)).sum()
    torch.testing.assert_close(left, right, rtol=1e-13, atol=0)


def test_strided_rows_are_accepted():
    inputs = make_inputs([3, 2])
    wide_RD = torch.cat([inputs["x_RD"], inputs["x_RD"]], dim=1)
    strided = inputs | {"x_RD": wide_RD[:, 24:]}
    assert torch.equal(grouped_mlp(**strided), grouped_mlp(**inputs))


def sample_calls():
    inputs = make_inputs([3, 0, 2], dtype=torch.float32)
    for name in ("x_RD", "gate_up_E2FD", "down_EDF", "row_weights_R"):
        inputs[name].requires_grad_()
    maps = moe_sort(torch.tensor([[0, 2], [1, 0]]), 3)[:2]
    buffers = [torch.zeros_like(inputs[name]) for name in ("gate_up_E2FD", "down_EDF")]
    ops = torch.ops.m1
    d_y, hidden = torch.randn(5, 24), torch.randn(5, 2, 16)
    detached = [value.detach() for value in inputs.values()]
    return {
        "route": (ops.moe_route, (torch.randn(4, 3, requires_grad=True), 2)),
        "sort": (ops.moe_sort, (torch.tensor([[0, 2], [1, 0]]), 3)),
        "permute": (ops.moe_permute, (torch.randn(2, 4, requires_grad=True), *maps)),
        "unpermute": (ops.moe_unpermute, (torch.randn(4, 4, requires_grad=True), *maps)),
        "grouped_mlp": (ops.grouped_mlp, (*inputs.values(), None, None)),
        "grouped_mlp without weights": (ops.grouped_mlp, (*list(inputs.values())[:4], None, None, None)),
        "backward": (ops.grouped_mlp_backward, (d_y, detached[0], hidden, *detached[1:], None, None)),
        "backward into buffers": (
            ops.grouped_mlp_backward,
            (d_y, detached[0], hidden, *detached[1:], *buffers),
        ),
    }


@pytest.mark.parametrize("call", list(sample_calls()))
def test_schema_fake_kernel_and_autograd_agree(call):
    operator, arguments = sample_calls()[call]
    torch.library.opcheck(operator.default, arguments)


def test_two_runs_are_bit_equal():
    inputs = make_inputs([30, 2, 33], dtype=torch.float32)
    runs = []
    for _ in range(2):
        fresh = {key: copy.deepcopy(value) for key, value in inputs.items()}
        fresh["x_RD"].requires_grad_()
        y_RD = grouped_mlp(**fresh)
        y_RD.sum().backward()
        runs.append((y_RD.detach(), fresh["x_RD"].grad))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


BAD_CALLS = {
    "x_RD is .*float16": lambda i: grouped_mlp(**i | {"x_RD": i["x_RD"].half()}),
    "x_RD is strided": lambda i: grouped_mlp(**i | {"x_RD": i["x_RD"].t().contiguous().t()}),
    "gate_up_E2FD is .*shape .any, 2, any, 24": lambda i: grouped_mlp(**i | {"gate_up_E2FD": i["down_EDF"]}),
    "down_EDF is .*shape .2, 24, 16": lambda i: grouped_mlp(
        **i | {"down_EDF": i["down_EDF"].mT.contiguous()}
    ),
    "down_EDF is .*strides .*contiguous": lambda i: grouped_mlp(
        **i | {"down_EDF": i["down_EDF"].mT.contiguous().mT}
    ),
    "down_EDF is .*float32.*like x_RD": lambda i: grouped_mlp(**i | {"down_EDF": i["down_EDF"].float()}),
    "rows_per_expert_E is .*int32.*int64": lambda i: grouped_mlp(
        **i | {"rows_per_expert_E": i["rows_per_expert_E"].int()}
    ),
    "rows_per_expert_E sums to 6": lambda i: grouped_mlp(**i | {"rows_per_expert_E": torch.tensor([3, 3])}),
    "rows_per_expert_E sums to 5 .smallest -1": lambda i: grouped_mlp(
        **i | {"rows_per_expert_E": torch.tensor([6, -1])}
    ),
    "row_weights_R is .*one weight per row": lambda i: grouped_mlp(
        **i | {"row_weights_R": i["row_weights_R"][:3]}
    ),
    "gate_up_main_grad is .*float32": lambda i: grouped_mlp(
        **i, gate_up_main_grad=torch.zeros(2, 2, 16, 24).double()
    ),
    "top_k is 4: expected 1..3": lambda i: moe_route(torch.zeros(2, 3), 4),
    "experts_TK names expert 7": lambda i: moe_sort(torch.tensor([[7, 0]]), 4),
    "num_experts is 0": lambda i: moe_sort(torch.tensor([[7, 0]]), 0),
    "x_TD is .*another number of tokens": lambda i: moe_permute(
        torch.zeros(3, 4), torch.arange(4), torch.zeros(2, 2).long()
    ),
    "pair_of_row_R is .*shape .4": lambda i: moe_permute(
        torch.zeros(2, 4), torch.arange(3), torch.zeros(2, 2).long()
    ),
    "row_of_pair_TK is .*float32.*int64": lambda i: moe_unpermute(
        torch.zeros(4, 4), torch.arange(4), torch.zeros(2, 2)
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message](make_inputs([3, 2]))
