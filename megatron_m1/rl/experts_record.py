"""Which experts every token of a generated sequence took, put together from what each rank saw of it.

A rank sees its own layers and its tp share of the tokens of every pass; the parts meet once, when the samples are done.
Legend: T tokens of a microbatch, t this rank's tp share of them, W tokens of a prompt and its answer, L layers, l this
rank's layers, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_m1.model.routing import RoutingRecord
from parallel.groups import Groups

Key = tuple[int, int]
"""Prompt and sample."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring tokens of one sequence in a microbatch."""

    key: Key
    first: int
    """Position of the first of them in its sequence."""
    count: int


class ExpertsRecord:
    """The record of one replica's sequences on this rank.

    Args:
        chunks: this rank's model chunks, unwrapped.
        groups: process groups.
    """

    def __init__(self, chunks: Sequence[Any], groups: Groups) -> None:
        self._groups = groups
        self._layers = sorted(layer for chunk in chunks for layer, _ in chunk.routers())
        model = chunks[0].model
        self._num_layers, self._choices = model.num_layers, model.experts_per_token
        self._dtype = np.int8 if model.num_experts <= 128 else np.int16
        self._kept: dict[Key, np.ndarray] = {}

    def note(self, record: RoutingRecord, stretches: Sequence[Stretch], num_tokens: int) -> None:
        """Keep what one pass decided.

        Args:
            record: of this rank's layers and share.
            stretches: the microbatch in its order, without the padding at its end.
            num_tokens: T, padding included.
        """
        tlk = record.of_layers(self._layers).cpu().numpy().astype(self._dtype)
        tp = self._groups.collection.tp
        share = num_tokens // tp.size()
        own_start, own_stop = share * tp.rank(), share * (tp.rank() + 1)
        begin = 0
        for stretch in stretches:
            start, stop = max(begin, own_start), min(begin + stretch.count, own_stop)
            kept = self._with_room(stretch.key, stretch.first + stretch.count)
            if start < stop:
                shift = stretch.first - begin
                kept[start + shift : stop + shift] = tlk[start - own_start : stop - own_start]
            begin += stretch.count

    def copy(self, source: Key, target: Key) -> None:
        """A sequence begins as another one did: they share a prompt that was read once."""
        self._kept[target] = self._kept[source].copy()

    def gather(self, lengths: dict[Key, int]) -> dict[Key, np.ndarray]:
        """[length, L, k] of each sequence, whole, on all tp and pp ranks; collective over them.

        Args:
            lengths: tokens of each sequence that the model has read; the same on these ranks.
        """
        total = sum(lengths.values())
        parts = [self._kept[key][:length] for key, length in lengths.items()]
        whole = np.full((total, self._num_layers, self._choices), -1, dtype=self._dtype)
        if parts:
            whole[:, self._layers] = np.concatenate(parts)
        # process groups reduce no 16-bit integers
        wire = torch.from_numpy(whole.astype(np.int32 if self._dtype == np.int16 else np.int8))
        wire = wire.to(self._groups.device)
        for group in (self._groups.collection.tp, self._groups.collection.pp):
            if group.size() > 1:
                dist.all_reduce(wire, op=dist.ReduceOp.MAX, group=group)
        joined = wire.cpu().numpy().astype(self._dtype)
        assert joined.size == 0 or joined.min() >= 0, "a token that was read has no record"
        borders = np.cumsum(list(lengths.values()))[:-1]
        return dict(zip(lengths, np.split(joined, borders), strict=True)) if lengths else {}

    def _with_room(self, key: Key, tokens: int) -> np.ndarray:
        """A sequence's record with room for `tokens`; doubles, so that growing costs a constant per token."""
        old = self._kept.get(key)
        if old is None or len(old) < tokens:
            shape = max(64, 2 * tokens), len(self._layers), self._choices
            grown = np.full(shape, -1, dtype=self._dtype)
            if old is not None:
                grown[: len(old)] = old
            self._kept[key] = old = grown
        return old
