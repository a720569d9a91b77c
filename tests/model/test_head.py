"""The head is a true fp32 matrix product inside a bf16 model, and refuses to be rounded silently."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.head import Head
from megatron_m1.model.hybrid import build_model
from megatron_m1.model.mcore import transformer_config

MODEL = ModelConfig(hidden_size=64, vocab_size=96)


def build(alone, **changes) -> Head:
    model = dataclasses.replace(MODEL, **changes)
    head = Head(transformer_config(model, alone.layout, precision="bf16"), model, alone.collection.tp)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return head


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_logits_and_gradients_are_fp32_in_a_bf16_model(alone):
    head = build(alone)
    hidden = torch.randn(40, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    gradient = torch.randn(40, 1, 96, generator=torch.Generator().manual_seed(2))
    logits, _ = head(hidden)
    logits.backward(gradient)
    assert (head.weight.dtype, logits.dtype, head.weight.grad.dtype) == (torch.float32,) * 3
    x, g, w = hidden[:, 0].double(), gradient[:, 0].double(), head.weight.double()
    assert relative(logits[:, 0], x @ w.T) < 1e-6
    assert relative(head.weight.grad, g.T @ x) < 1e-6
    # what goes back into the bf16 stream is rounded once, at its end
    assert hidden.grad.dtype == torch.bfloat16
    assert relative(hidden.grad[:, 0], (g @ w).bfloat16()) < 1e-3


def test_a_bf16_head_is_measurably_worse(alone):
    head = build(alone, head_fp32=False)
    hidden = torch.randn(40, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert head.weight.dtype == torch.bfloat16
    assert relative(head(hidden)[0][:, 0], hidden[:, 0].double() @ head.weight.double().T) > 1e-4


def test_the_built_model_keeps_its_head_in_fp32(alone):
    (model,) = build_model(MODEL, alone, precision="bf16")
    assert model.output_layer.weight.dtype == torch.float32
    assert model.embedding.word_embeddings.weight.dtype == torch.bfloat16


@pytest.fixture
def restore_precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_tf32_is_refused_with_what_to_do(precision, alone, restore_precision):
    torch.set_float32_matmul_precision(precision)
    with pytest.raises(ValueError, match="precision is .*'cuda': 'tf32'.*needs 'ieee'.*head_fp32=false"):
        build(alone)(torch.zeros(1, 1, 64))
    build(alone, head_fp32=False)(torch.zeros(1, 1, 64).bfloat16())


def test_tf32_switched_on_by_its_older_name_is_refused(alone, restore_precision):
    torch.backends.cuda.matmul.allow_tf32 = True
    with pytest.raises(ValueError, match="needs 'ieee'"):
        build(alone)(torch.zeros(1, 1, 64))


def test_tf32_switched_on_by_its_newer_name_is_refused(alone, restore_precision):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(ValueError, match="precision is .*needs 'ieee'"):
            build(alone)(torch.zeros(1, 1, 64))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
