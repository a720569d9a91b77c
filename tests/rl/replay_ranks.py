"""What the ranks of the replay tests do: train on recorded experts, and say which experts the routers took."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_m1.model.routing import RoutingRecord
from megatron_m1.rl.sample import Prompt, Sample
from megatron_m1.training.batch import make_microbatch, sample_ids
from megatron_m1.training.step import run_microbatches, wrap_for_gradients
from parallel.groups import Groups, create_groups, destroy_groups
from parallel.layout import Layout
from tests.rl import generate_ranks

ROW_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """One answer in a row of its own, the rest of the row padding."""

    tokens_S: np.ndarray
    labels_S: np.ndarray
    loss_mask_S: np.ndarray
    document_lengths: list[int]
    sample_id: int
    experts_SLk: np.ndarray | None


@dataclass(frozen=True)
class Trained:
    """What one rank saw of one step."""

    loss: float
    router_gradients: dict[int, np.ndarray]
    """By layer."""
    agree: int
    """Decisions of this rank's layers and tokens that are those on record."""
    differ: int


def make_rows(prompts: dict[int, Prompt], samples: list[Sample]) -> list[Row]:
    """Rows whose experts are those of generation."""
    rows = []
    for number, sample in enumerate(samples):
        whole = np.concatenate([prompts[sample.prompt_id].tokens_S, sample.tokens_S])
        length = len(whole) - 1
        numbers = np.zeros((2, ROW_TOKENS), dtype=np.int64)
        numbers[:, :length] = whole[:-1], whole[1:]
        mask = np.zeros(ROW_TOKENS, dtype=np.float32)
        mask[length - len(sample.tokens_S) + 1 : length] = 1.0
        experts = sample.experts_WLk
        assert experts is not None, number
        filled = np.full((ROW_TOKENS, *experts.shape[1:]), -1, dtype=experts.dtype)
        filled[:length] = experts
        rest = [ROW_TOKENS - length] if length < ROW_TOKENS else []
        rows.append(Row(*numbers, mask, [length, *rest], number, filled))
    return rows


def train_in_layouts(layouts: list[tuple[Layout, str]], rows: list[Row]) -> list[Trained]:
    """One step's gradients in several layouts of one world size; each with its kind of recompute."""
    found = []
    for layout, recompute in layouts:
        groups = create_groups(layout, torch.device("cpu"))
        found.append(train(groups, rows, recompute))
        destroy_groups()
    return found


def train(groups: Groups, rows: list[Row], recompute: str = "none") -> Trained:
    """One step's gradients, with routers that by themselves would choose other experts than in generation."""
    chunks = generate_ranks.build(groups, recompute=recompute)
    with torch.no_grad():
        for chunk in chunks:
            for _, router in chunk.routers():
                router.weight.neg_()
    wrapped = wrap_for_gradients(chunks, groups)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    ids = sample_ids(
        consumed=0,
        global_rows=len(rows),
        micro_batch=1,
        data_parallel=groups.layout.dp,
        data_rank=groups.coordinates["dp"],
    )
    microbatches = []
    for numbers in ids:
        microbatch = make_microbatch(
            [rows[number] for number in numbers],
            global_rows=len(rows),
            device=groups.device,
            piece=groups.piece,
        )
        microbatches.append(replace(microbatch, packed=replace(microbatch.packed, record=RoutingRecord())))
    result = run_microbatches(wrapped, microbatches, groups, reduce_everywhere=True)
    gradients = {
        layer: router.weight.main_grad.clone().numpy()
        for chunk in chunks
        for layer, router in chunk.routers()
    }
    counts = np.zeros(2, dtype=int)
    for numbers, microbatch in zip(ids, microbatches, strict=True):
        counts += _compare(microbatch.packed, [rows[number] for number in numbers], sorted(gradients), groups)
    return Trained(result.loss_nats, gradients, *counts)


def _compare(packed: Any, rows: list[Row], layers: list[int], groups: Groups) -> np.ndarray:
    """Numbers of decisions that agree and that differ, worked out from the rows of the global batch."""
    whole = np.concatenate([row.experts_SLk for row in rows])
    own = whole[packed.split.token_numbers(packed.rank).numpy()]
    place = groups.coordinates["tp"]
    own = np.split(own, groups.layout.tp)[place][:, layers]
    taken = packed.record.of_layers(layers).numpy()
    known = own[..., 0] >= 0
    same = (np.sort(own, axis=-1) == np.sort(taken, axis=-1)).all(-1)
    return np.array([(same & known).sum(), (~same & known).sum()])
