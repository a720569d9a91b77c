"""The head is a true fp32 matrix product inside a bf16 model, and refuses to be rounded silently."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.head import Head
from megatron_m1.model.hybrid import build_model
from megatron_m1.model.mcore import transformer_config
from parallel.groups import create_groups, destroy_groups
from parallel.layout import Layout
from tests.spawn import run_ranks

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


def loss_and_gradients(head: Head, x_TD: torch.Tensor, labels_T: torch.Tensor) -> list[torch.Tensor]:
    """Losses with a different weight on each token, and what they give back; the head's sequence split is honoured."""
    x = x_TD.detach().clone().requires_grad_()
    losses = head.losses(x[:, None], labels_T)
    (losses * torch.linspace(-1, 2, len(losses))).sum().backward()
    gradient, head.weight.grad = head.weight.grad, None
    return [losses.detach(), x.grad, gradient]


def expected_loss_and_gradients(
    weight_PD: torch.Tensor, x_TD: torch.Tensor, labels_T: torch.Tensor
) -> list[torch.Tensor]:
    """The same in fp64, with all logits at once."""
    x, w = (t.detach().double().requires_grad_() for t in (x_TD, weight_PD))
    losses = torch.nn.functional.cross_entropy(x @ w.T, labels_T, reduction="none")
    (losses * torch.linspace(-1, 2, len(losses), dtype=torch.float64)).sum().backward()
    return [losses.detach(), x.grad, w.grad]


def draw_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return torch.randn(22, 64, generator=random), torch.randint(96, (22,), generator=random)


@pytest.mark.parametrize("tokens_per_chunk", [1, 7, 21, 22, 1000])
def test_losses_in_chunks_equal_all_logits_at_once(tokens_per_chunk, alone):
    head = build(alone)
    head.tokens_per_chunk = tokens_per_chunk
    x, labels = draw_tokens()
    expected = expected_loss_and_gradients(head.weight, x, labels)
    for found, exact in zip(loss_and_gradients(head, x, labels), expected, strict=True):
        assert relative(found, exact) < 1e-6
    # bf16 activations: what goes back is rounded once
    expected = expected_loss_and_gradients(head.weight, x.bfloat16(), labels)
    losses, gradient, of_weight = loss_and_gradients(head, x.bfloat16(), labels)
    assert gradient.dtype == torch.bfloat16
    assert relative(gradient, expected[1].bfloat16()) < 1e-3
    assert max(relative(losses, expected[0]), relative(of_weight, expected[2])) < 1e-6


def test_a_bf16_head_sums_its_chunks_in_fp32(alone):
    head = build(alone, head_fp32=False)
    head.tokens_per_chunk = 1
    x, labels = draw_tokens()
    found = loss_and_gradients(head, x.bfloat16(), labels)
    expected = expected_loss_and_gradients(head.weight, x.bfloat16(), labels)
    assert found[2].dtype == torch.bfloat16
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-2
    # sums of a thousand chunks in bf16 would be off by far more than its last digit
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(1000, 64, generator=generator), torch.randint(96, (1000,), generator=generator)
    in_chunks = loss_and_gradients(head, x.bfloat16(), labels)[2]
    head.tokens_per_chunk = 1000
    assert relative(in_chunks, loss_and_gradients(head, x.bfloat16(), labels)[2].float()) < 4e-3


def test_no_tensor_holds_the_logits_of_more_than_a_chunk(alone):
    head = build(alone)
    head.tokens_per_chunk = 100
    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(x.numel() for x in tree_leaves(out) if torch.is_tensor(x))
            return out

    with Sizes():
        loss_and_gradients(head, torch.randn(1000, 64), torch.zeros(1000, dtype=torch.int64))
    assert max(made) == max(1000 * 64, 100 * 96)


def losses_on_two_ranks() -> list[tuple[str, list[torch.Tensor]]]:
    """This rank's losses and gradients with the vocabulary split over two ranks."""
    found = []
    for name, splits_tokens in (("whole tokens", False), ("split tokens", True)):
        layout = Layout(tp=2, sequence_parallel=splits_tokens)
        groups = create_groups(layout, torch.device("cpu"))
        rank = groups.coordinates["tp"]
        head = Head(transformer_config(MODEL, layout), MODEL, groups.collection.tp)
        weight = torch.empty(96, 64).normal_(generator=torch.Generator().manual_seed(0))
        head.weight.data.copy_(weight[rank * 48 : (rank + 1) * 48])
        x, labels = draw_tokens()
        for head.tokens_per_chunk in (7, 1000):
            losses, gradient, of_weight = loss_and_gradients(
                head, x.chunk(2)[rank] if splits_tokens else x, labels
            )
            found.append((name, [losses, gradient, of_weight]))
        destroy_groups()
    return found


@pytest.mark.multiprocess
def test_losses_over_a_split_vocabulary_equal_one_process():
    x, labels = draw_tokens()
    weight = torch.empty(96, 64).normal_(generator=torch.Generator().manual_seed(0))
    losses, gradient, of_weight = expected_loss_and_gradients(weight, x, labels)
    first, second = run_ranks(2, losses_on_two_ranks)
    for (name, one), (_, two) in zip(first, second, strict=True):
        assert max(relative(one[0], losses), relative(two[0], losses)) < 1e-6
        assert relative(torch.cat([one[2], two[2]]), of_weight) < 1e-6
        whole = torch.cat([one[1], two[1]]) if name == "split tokens" else one[1]
        assert relative(whole, gradient) < 1e-6


@pytest.fixture
def restore_precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_tf32_is_refused_with_what_to_do(precision, alone, restore_precision):
    torch.set_float32_matmul_precision(precision)
    for use in (build(alone), lambda x: build(alone).losses(x, torch.zeros(1, dtype=torch.int64))):
        with pytest.raises(ValueError, match="precision is .*'cuda': 'tf32'.*needs 'ieee'.*head_fp32=false"):
            use(torch.zeros(1, 1, 64))
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
