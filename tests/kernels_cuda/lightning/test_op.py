"""The ops: gradients, schema, fake kernels, compile, and every refused argument before anything runs."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda.lightning import projection
from kernels_cuda.lightning.op import lightning_attention, lightning_decode
from kernels_cuda.lightning.projection import lightning_of_projection
from kernels_cuda.lightning.reference import recurrence
from kernels_cuda.lightning.spans import scan_into

SLOPES = torch.tensor([0.3, 2.0])
BORDERS = torch.tensor([0, 5, 6, 6, 23], dtype=torch.int32)


def leaves(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((23, 2, 3), (23, 2, 3), (23, 2, 4), (4, 2, 3, 4))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_pass_gradcheck_through_outputs_and_states(reverse):
    def call(q, k, v, state_in):
        return lightning_attention(q, k, v, SLOPES, state_in, BORDERS, reverse, 0.7)

    assert torch.autograd.gradcheck(call, leaves())


def test_gradients_pass_gradcheck_without_states_and_borders():
    def call(q, k, v):
        return lightning_attention(q, k, v, SLOPES, output_state=False)[0]

    assert torch.autograd.gradcheck(call, leaves()[:3])


def test_gradients_over_several_chunks_equal_plain_autograd_of_the_recurrence():
    torch.manual_seed(1)
    exact = [torch.randn(150, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours = [x.detach().clone().requires_grad_() for x in exact]
    # An empty document before one that is cut into tiles: both start at token 71.
    borders = torch.tensor([0, 71, 71, 150], dtype=torch.int32)
    for inputs, function in ((exact, recurrence), (ours, lightning_attention)):
        o, state = function(inputs[0], inputs[1], inputs[2], SLOPES, None, borders)
        (o.square().sum() + state.sin().sum()).backward()
    for a, b in zip(ours, exact, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-10)


def test_a_gradient_of_the_state_alone_reaches_keys_and_values_only():
    q, k, v, state_in = leaves()
    lightning_attention(q, k, v, SLOPES, state_in, BORDERS)[1].sum().backward()
    assert q.grad.abs().max() == 0
    assert k.grad.abs().max() > 0
    assert state_in.grad[2].eq(1.0).all(), "the state of an empty document passes through"


def test_strided_views_of_the_projection_give_the_same_bits():
    torch.manual_seed(2)
    buffer = torch.randn(90, 2, 48)
    views = buffer.split(16, dim=-1)
    q, k, v = (x.contiguous() for x in views)
    assert torch.equal(lightning_attention(*views, SLOPES)[0], lightning_attention(q, k, v, SLOPES)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decode_token_by_token_equals_one_pass(dtype):
    torch.manual_seed(3)
    q, k, v = (torch.randn(3, 7, 2, 16, dtype=dtype) for _ in range(3))
    state = torch.zeros(3, 2, 16, 16, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    outputs = [lightning_decode(q[:, t], k[:, t], v[:, t], SLOPES, state, 0.5) for t in range(7)]
    packed = [x.flatten(0, 1).double() for x in (q, k, v)]
    borders = torch.arange(0, 22, 7)
    exact, exact_state = recurrence(packed[0], packed[1], packed[2], SLOPES, None, borders, False, 0.5)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(torch.stack(outputs, 1).flatten(0, 1).double(), exact, rtol=limit, atol=limit)
    assert torch.allclose(state.double(), exact_state, rtol=1e-5, atol=1e-5)


def test_schema_fake_kernels_and_autograd_registration_agree():
    q, k, v, state_in = leaves(torch.float32)
    torch.library.opcheck(torch.ops.m1.lightning_attention, (q, k, v, SLOPES, state_in.detach(), BORDERS))
    state = torch.randn(23, 2, 3, 4)
    torch.library.opcheck(torch.ops.m1.lightning_decode, (q.detach(), k.detach(), v.detach(), SLOPES, state))


def test_the_gradient_of_a_projection_is_the_three_gradients_in_their_places():
    torch.manual_seed(4)
    qkv = torch.randn(150, 2, 3, 8, requires_grad=True)
    borders, weight = torch.tensor([0, 5, 5, 150], dtype=torch.int32), torch.randn(150, 2, 8)
    results = []
    for attention in (
        lambda x: lightning_of_projection(x, SLOPES, borders),
        lambda x: lightning_attention(*x.unbind(2), SLOPES, None, borders, output_state=False)[0],
    ):
        o = attention(qkv)
        # a sum hands back an expanded gradient
        results.append((o, *torch.autograd.grad([(o * weight).sum() + o.sum()], [qkv])))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    operands = (qkv.detach(), SLOPES, borders)
    for keep_scores in (False, True):
        torch.library.opcheck(torch.ops.m1.lightning_projection, (*operands, keep_scores))
        scores = torch.ops.m1.lightning_projection(*operands, keep_scores)[1]
        torch.library.opcheck(torch.ops.m1.lightning_projection_backward, (weight, *operands, scores))
    with pytest.raises(ValueError, match=r"qkv has shape \(150, 3, 2, 8\): \[T, H, 3, head_dim\] is allowed"):
        lightning_of_projection(qkv.transpose(1, 2), SLOPES, borders)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("borders", [[0, 700], [0, 5, 5, 70, 200, 201, 263, 700], list(range(0, 701, 7))])
def test_scores_that_the_forward_kept_give_the_gradients_of_scores_computed_again(borders, dtype):
    torch.manual_seed(5)
    operands = (torch.randn(700, 2, 3, 64).to(dtype), SLOPES, torch.tensor(borders, dtype=torch.int32))
    grad_o = torch.randn(700, 2, 64).to(dtype)
    backward = torch.ops.m1.lightning_projection_backward
    (o, none), (o_kept, scores) = (
        torch.ops.m1.lightning_projection(*operands, keep) for keep in (False, True)
    )
    assert torch.equal(o, o_kept)
    assert none.shape == (0, 2, 64)
    again, kept = (backward(grad_o, *operands, x).double() for x in (none, scores))
    # the same sums, of products that a library may add in another order
    limit = {torch.float64: 1e-15, torch.float32: 1e-7, torch.bfloat16: 1e-3}[dtype]
    assert (kept - again).norm() <= limit * again.norm()
    zeroed = backward(grad_o, *operands, torch.zeros_like(scores)).double()
    assert torch.equal(zeroed[:, :, :2], kept[:, :, :2])
    assert not torch.allclose(zeroed[:, :, 2], kept[:, :, 2], atol=0.1), (
        "dv comes of the scores that are kept"
    )


def test_scores_are_kept_only_for_a_backward(monkeypatch):
    kept: list[bool] = []

    def spied(*arguments, scores: torch.Tensor | None) -> None:
        kept.append(scores is not None)
        scan_into(*arguments, scores=scores)

    monkeypatch.setattr(projection, "scan_into", spied)
    qkv = torch.randn(130, 2, 3, 8)
    lightning_of_projection(qkv, SLOPES)
    lightning_of_projection(qkv.requires_grad_(), SLOPES)
    # as the first pass under activation checkpointing
    with torch.no_grad():
        lightning_of_projection(qkv, SLOPES)
    assert kept == [False, True, False]


def test_meta_tensors_give_shapes_and_compile_keeps_the_gradient():
    q, k, v, _ = leaves(torch.float32)
    o, state = lightning_attention(
        q.to("meta"), k.to("meta"), v.to("meta"), SLOPES.to("meta"), None, BORDERS.to("meta")
    )
    assert o.shape == (23, 2, 4)
    assert state.shape == (4, 2, 3, 4)
    assert o.device.type == "meta"

    def loss(q, k, v):
        return lightning_attention(q, k, v, SLOPES, None, BORDERS, output_state=False)[0].square().sum()

    expected = torch.autograd.grad(loss(q, k, v), [q, k, v])
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(q, k, v), [q, k, v])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def changed(**replaced) -> dict:
    q, k, v, state_in = (x.detach() for x in leaves(torch.float32))
    return {"q": q, "k": k, "v": v, "slopes": SLOPES, "state_in": state_in, "cu_seqlens": BORDERS} | replaced


REFUSED = {
    "q has dtype torch.int32": lambda: changed(q=torch.ones(23, 2, 3, dtype=torch.int32)),
    "k is torch.float64 on cpu but q is torch.float32": lambda: changed(k=torch.ones(23, 2, 3).double()),
    "k is torch.float32 on meta but q is torch.float32 on cpu": lambda: changed(
        k=torch.ones(23, 2, 3).to("meta")
    ),
    "slopes is on meta but q is on cpu": lambda: changed(slopes=SLOPES.to("meta")),
    "state_in is torch.float32 .* on meta: .* on cpu is allowed": lambda: changed(
        state_in=torch.ones(4, 2, 3, 4).to("meta")
    ),
    "q has shape .23, 0, 3. .* at least one head": lambda: changed(
        **dict.fromkeys(("q", "k"), torch.ones(23, 0, 3)), v=torch.ones(23, 0, 4)
    ),
    "k has shape .22, 2, 3. but q has .23, 2, 3.": lambda: changed(k=torch.ones(22, 2, 3)),
    "k has head dim 5 but q has 3": lambda: changed(k=torch.ones(23, 2, 5)),
    "v has strides .* contiguous last dim": lambda: changed(v=torch.ones(23, 4, 2).transpose(1, 2)),
    "v has shape .23, 8.: .T, H, head_dim. is allowed": lambda: changed(v=torch.ones(23, 8)),
    "cu_seqlens=.0, 9, 5, 6, 23. does not ascend": lambda: changed(
        cu_seqlens=torch.tensor([0, 9, 5, 6, 23]).int()
    ),
    "cu_seqlens=.1, .* does not ascend from 0": lambda: changed(
        cu_seqlens=torch.tensor([1, 5, 6, 7, 23]).int()
    ),
    "cu_seqlens ends at 24 but q has 23 tokens": lambda: changed(
        cu_seqlens=torch.tensor([0, 5, 6, 7, 24]).int()
    ),
    "cu_seqlens is torch.float32": lambda: changed(cu_seqlens=BORDERS.float()),
    "slopes=.* negative or non-finite entry": lambda: changed(slopes=-SLOPES),
    "slopes is torch.float32 of shape .3,.": lambda: changed(slopes=torch.ones(3)),
    "slopes is torch.bfloat16": lambda: changed(slopes=SLOPES.bfloat16()),
    "slopes requires a gradient": lambda: changed(slopes=SLOPES.clone().requires_grad_()),
    "state_in is torch.float32 of shape .3, 2, 3, 4.": lambda: changed(state_in=torch.ones(3, 2, 3, 4)),
    "state_in is torch.float64": lambda: changed(state_in=torch.ones(4, 2, 3, 4).double()),
    "scale=0.0 is not usable": lambda: changed(scale=0.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_bad_argument_is_named_before_anything_runs(message, monkeypatch):
    def never(*_):
        raise AssertionError("launched")

    monkeypatch.setattr("kernels_cuda.lightning.op.scan_into", never)
    with pytest.raises(ValueError, match=message):
        lightning_attention(**REFUSED[message]())


def test_cu_seqlens_are_read_once_until_they_change(monkeypatch):
    q, k, v, _ = (x.detach() for x in leaves(torch.float32))
    borders = torch.tensor([0, 5, 23], dtype=torch.int32)
    before, _ = lightning_attention(q, k, v, SLOPES, None, borders)
    borders[1] = 9
    after, _ = lightning_attention(q, k, v, SLOPES, None, borders)
    assert not torch.equal(before[5:9], after[5:9])
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("read again"))
        lightning_attention(q, k, v, SLOPES, None, borders)


def test_decode_refuses_a_state_of_another_shape_or_stride():
    q = torch.ones(2, 2, 4)
    with pytest.raises(ValueError, match="state is torch.float32 of shape .2, 2, 4, 5."):
        lightning_decode(q, q, q, SLOPES, torch.zeros(2, 2, 4, 5))
    with pytest.raises(ValueError, match="state has strides"):
        lightning_decode(q, q, q, SLOPES, torch.zeros(2, 2, 4, 4).transpose(2, 3))
