"""Runs a model on one layout; brings back losses, gradients, their norms by part, weights and routing by logical name.

Legend: S tokens per row, T tokens of a microbatch, E experts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.hybrid import HybridModel, build_model
from megatron_m1.training.batch import make_microbatch, sample_ids
from megatron_m1.training.config import OptimizerConfig
from megatron_m1.training.gradient_parts import GradientParts
from megatron_m1.training.optimizer import build_optimizer
from megatron_m1.training.step import run_microbatches, wrap_for_gradients
from parallel.groups import Groups, create_groups, destroy_groups
from parallel.launch import read_environment
from tests.equivalence.matrix import Case

MODEL = ModelConfig(
    num_layers=8,
    hidden_size=32,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    rotary_dim=4,
    num_experts=4,
    ffn_size=24,
    vocab_size=96,
    auxiliary_coefficient=0.05,
)
SEQUENCE = 48
GLOBAL_ROWS = 8
STEPS = 2
LEARNING_RATE = 3e-3

Pieces = dict[str, list[tuple[tuple[int, ...], tuple[int, ...], np.ndarray]]]


@dataclass(frozen=True)
class Row:
    """A row with ragged documents, one-token documents and a ragged loss mask."""

    tokens_S: np.ndarray
    labels_S: np.ndarray
    loss_mask_S: np.ndarray
    document_lengths: np.ndarray
    sample_id: int


def make_row(sample_id: int, packs: int = 0) -> Row:
    """The row is a function of its number and of the packs; in packs 0 rows have 1 to 4 documents, in others up to 12,
    some of one token."""
    random = np.random.default_rng([sample_id, packs] if packs else sample_id)
    tokens = random.integers(0, MODEL.vocab_size, SEQUENCE + 1)
    num_cuts = random.integers(0, 12) if packs else sample_id % 4
    cuts = np.sort(random.choice(np.arange(1, SEQUENCE), size=num_cuts, replace=False))
    lengths = np.diff(np.concatenate([[0], cuts, [SEQUENCE]]))
    mask = (random.random(SEQUENCE) < (0.2, 0.9)[sample_id % 2]).astype(np.float32)
    return Row(tokens[:-1], tokens[1:], mask, lengths, sample_id)


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """On one rank: run every case in turn, all of this world size."""
    return [_run_case(case) for case in cases]


def _run_case(case: Case) -> dict[str, Any]:
    options = dict(case.options)
    recompute, overlap = options.pop("recompute", "none"), options.pop("overlap", False)
    model = dataclasses.replace(MODEL, **options)
    groups = create_groups(case.layout, read_environment().device)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    chunks = build_model(model, groups, recompute=recompute, seed=7)
    for chunk in chunks:
        _make_heads_unequal(chunk)
    wrapped = wrap_for_gradients(chunks, groups, overlap=overlap)
    optimizer = build_optimizer(wrapped, OptimizerConfig(), groups)
    routing = _record_routing(chunks, case, groups)
    parts = GradientParts(model, chunks, optimizer)
    result: dict[str, Any] = {
        "losses": [],
        "auxiliary": [],
        "norms": [],
        "part_norms": [],
        "parts": parts.names,
    }

    def accepts(_norm: float) -> bool:
        result["part_norms"].append(parts.norms())
        return True

    for step in range(STEPS):
        microbatches = [
            make_microbatch(
                [make_row(i, case.packs) for i in ids],
                global_rows=GLOBAL_ROWS,
                device=groups.device,
                piece=groups.piece,
            )
            for ids in _ids(case, groups, step)
        ]
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        # the first step leaves whole gradients everywhere to compare them; the others take the usual, sharded path
        measured = run_microbatches(wrapped, microbatches, groups, reduce_everywhere=step == 0)
        if step == 0:
            result["gradients"] = _pieces(chunks, lambda parameter: parameter.main_grad)
            result["routing"] = dict(routing)
        result["losses"].append(measured.loss_nats)
        result["auxiliary"].append(measured.auxiliary_loss)
        result["norms"].append(optimizer.step(LEARNING_RATE, accepts))
    result["weights"] = _pieces(chunks, lambda parameter: parameter.detach())
    destroy_groups()
    return result


def _ids(case: Case, groups: Groups, step: int) -> list[list[int]]:
    return sample_ids(
        consumed=step * GLOBAL_ROWS,
        global_rows=GLOBAL_ROWS,
        micro_batch=case.micro_batch,
        data_parallel=case.layout.dp,
        data_rank=groups.coordinates["dp"],
    )


def _make_heads_unequal(chunk: HybridModel) -> None:
    """Give heads very different energies and norms random weights: a norm per tp rank would then show."""
    for tensor in chunk.logical_tensors().values():
        if tensor.key.endswith("linear_qkvg.weight"):
            rows = torch.arange(tensor.local_shape[0]) + tensor.global_offset[0]
            heads = rows // (4 * MODEL.head_dim)
            tensor.data.data *= (0.3 * 1.6**heads)[:, None].to(tensor.data.device)
        elif "norm" in tensor.key:
            whole = 0.5 + torch.rand(
                tensor.global_shape, generator=torch.Generator().manual_seed(len(tensor.key))
            )
            start = tensor.global_offset[0]
            tensor.data.data.copy_(whole[start : start + tensor.local_shape[0]])


def _pieces(chunks: list[HybridModel], read: Any) -> Pieces:
    """This rank's part of every logical tensor: (offset, global shape, values)."""
    pieces: Pieces = {}
    for chunk in chunks:
        logical = chunk.logical_tensors()
        for name, parameter in chunk.named_parameters():
            tensor = logical[name]
            values = read(parameter).cpu().clone().numpy()
            pieces.setdefault(tensor.key, []).append((tensor.global_offset, tensor.global_shape, values))
    return pieces


