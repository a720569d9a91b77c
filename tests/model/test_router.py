"""The router: weights, both load-balancing losses by hand, and what capacity keeps; all with row scope."""

from __future__ import annotations

import pytest
import torch

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.mcore import transformer_config
from megatron_m1.model.moe import Router
from megatron_m1.model.packed import Packed

# two rows of two tokens over three experts; the choices of top-2 are {0,1} {0,2} and {1,2} {2,1}
PROBABILITIES = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])
# row 1: f = (2,1,1)/4, m = (.55,.2,.25): sum f m = .3875; row 2: f = (0,2,2)/4, m = (.15,.35,.5): .425
MEAN_OVER_ROWS = (0.3875 + 0.425) / 2


def build(alone, **changes) -> Router:
    """A router whose weight is the identity, so that its input is its logits."""
    sizes = {"hidden_size": 3, "num_experts": 3, "experts_per_token": 2} | changes
    model = ModelConfig(**sizes)
    router = Router(transformer_config(model, alone.layout), model, 0, alone.collection)
    with torch.no_grad():
        router.weight.copy_(torch.eye(model.num_experts))
    return router


def rows(row_tokens: int, num_rows: int) -> Packed:
    return Packed.from_lengths(
        [row_tokens] * num_rows,
        row_tokens=row_tokens,
        auxiliary_weight=1 / num_rows,
        device=torch.device("cpu"),
    )


def test_weights_are_the_softmax_over_the_chosen_logits(alone):
    weights, chosen = build(alone)(PROBABILITIES.log()[:, None], rows(2, 2))
    expected = torch.tensor([[5 / 8, 3 / 8, 0], [6 / 9, 0, 3 / 9], [0, 5 / 8, 3 / 8], [0, 2 / 9, 7 / 9]])
    assert torch.allclose(weights, expected, atol=1e-6)
    assert torch.equal(chosen, expected > 0)


@pytest.mark.parametrize(
    ("form", "expected"),
    # E = 3 experts; the second form counts choices per token, which sum to k = 2
    [("minimax01", MEAN_OVER_ROWS / 3), ("huggingface", MEAN_OVER_ROWS * 2 * 3)],
)
def test_auxiliary_loss_equals_the_hand_computation(form, expected, alone):
    router = build(alone, auxiliary_form=form)
    router(PROBABILITIES.log()[:, None], rows(2, 2))
    load = router.take_load()
    assert load["auxiliary_loss"].item() == pytest.approx(expected, rel=1e-6)
    assert load["tokens_per_expert"].tolist() == [2, 3, 3]
    assert load["dropped"] == 0
    assert router.take_load() == {}


@pytest.mark.parametrize(("form", "at_balance"), [("minimax01", 1 / 16), ("huggingface", 2.0)])
def test_auxiliary_loss_at_balance(form, at_balance, alone):
    router = build(alone, auxiliary_form=form, num_experts=4, hidden_size=4)
    router(torch.zeros(8, 1, 4), rows(8, 1))
    assert router.take_load()["auxiliary_loss"].item() == pytest.approx(at_balance)


@pytest.mark.parametrize("form", ["minimax01", "huggingface"])
def test_auxiliary_gradient_is_that_of_the_loss_times_the_coefficient(form, alone):
    """The choices are constants: only the mean probabilities carry a gradient; by finite differences."""
    router = build(alone, auxiliary_form=form, auxiliary_coefficient=0.5)
    logits = PROBABILITIES.log()[:, None].requires_grad_()
    weights, _ = router(logits, rows(2, 2))
    # a constant of the weights: each token's sum to one, so what is left is the auxiliary gradient
    weights.sum().backward()

    def loss_at(x: torch.Tensor) -> float:
        router.take_load()
        router(x, rows(2, 2))
        return router.take_load()["auxiliary_loss"].item()

    step = 1e-2
    for place in ([0, 0, 0], [1, 0, 2], [3, 0, 1]):
        nudge = torch.zeros_like(logits)
        nudge[tuple(place)] = step
        slope = (loss_at(logits.detach() + nudge) - loss_at(logits.detach() - nudge)) / (2 * step)
        assert logits.grad[tuple(place)].item() == pytest.approx(0.5 * slope, rel=1e-3, abs=1e-6)


def test_no_auxiliary_gradient_without_coefficient_or_training(alone):
    for router in (build(alone, auxiliary_coefficient=0.0), build(alone).eval()):
        logits = PROBABILITIES.log()[:, None].requires_grad_()
        router(logits, rows(2, 2))[0].sum().backward()
        assert logits.grad.abs().max() < 1e-6


def test_auxiliary_loss_does_not_depend_on_the_split_into_microbatches(alone):
    router = build(alone)
    logits = PROBABILITIES.log()[:, None]
    router(logits, rows(2, 2))
    together = router.take_load()["auxiliary_loss"]
    for half in logits.chunk(2):
        one_row = Packed.from_lengths([2], row_tokens=2, auxiliary_weight=1 / 2, device=torch.device("cpu"))
        router(half, one_row)
    assert torch.allclose(router.take_load()["auxiliary_loss"], together)


def test_capacity_keeps_the_highest_weights_of_each_row(alone):
    # top-1 of two experts, rows of four tokens: capacity = 1.0 * 1 * 4 / 2 = 2 tokens per expert and row
    router = build(
        alone,
        hidden_size=2,
        num_experts=2,
        experts_per_token=2,
        capacity_factor=0.5,
        auxiliary_coefficient=0.0,
    )
    # weight of expert 0 by token; expert 1 has the rest. capacity = ceil(0.5 * 2 * 4 / 2) = 2
    first = torch.tensor([0.9, 0.6, 0.8, 0.3, 0.1, 0.2, 0.7, 0.4])
    weights, kept = router(torch.stack([first, 1 - first], dim=-1).log()[:, None], rows(4, 2))
    assert kept[:, 0].tolist() == [True, False, True, False, False, False, True, True]
    assert kept[:, 1].tolist() == [False, True, False, True, True, True, False, False]
    # what is kept keeps its weight: nothing is renormalised
    assert torch.allclose(weights[:, 0], first * kept[:, 0])
    assert router.take_load()["dropped"] == 8


def test_equal_weights_are_kept_in_the_order_of_the_tokens(alone):
    router = build(alone, hidden_size=2, num_experts=2, experts_per_token=2, capacity_factor=0.5)
    _, kept = router(torch.zeros(4, 1, 2), rows(4, 1))
    assert kept.all(dim=1).tolist() == [True, True, False, False]


def test_enough_capacity_drops_nothing(alone):
    dropless, roomy = build(alone), build(alone, capacity_factor=1.5)
    for found, expected in zip(
        roomy(PROBABILITIES.log()[:, None], rows(2, 2)),
        dropless(PROBABILITIES.log()[:, None], rows(2, 2)),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("fp32", [True, False])
def test_router_computes_in_fp32_unless_told_otherwise(fp32, alone):
    model = ModelConfig(hidden_size=3, num_experts=3, router_fp32=fp32)
    router = Router(transformer_config(model, alone.layout, precision="bf16"), model, 0, alone.collection)
    assert router.weight.dtype == (torch.float32 if fp32 else torch.bfloat16)
    weight = torch.tensor([[1.0, 0.001, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    with torch.no_grad():
        router.weight.copy_(weight)
    weights, _ = router(torch.tensor([[[3.0, 3.0, 0.0]]]).bfloat16(), rows(1, 1))
    # 3.003 and 3 are one number in bf16
    assert (weights[0, 0] > weights[0, 1]) == fp32
