"""Recompute and offload change what is kept, not what is computed."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest
import torch

from megatron_m1.model import memory
from megatron_m1.model.config import ModelConfig
from megatron_m1.model.hybrid import build_model
from megatron_m1.model.memory import Recompute
from megatron_m1.model.packed import Packed

MODEL = ModelConfig(
    num_layers=4, softmax_every=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=4,
    num_experts=4, ffn_size=24, vocab_size=96,
)  # fmt: skip
TOKENS = 96


@dataclass
class Run:
    """A training step's loss and gradients, and what was kept between forward and backward."""

    results: list[torch.Tensor]
    kept_bytes: int
    """On the device, for backward, without weights."""
    copied_bytes: int
    """In host memory."""


def run(alone, recompute: Recompute = "none", offload: bool = False) -> Run:
    (model,) = build_model(MODEL, alone, seed=3, recompute=recompute, offload=offload)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    packed = Packed.from_lengths(
        [70, 1, 25], row_tokens=TOKENS, auxiliary_weight=1.0, device=torch.device("cpu")
    )
    tokens = torch.randint(96, (TOKENS,), generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        losses = model(tokens, packed, labels_T=tokens.roll(-1))
    losses.sum().backward()
    results = [losses.detach(), *(parameter.grad for parameter in model.parameters())]
    return Run(results, sum(kept.values()), getattr(model.decoder.offload_context, "copied_bytes", 0))


@pytest.fixture(scope="module")
def plain(alone) -> Run:
    return run(alone)


def largest_error(found: Run, plain: Run) -> float:
    """Of the loss and any gradient tensor, relative RMS."""
    pairs = list(zip(found.results, plain.results, strict=True))
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("recompute", ["lightning", "softmax", "full"])
def test_recompute_changes_no_bit(recompute, alone, plain):
    assert largest_error(run(alone, recompute), plain) == 0


@pytest.mark.parametrize("recompute", ["none", "lightning", "softmax", "full"])
def test_offload_changes_nothing_but_rounding(recompute, alone, plain, monkeypatch):
    monkeypatch.setattr(memory, "_SMALLEST_BYTES", 1)
    found = run(alone, recompute, offload=True)
    assert found.copied_bytes > 0
    assert largest_error(found, plain) < (1e-15 if recompute == "full" else 1e-6)


def test_recompute_keeps_less_by_kind_of_layer(alone, plain):
    kept = {kind: run(alone, kind).kept_bytes for kind in ("lightning", "softmax", "full")}
    inputs = MODEL.num_layers * TOKENS * MODEL.hidden_size * 4
    outside = 3 * TOKENS * max(MODEL.hidden_size, MODEL.vocab_size) * 4
    assert kept["full"] < inputs + outside
    saved = {kind: plain.kept_bytes - number for kind, number in kept.items()}
    # each kind frees its own layers' activations; together they are all of them
    assert saved["full"] == pytest.approx(saved["lightning"] + saved["softmax"], rel=0.05)
    assert min(saved.values()) > 0.3 * saved["full"]


def test_offload_leaves_only_small_tensors_and_forgets_after_backward(alone, plain, monkeypatch):
    monkeypatch.setattr(memory, "_SMALLEST_BYTES", 2048)
    copies: list[weakref.ref[memory._HostCopy]] = []
    make = memory._HostCopy.__init__

    def remember(self, x, before, place):
        assert x.untyped_storage().data_ptr() not in place._stay, "weights are not copied"
        copies.append(weakref.ref(self))
        make(self, x, before, place)

    monkeypatch.setattr(memory._HostCopy, "__init__", remember)
    found = run(alone, offload=True)
    assert largest_error(found, plain) < 1e-6
    assert found.copied_bytes > 0.8 * (plain.kept_bytes - found.kept_bytes) > 0
    assert found.kept_bytes < 0.35 * plain.kept_bytes
    assert len(copies) > MODEL.num_layers
    assert not [copy for copy in copies if copy() is not None]


def test_what_was_taken_back_is_not_kept_a_second_time():
    place = memory.HostCopies(lambda: iter(()), torch.device("cpu"))
    first = memory._HostCopy(torch.arange(4.0), None, place)
    second = memory._HostCopy(torch.arange(4.0, 8.0), weakref.ref(first), place)
    taken = second.take_back()
    assert taken.tolist() == [4.0, 5.0, 6.0, 7.0]
    # backward needs the first one next: it travels already, and the second one is the caller's alone
    assert second._fetched is None and first._fetched is not None
