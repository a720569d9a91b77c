"""The norm over all heads is one norm, whatever the heads' energies and however they are split."""

from __future__ import annotations

import pytest
import torch

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.mcore import transformer_config
from megatron_m1.model.norm import AllHeadsRMSNorm, RMSNorm
from parallel.groups import Groups, create_groups, destroy_groups
from parallel.layout import Layout
from tests.spawn import run_ranks

MODEL = ModelConfig(num_heads=4, num_kv_heads=4, head_dim=8, rotary_dim=4)
CHANNELS, EPS = 32, 1e-6


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [20, 32] whose heads differ a thousandfold in energy, the weight, and the output's gradient."""
    generator = torch.Generator().manual_seed(3)
    energies = torch.tensor([30.0, 1.0, 0.1, 0.03]).repeat_interleave(8)
    x, weight, gradient = (torch.randn(*shape, generator=generator) for shape in ((20, 32), (32,), (20, 32)))
    return x * energies, weight, gradient


def reference() -> list[torch.Tensor]:
    """Output and gradients of x and weight, in fp64 by autograd of the formula."""
    x, weight, gradient = (t.double() for t in inputs())
    x.requires_grad_(), weight.requires_grad_()
    y = x / torch.sqrt(x.square().sum(-1, keepdim=True) / CHANNELS + EPS) * weight
    y.backward(gradient)
    return [y.detach(), x.grad, weight.grad]


def run(groups: Groups) -> list[torch.Tensor]:
    """Output and gradients of this rank's channels."""
    place, parts = groups.coordinates["tp"], groups.layout.tp
    x, weight, gradient = (t.chunk(parts, dim=-1)[place].clone() for t in inputs())
    norm = AllHeadsRMSNorm(transformer_config(MODEL, groups.layout), CHANNELS, EPS, groups.collection.tp)
    norm.weight.data.copy_(weight)
    x.requires_grad_()
    y = norm(x)
    y.backward(gradient)
    return [y.detach(), x.grad, norm.weight.grad]


def run_on_rank(layout: Layout) -> list[torch.Tensor]:
    results = run(create_groups(layout, torch.device("cpu")))
    destroy_groups()
    return results


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for name, f, e in zip(("output", "x gradient", "weight gradient"), found, expected, strict=True):
        # per channel, so that quiet heads count as much as loud ones
        error = (f - e).square().reshape(-1, CHANNELS).mean(0).sqrt()
        scale = e.square().reshape(-1, CHANNELS).mean(0).sqrt()
        assert (error / scale).max() < 1e-5, name


def test_one_process_normalises_over_all_heads(alone):
    assert_close(run(alone), reference())


def test_a_norm_per_head_would_be_another_function():
    x, weight, _ = inputs()
    per_head = torch.nn.functional.rms_norm(x.view(20, 4, 8), (8,), eps=EPS).flatten(1) * weight
    assert (per_head - reference()[0]).abs().max() > 1


@pytest.mark.multiprocess
@pytest.mark.parametrize("tp", [2, 4])
def test_heads_split_over_ranks_are_normalised_together(tp):
    by_rank = run_ranks(tp, run_on_rank, Layout(tp=tp))
    assert_close([torch.cat(parts, dim=-1) for parts in zip(*by_rank, strict=True)], reference())


def test_block_norm_takes_its_statistics_in_fp32(alone):
    config = transformer_config(MODEL, alone.layout, precision="bf16")
    norm = RMSNorm(config, 64, 1e-5)
    torch.nn.init.ones_(norm.weight)
    x = (torch.randn(10, 64, generator=torch.Generator().manual_seed(4)) * 100).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).dtype == torch.bfloat16
    assert ((norm(x) - exact) / exact).abs().max() < 2**-8
