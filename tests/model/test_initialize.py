"""Initial weights depend on seed and tensor name alone; their scales are Xavier's with DeepNorm's gain."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.hybrid import build_model
from megatron_m1.model.initialize import initialize_weights

MODEL = ModelConfig(
    num_layers=2, softmax_every=2, hidden_size=256, num_heads=8, num_kv_heads=4, head_dim=64, ffn_size=96
)
SHAPES = {
    "decoder.layers.0.attention.linear_qkvg.weight": (2048, 256),
    "decoder.layers.1.attention.linear_qkv.weight": (1024, 256),
    "decoder.layers.0.attention.linear_out.weight": (256, 512),
    "decoder.layers.0.moe.experts.gate_up": (4, 2, 96, 256),
    "decoder.layers.0.moe.experts.down": (4, 256, 96),
    "embedding.word_embeddings.weight": (4096, 256),
}


def draw(key: str, offset: tuple[int, ...], shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """The part of a tensor that a rank with this box would hold."""
    part = SimpleNamespace(
        key=key,
        global_shape=SHAPES[key],
        global_offset=offset,
        local_shape=shape,
        data=torch.full(shape, 99.0),
    )
    initialize_weights({"parameter": part}, MODEL, seed)
    return part.data


@st.composite
def boxes(generate) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    key = generate(st.sampled_from(sorted(SHAPES)))
    offset = tuple(generate(st.integers(0, size - 1)) for size in SHAPES[key])
    shape = tuple(
        generate(st.integers(1, size - start)) for size, start in zip(SHAPES[key], offset, strict=True)
    )
    return key, offset, shape


@settings(max_examples=40, deadline=None)
@given(boxes())
def test_any_part_of_a_tensor_is_drawn_as_in_the_whole(box):
    key, offset, shape = box
    whole = draw(key, (0,) * len(shape), SHAPES[key])
    inside = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    assert torch.equal(draw(key, offset, shape), whole[inside])


def test_seed_and_name_decide():
    key, shape = "decoder.layers.0.attention.linear_out.weight", (256, 512)
    assert torch.equal(draw(key, (0, 0), shape), draw(key, (0, 0), shape))
    assert not torch.equal(draw(key, (0, 0), shape), draw(key, (0, 0), shape, seed=1))
    experts = draw(
        "decoder.layers.0.moe.experts.down", (0, 0, 0), SHAPES["decoder.layers.0.moe.experts.down"]
    )
    assert not torch.equal(experts[0], experts[1])
    embedding = draw("embedding.word_embeddings.weight", (0, 0), (4096, 256))
    assert not torch.equal(embedding[:1024], embedding[1024:2048])


GAIN = 16**-0.25
# hand-computed: sqrt(2 / (fan_in + fan_out)) with 256 -> 512 channels, 256 -> 256 key/value channels
WIDE, NARROW = (2 / 768) ** 0.5, (2 / 512) ** 0.5


@pytest.mark.parametrize(
    ("key", "view", "expected"),
    [
        # per head: q, k, v, gate
        ("decoder.layers.0.attention.linear_qkvg.weight", (8, 4, 64), [WIDE, WIDE, WIDE * GAIN, WIDE]),
        # per group: two queries, key, value
        ("decoder.layers.1.attention.linear_qkv.weight", (4, 4, 64), [WIDE, WIDE, NARROW, NARROW * GAIN]),
        ("decoder.layers.0.attention.linear_out.weight", (1, 1, 256), [WIDE * GAIN]),
    ],
)
def test_scales_are_xavier_with_the_gain_on_values_and_outputs(key, view, expected):
    rows = draw(key, (0, 0), SHAPES[key]).view(*view, -1)
    for role, scale in enumerate(expected):
        assert rows[:, role].std().item() == pytest.approx(scale, rel=0.03)
        assert abs(rows[:, role].mean().item()) < 0.03 * scale


def test_experts_are_scaled_by_their_own_fans():
    scale = (2 / (256 + 96)) ** 0.5 * GAIN
    for key in ("decoder.layers.0.moe.experts.gate_up", "decoder.layers.0.moe.experts.down"):
        assert draw(key, (0,) * len(SHAPES[key]), SHAPES[key]).std().item() == pytest.approx(scale, rel=0.03)


def test_every_parameter_of_a_built_model_is_filled(alone):
    (model,) = build_model(MODEL, alone, seed=3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert bool((parameter == 1).all()), name
        else:
            assert 0 < parameter.std() < 1, name
            assert parameter.unique().numel() > 0.9 * parameter.numel(), name
