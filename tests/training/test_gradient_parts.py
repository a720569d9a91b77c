"""Every parameter's gradient is counted in the part of the model that its place in the network says."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.hybrid import build_model
from megatron_m1.training.config import OptimizerConfig
from megatron_m1.training.gradient_parts import GradientParts
from megatron_m1.training.optimizer import build_optimizer
from megatron_m1.training.step import wrap_for_gradients

MODEL = ModelConfig(
    num_layers=4, softmax_every=2, hidden_size=16, num_heads=2, num_kv_heads=2, head_dim=8, rotary_dim=4,
    num_experts=2, ffn_size=16, vocab_size=32,
)  # fmt: skip
BY_HAND = {
    "embedding": ["embedding.word_embeddings.weight"],
    "lightning 0": ["decoder.layers.0.attention."],
    "softmax 1": ["decoder.layers.1.attention."],
    "router 1": ["decoder.layers.1.moe.router."],
    "experts 2": ["decoder.layers.2.moe.experts."],
    "norms 3": ["decoder.layers.3.attention_norm.", "decoder.layers.3.moe_norm."],
    "softmax 3": ["decoder.layers.3.attention."],
    "final norm": ["decoder.final_layernorm."],
    "head": ["output_layer."],
}


def test_parts_are_what_their_names_say(alone):
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    chunks = build_model(MODEL, alone, seed=1)
    wrapped = wrap_for_gradients(chunks, alone)
    optimizer = build_optimizer(wrapped, OptimizerConfig(grad_clip=0.01), alone)
    gradients = {}
    for number, (name, parameter) in enumerate(chunks[0].named_parameters()):
        generator = torch.Generator().manual_seed(number)
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) * (number + 1))
        gradients[name] = parameter.main_grad.double().clone()
    parts = GradientParts(MODEL, chunks, optimizer)
    seen = []
    norm = optimizer.step(1e-3, lambda _norm: seen.append(parts.norms()) is None)
    found = dict(zip(parts.names, seen[0], strict=True))
    assert len(found) == 1 + 4 * 4 + 2
    for part, beginnings in BY_HAND.items():
        own = [x for name, x in gradients.items() if name.startswith(tuple(beginnings))]
        assert own, (part, list(gradients))
        torch.testing.assert_close(
            found[part], sum(float(x.square().sum()) for x in own) ** 0.5, rtol=1e-5, atol=0
        )
    torch.testing.assert_close(sum(value**2 for value in found.values()) ** 0.5, norm, rtol=1e-5, atol=0)
