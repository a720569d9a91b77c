"""Experts: ours against megatron-core's, weight gradients straight into main_grad, our row moves in its dispatcher."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.mcore import transformer_config
from megatron_m1.model.moe import MixtureOfExperts
from megatron_m1.model.packed import Packed
from parallel.experts import EXPERTS, StackedExperts

MODEL = ModelConfig(hidden_size=24, ffn_size=40, num_experts=4)
COUNTS = torch.tensor([5, 0, 30, 7])


def relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.detach().double()
    return float((got.detach().double() - expected).norm() / expected.norm())


def build(alone: Any, kind: str, precision: str = "fp32") -> StackedExperts:
    config = transformer_config(MODEL, alone.layout, precision=precision)
    experts = EXPERTS[kind](MODEL.num_experts, config, alone.collection)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (experts.gate_up, experts.down):
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return experts


def rows(dtype: torch.dtype, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num_rows = int(COUNTS.sum())
    x_RD = torch.randn(num_rows, MODEL.hidden_size, generator=generator).to(dtype).requires_grad_()
    return x_RD, torch.rand(num_rows, generator=generator).requires_grad_()


@pytest.mark.parametrize("counts", [COUNTS, torch.tensor([0, 42, 0, 0])])
def test_megatrons_experts_give_the_same_outputs_and_gradients_from_the_same_weights(alone, counts):
    results = []
    for kind in ("m1", "megatron"):
        experts, (x_RD, weights_R) = build(alone, kind), rows(torch.float32)
        y_RD, bias = experts(x_RD, counts, weights_R)
        assert bias is None
        y_RD.square().sum().backward()
        results.append([y_RD, x_RD.grad, weights_R.grad, experts.gate_up.grad, experts.down.grad])
    for ours, theirs in zip(*results, strict=True):
        assert relative_rms(ours, theirs) < 1e-6


def test_both_kinds_have_the_same_parameters_and_the_same_checkpoint(alone):
    ours, theirs = (build(alone, kind) for kind in ("m1", "megatron"))
    assert (
        dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys() == {"gate_up", "down"}
    )
    for one, other in zip(
        ours.sharded_state_dict("x.").values(), theirs.sharded_state_dict("x.").values(), strict=True
    ):
        assert (one.key, one.global_shape, one.global_offset) == (
            other.key,
            other.global_shape,
            other.global_offset,
        )
        assert torch.equal(one.data, other.data)


def wrapped(alone: Any, experts: StackedExperts, *, overlap: bool) -> DistributedDataParallel:
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=overlap
    )
    return DistributedDataParallel(experts.config, options, experts, pg_collection=alone.collection)


def microbatches(run: Any, dtype: torch.dtype, count: int) -> None:
    for seed in range(count):
        x_RD, weights_R = rows(dtype, seed)
        run(x_RD, COUNTS, weights_R)[0].float().square().sum().backward()


@pytest.mark.parametrize("overlap", [False, True])
def test_main_grad_takes_what_autograd_would_have_summed(alone, overlap):
    plain, experts = build(alone, "m1"), build(alone, "m1")
    microbatches(plain, torch.float32, 2)
    model = wrapped(alone, experts, overlap=overlap)
    for _ in range(2):  # the second step starts from cleared buffers
        model.zero_grad_buffer()
        with model.no_sync():
            microbatches(model, torch.float32, 1)
        x_RD, weights_R = rows(torch.float32, 1)
        model(x_RD, COUNTS, weights_R)[0].square().sum().backward()
        model.finish_grad_sync()
    for name in ("gate_up", "down"):
        weight, expected = getattr(experts, name), getattr(plain, name).grad
        assert weight.grad is None
        assert weight.grad_added_to_main_grad, "nothing but the operator may have added"
        assert relative_rms(weight.main_grad, expected) < 1e-6


def test_gradients_of_bf16_weights_are_never_rounded_to_bf16(alone):
    plain, experts, exact = build(alone, "m1", "bf16"), build(alone, "m1", "bf16"), build(alone, "m1")
    with torch.no_grad():
        exact.gate_up.copy_(experts.gate_up)
        exact.down.copy_(experts.down)
    microbatches(plain, torch.bfloat16, 8)
    microbatches(wrapped(alone, experts, overlap=False), torch.bfloat16, 8)
    for seed in range(8):
        x_RD, weights_R = rows(torch.bfloat16, seed)
        exact(x_RD.float(), COUNTS, weights_R)[0].square().sum().backward()
    for name in ("gate_up", "down"):
        main_grad, expected = getattr(experts, name).main_grad, getattr(exact, name).grad
        assert not torch.equal(main_grad, main_grad.bfloat16().float())
        assert relative_rms(main_grad, expected) < 0.95 * relative_rms(getattr(plain, name).grad, expected)


@pytest.mark.parametrize("top_k", [2, 3])
def test_our_row_moves_change_nothing_but_their_cost(alone, top_k):
    model = dataclasses.replace(MODEL, experts_per_token=top_k, auxiliary_coefficient=0.0)
    config = transformer_config(model, alone.layout)
    packed = Packed.from_lengths([50], row_tokens=50, auxiliary_weight=1.0, device=alone.device)
    results = []
    for upstream in (False, True):
        torch.manual_seed(0)
        layer = MixtureOfExperts(config, model, 0, alone.collection)
        assert type(layer.token_dispatcher) is not MoEAlltoAllTokenDispatcher
        if upstream:
            layer.token_dispatcher = MoEAlltoAllTokenDispatcher(
                layer.num_local_experts, layer.local_expert_indices, config, alone.collection
            )
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        x_SBD = torch.randn(50, 1, model.hidden_size, requires_grad=True)
        y_SBD = layer(x_SBD, packed)
        y_SBD.square().sum().backward()
        results.append([y_SBD, x_SBD.grad, *(parameter.grad for parameter in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert relative_rms(ours, theirs) < 1e-6