def _record_routing(
    chunks: list[HybridModel], case: Case, groups: Groups
) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Watch the routers in the first pass of the first step: (layer, first row) -> places of this rank's tokens among
    those of all rows, and the decisions."""
    seen: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    ids = _ids(case, groups, 0)
    place = groups.coordinates
    for chunk in chunks:
        for layer, router in chunk.routers():
            calls: list[None] = []

            def note(_module: Any, inputs: Any, output: Any, layer: int = layer, calls: list = calls) -> None:
                # with recompute the first, gradient-free call of a microbatch is repeated: count the repeated one
                if not torch.is_grad_enabled() or len(calls) >= len(ids):
                    return
                packed, row = inputs[1], ids[len(calls)][0]
                numbers = packed.split.token_numbers(packed.rank).chunk(case.layout.tp)[place["tp"]]
                seen[layer, row] = (row * SEQUENCE + numbers.numpy(), output[1].cpu().numpy().copy())
                calls.append(None)

            router.register_forward_hook(note)
    return seen


def assemble(ranks: list[Pieces], *, tolerance: float) -> dict[str, np.ndarray]:
    """Put the ranks' pieces together; copies of one place on several ranks must agree."""
    whole: dict[str, np.ndarray] = {}
    written: dict[str, np.ndarray] = {}
    for pieces in ranks:
        for key, parts in pieces.items():
            for offset, shape, values in parts:
                tensor = whole.setdefault(key, np.zeros(shape, dtype=values.dtype))
                done = written.setdefault(key, np.zeros(shape, dtype=bool))
                at = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
                if done[at].any():
                    assert relative_rms(values, tensor[at]) <= tolerance, (
                        f"copies of {key} differ between ranks"
                    )
                tensor[at] = values
                done[at] = True
    missing = [key for key, done in written.items() if not done.all()]
    assert not missing, f"no rank holds all of {missing}"
    return whole


def assemble_routing(ranks: list[dict[str, Any]]) -> dict[int, np.ndarray]:
    """Layer -> decisions [rows * S, E] of the first step."""
    whole: dict[int, np.ndarray] = {}
    for rank in ranks:
        for (layer, _), (places, kept) in rank["routing"].items():
            decisions = whole.setdefault(
                layer, np.zeros((GLOBAL_ROWS * SEQUENCE, MODEL.num_experts), dtype=bool)
            )
            decisions[places] = kept
    return whole


def relative_rms(values: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square error over the reference's root mean square."""
    scale = float(np.sqrt(np.mean(np.square(reference, dtype=np.float64))))
    error = float(np.sqrt(np.mean(np.square(values.astype(np.float64) - reference))))
    return error / max(scale, 1e-12)
