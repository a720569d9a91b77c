"""Parameter counts by formula: the published numbers, and the weights of the model built without memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.flops import count_parameters
from megatron_m1.model.hybrid import build_model

TINY = ModelConfig(
    num_layers=4, softmax_every=4, hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=16, rotary_dim=8,
    ffn_size=40, vocab_size=96, auxiliary_coefficient=0.0,
)  # fmt: skip
M1_456B = ModelConfig(
    num_layers=80, softmax_every=8, hidden_size=6144, num_heads=64, num_kv_heads=8, head_dim=128,
    rotary_dim=64, num_experts=32, experts_per_token=2, ffn_size=9216, vocab_size=200064,
)  # fmt: skip


def test_m1_456b_has_the_published_number_of_parameters():
    parameters = count_parameters(M1_456B)
    assert parameters.total == 456_089_655_296
    assert parameters.activated == 45_944_920_064


@pytest.mark.parametrize("model", [TINY, M1_456B], ids=["tiny", "m1-456b"])
def test_parameter_formula_equals_the_model_built_without_memory(model, alone):
    meta = torch.device("meta")
    with meta:
        (chunk,) = build_model(model, dataclasses.replace(alone, device=meta), precision="bf16", seed=None)
    assert all(parameter.is_meta for parameter in chunk.parameters())
    assert sum(parameter.numel() for parameter in chunk.parameters()) == count_parameters(model).total


def test_published_parts_of_m1_456b_add_up():
    parameters = count_parameters(M1_456B)
    assert parameters.lightning == 70 * 251_666_432
    assert parameters.softmax == 10 * 113_246_208
    assert parameters.experts == 80 * 5_435_817_984
    assert parameters.experts_per_token == 80 * 2 * 169_869_312
    assert parameters.routers == 80 * 196_608
    assert parameters.norms == 80 * 12_288 + 6_144
    assert parameters.embedding == parameters.head == 1_229_193_216
