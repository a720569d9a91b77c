"""Operations and parameters by formula equal a counted forward pass and the published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels_cuda.lightning.blocks import CHUNK_TOKENS
from kernels_cuda.lightning.chunked import lightning_scan
from kernels_cuda.moe import experts
from megatron_m1.model.config import ModelConfig
from megatron_m1.model.flops import (
    count_flops,
    flops_per_token,
    peak_flops_per_s,
    peak_of_named_device,
)
from megatron_m1.model.hybrid import build_model
from megatron_m1.model.packed import Packed

TINY = ModelConfig(
    num_layers=4, softmax_every=4, hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=16, rotary_dim=8,
    ffn_size=40, vocab_size=96, auxiliary_coefficient=0.0,
)  # fmt: skip
M1_456B = ModelConfig(
    num_layers=80, softmax_every=8, hidden_size=6144, num_heads=64, num_kv_heads=8, head_dim=128,
    rotary_dim=64, num_experts=32, experts_per_token=2, ffn_size=9216, vocab_size=200064,
)  # fmt: skip
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def counted(kernel):
    """A formula for FlopCounterMode: the matrix products that the CPU implementation of an operator runs."""

    def count(*arguments, out_val, **named):
        with FlopCounterMode(display=False) as inner:
            kernel(*arguments, **named)
        return inner.get_total_flops()

    count._get_raw = True
    return count


def scan(qkv, slopes, cu_seqlens, keep_scores):
    """With a state before and after every document, so that no block can skip the work on states."""
    borders = tuple(cu_seqlens.tolist())
    state_in = qkv.new_zeros(len(borders) - 1, qkv.shape[1], qkv.shape[3], qkv.shape[3])
    return lightning_scan(*qkv.unbind(2), slopes, state_in, borders)


def counter() -> FlopCounterMode:
    ops = torch.ops.m1
    formulas = {
        FLASH: counted(lambda q, k, v, *_: q @ k.transpose(-1, -2) @ v),
        ops.lightning_projection: counted(scan),
        ops.grouped_mlp: counted(
            lambda x, gate_up, down, rows, weights, *_: experts.grouped_forward(
                x, gate_up, down, rows, weights
            )
        ),
        ops.grouped_mlp_backward: counted(
            lambda d_y, x, hidden, gate_up, down, rows, weights, *_: experts.grouped_backward(
                d_y, x, hidden, weights, rows, (gate_up, None), (down, None)
            )
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def count_forward_and_backward(lengths: list[int], alone) -> tuple[dict, dict]:
    (model,) = build_model(TINY, alone)
    packed = Packed.from_lengths(
        lengths, row_tokens=sum(lengths), auxiliary_weight=1.0, device=torch.device("cpu")
    )
    tokens = torch.zeros(sum(lengths), dtype=torch.int64)
    with counter() as forward:
        logits = model(tokens, packed)
    with counter() as backward:
        logits.sum().backward()
    return forward.get_flop_counts()["Global"], backward.get_flop_counts()["Global"]


@pytest.mark.parametrize("lengths", [[256], [192, 64], [128, 128, 320]])
def test_formula_equals_a_counted_forward(lengths, alone):
    """The CPU computes whole squares of pairs where the formula counts triangles; all else is equal."""
    forward, _ = count_forward_and_backward(lengths, alone)
    block = CHUNK_TOKENS
    flops = count_flops(TINY, lengths, lightning_block_tokens=block)
    ops = torch.ops
    assert forward[ops.aten.mm] + forward[ops.m1.grouped_mlp] == flops.projections + flops.head
    channels, tokens = TINY.num_heads * TINY.head_dim, sum(lengths)
    assert forward[FLASH] == 4 * channels * sum(n * n for n in lengths)
    assert flops.softmax == 4 * channels * sum(sum(range(1, n + 1)) for n in lengths)

    lightning_layers, head_dim = 3, TINY.head_dim
    pair_flops = 4 * channels * tokens * block
    state_flops = 4 * channels * head_dim * tokens
    assert forward[ops.m1.lightning_projection] == lightning_layers * (pair_flops + state_flops)
    triangle = math.comb(block + 1, 2) * 4 * channels * tokens // block
    assert flops.lightning == lightning_layers * (triangle + state_flops)


def test_backward_of_the_linear_layers_is_twice_their_forward(alone):
    forward, backward = count_forward_and_backward([256], alone)
    ops = torch.ops
    assert backward[ops.aten.mm] == 2 * forward[ops.aten.mm]
    assert backward[ops.m1.grouped_mlp_backward] == 2 * forward[ops.m1.grouped_mlp]


def test_recompute_adds_a_forward_of_the_layers():
    flops = count_flops(TINY, [256])
    assert flops.training() == 3 * flops.forward
    assert flops.training("full") == 4 * flops.forward - flops.head
    # one softmax layer of four: its two square and two narrow projections, two experts, a router, and its pairs
    softmax = 2 * 256 * (2 * 48 * 64 + 2 * 48 * 32 + 2 * 3 * 48 * 40 + 4 * 48) + 4 * 64 * (256 * 257 // 2)
    assert flops.training("softmax") == flops.training() + softmax
    assert flops.training("lightning") == flops.training("full") - softmax


def test_ragged_blocks_and_short_documents_are_counted_exactly():
    channels, head_dim = TINY.num_heads * TINY.head_dim, TINY.head_dim
    flops = count_flops(TINY, [300, 5])
    pairs = sum(1 for n in (256, 44, 5) for i in range(n) for j in range(i + 1))
    assert flops.lightning == 3 * 4 * channels * (pairs + 305 * head_dim)


# per token, forward and backward: computed by hand from the paper's sizes, 6 * 47.17e9 + attention
@pytest.mark.parametrize(
    ("length", "total", "lightning_percent", "softmax_percent"),
    [
        (4096, 2.87e11, 0.61, 0.7),
        (8192, 2.89e11, 0.61, 1.4),
        (32768, 3.01e11, 0.59, 5.4),
        (131072, 3.49e11, 0.50, 18.4),
        (524288, 5.43e11, 0.33, 47.5),
        (1048576, 8.00e11, 0.22, 64.4),
    ],
)
def test_training_flops_of_m1_by_context_length(length, total, lightning_percent, softmax_percent):
    flops = count_flops(M1_456B, [length])
    assert flops_per_token(M1_456B, length) == pytest.approx(total, rel=2e-3)
    assert 100 * flops.lightning / flops.forward == pytest.approx(lightning_percent, abs=0.006)
    assert 100 * flops.softmax / flops.forward == pytest.approx(softmax_percent, abs=0.06)


def test_peak_rates_are_known_or_none():
    assert peak_of_named_device("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_of_named_device("NVIDIA H200", "bf16") == 989.4e12
    assert peak_of_named_device("NVIDIA H20", "bf16") == 148e12
    assert peak_of_named_device("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_of_named_device("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_of_named_device("NVIDIA GeForce GTX 1080", "bf16") is None
    assert peak_of_named_device("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops_per_s(torch.device("cpu"), "bf16") is None
