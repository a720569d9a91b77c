"""Reading a long prompt on all context-parallel ranks together, so that each of them can go on decoding alone.

Each rank computes its piece of the tokens as in training (LASP+ and the varlen ring); then every rank's cache gets what
one process would have: the lightning states after the last token, and all keys and values of the softmax layers.
Legend: T this rank's tokens, N documents, h and g heads and key/value heads, K and V channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_m1.model.cache import Extension, SequenceCache, extending, extension_of
from megatron_m1.model.packed import Packed
from parallel.lasp import ContextShare, prefill_over_ranks
from parallel.split import Piece


@dataclass(frozen=True, slots=True)
class SplitExtension(Extension):
    """An extension of which each context-parallel rank computes a piece."""

    whole: Packed
    """The same microbatch as one rank would see it: the structure of what all ranks cache."""


def prefilling(cache: SequenceCache, slots_N: list[int], lengths_N: list[int], piece: Piece) -> Packed:
    """This rank's piece of a microbatch of prompts; after the pass, `cache.advance` wants its `extension.whole`.

    Args:
        cache: the sequences, alike on every context-parallel rank.
        slots_N: the sequence of each prompt.
        lengths_N: tokens of each prompt.
        piece: which tokens this rank holds.

    Raises:
        ValueError: a sequence that has been read from already, or that is longer than the window.
    """
    whole = extending(cache, slots_N, lengths_N, 0)
    begun = {slot: cache.lengths[slot] for slot in slots_N if cache.lengths[slot]}
    if begun:
        raise ValueError(
            f"slots hold tokens already (slot: tokens) {begun}: only whole prompts are split over context-parallel "
            "ranks; read a prompt in one pass, or read the rest of it on each rank alone"
        )
    tokens = sum(lengths_N)
    packed = Packed.from_lengths(
        lengths_N, row_tokens=tokens, auxiliary_weight=0.0, device=cache.device, piece=piece
    )
    slots_T = packed.split.cut(extension_of(whole).slots_T, packed.rank)
    return replace(packed, extension=SplitExtension(cache, tuple(slots_N), 0, slots_T, whole))


def prefill_lightning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    layer: int,
    packed: Packed,
    share: ContextShare,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Outputs [T, h, V] of one lightning layer; every rank of `group` keeps all documents' states."""
    extension = extension_of(packed)
    o, closed_NhKV = prefill_over_ranks(q, k, v, slopes, share)
    dist.all_reduce(closed_NhKV, group=group)
    states = extension.cache.states(layer, *closed_NhKV.shape[1:])
    states[list(extension.slots_N)] = closed_NhKV
    return o


def keep_keys(
    k_TgK: torch.Tensor, v_TgK: torch.Tensor, layer: int, packed: Packed, group: dist.ProcessGroup
) -> None:
    """Every rank of `group` keeps the keys (rotated) and values of all tokens of one softmax layer."""
    extension = extension_of(packed)
    assert isinstance(extension, SplitExtension), extension
    split = packed.split
    counts = [split.tokens_of(rank) for rank in range(split.num_ranks)]
    own = torch.stack([k_TgK, v_TgK], dim=1)
    sent = own.new_zeros(max(counts), *own.shape[1:])
    sent[: len(own)] = own
    gathered = own.new_empty(split.num_ranks, *sent.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), sent, group=group)
    kv = split.join([part[:count] for part, count in zip(gathered, counts, strict=True)])
    extension.cache.append(layer, kv[:, 0], kv[:, 1], extension.whole)
