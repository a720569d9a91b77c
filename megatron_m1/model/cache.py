"""What generation keeps of sequences between forward passes: lightning states, and keys and values of softmax layers.

A forward pass EXTENDS sequences: every document of its microbatch holds the next tokens of the sequence in one slot,
one token in decode, many in prefill, in any mix. A lightning layer keeps a state of constant size; only the few
softmax layers keep something that grows with the sequence.
Legend: N documents, T tokens of the microbatch, h heads and g key/value heads of this rank, K and V head channels,
S slots, C tokens that a slot has room for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_m1.model.packed import Packed


class SequenceCache:
    """State of `num_slots` sequences on this rank, for the layers that this rank holds.

    One slot more than asked for is kept: the scratch slot, where padding tokens go.

    Args:
        num_slots: sequences that are generated at once.
        window: most tokens of a sequence; room is made as sequences grow.
        device: where the model is.
    """

    def __init__(self, num_slots: int, window: int, device: torch.device) -> None:
        self.num_slots, self.window, self.device = num_slots, window, device
        self.lengths = [0] * (num_slots + 1)
        self._states: dict[int, torch.Tensor] = {}
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    @property
    def scratch(self) -> int:
        """The slot of padding tokens."""
        return self.num_slots

    def start(self, slot: int) -> None:
        """Forget the sequence in a slot: the next document in it is the beginning of another."""
        self.lengths[slot] = 0
        for states in self._states.values():
            states[slot] = 0

    def copy(self, source: int, target: int) -> None:
        """Give a slot the sequence of another one: a prompt of several samples is read once."""
        self.lengths[target] = self.lengths[source]
        for states in self._states.values():
            states[target] = states[source]
        for kept in (*self._keys.values(), *self._values.values()):
            kept[target, : self.lengths[source]] = kept[source, : self.lengths[source]]

    def states(self, layer: int, heads: int, key_dim: int, value_dim: int) -> torch.Tensor:
        """fp32 [S, h, K, V]: states of one lightning layer (global index from 0), to be updated in place."""
        if layer not in self._states:
            shape = (self.num_slots + 1, heads, key_dim, value_dim)
            self._states[layer] = torch.zeros(shape, device=self.device)
        return self._states[layer]

    def append(
        self, layer: int, k_TgK: torch.Tensor, v_TgV: torch.Tensor, packed: Packed
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the keys (rotated) and values of a microbatch of one softmax layer.

        Returns:
            Keys [S, C, g, K] and values [S, C, g, V] of all slots; what lies behind a sequence's length is garbage.
        """
        extension = extension_of(packed)
        room = max(self.lengths[slot] + n for slot, n in extension.growth(packed))
        for kept, new in ((self._keys, k_TgK), (self._values, v_TgV)):
            kept[layer] = self._with_room(kept.get(layer), new, room)
            kept[layer][extension.slots_T, packed.positions_T] = new
        return self._keys[layer], self._values[layer]

    def _with_room(self, old: torch.Tensor | None, like: torch.Tensor, room: int) -> torch.Tensor:
        """At least `room` tokens per slot; doubles, so that growing costs a constant per token."""
        capacity = 0 if old is None else old.shape[1]
        if old is not None and room <= capacity:
            return old
        grown = like.new_zeros(
            self.num_slots + 1, min(max(64, 2 * room), max(self.window, room)), *like.shape[1:]
        )
        if old is not None:
            grown[:, :capacity] = old
        return grown

    def advance(self, packed: Packed) -> None:
        """Count the tokens of a microbatch that every layer has seen."""
        for slot, tokens in extension_of(packed).growth(packed):
            if slot != self.scratch:
                self.lengths[slot] += tokens


@dataclass(frozen=True, slots=True)
class Extension:
    """Which sequence each document of a microbatch continues. Travels inside `Packed`."""

    cache: SequenceCache
    slots_N: tuple[int, ...]
    """By document; the leading `num_single` documents hold one token each and no slot twice."""
    num_single: int
    slots_T: torch.Tensor
    """int64 [T]: the slot of each token."""

    @property
    def single_rows(self) -> slice | torch.Tensor:
        """The leading documents' slots as an index: a slice, which copies nothing, where they lie side by side."""
        slots = self.slots_N[: self.num_single]
        first = slots[0] if slots else 0
        if slots == tuple(range(first, first + len(slots))):
            return slice(first, first + len(slots))
        return torch.tensor(slots, device=self.slots_T.device)

    def growth(self, packed: Packed) -> list[tuple[int, int]]:
        """(slot, new tokens) of every document."""
        return list(zip(self.slots_N, packed.document_lengths, strict=True))


def extending(cache: SequenceCache, slots_N: list[int], lengths_N: list[int], num_single: int) -> Packed:
    """The structure of a microbatch whose documents continue sequences.

    Args:
        cache: of these sequences.
        slots_N: the sequence of each document.
        lengths_N: new tokens of each document.
        num_single: leading documents that are computed as decode steps; they hold one token each.

    Raises:
        ValueError: a sequence grows past the window, or a leading document is not one token.
    """
    if any(length != 1 for length in lengths_N[:num_single]):
        raise ValueError(
            f"the first {num_single} documents have {lengths_N[:num_single]} tokens: a decode step has 1 each; put "
            "longer documents behind them"
        )
    for slot, length in zip(slots_N, lengths_N, strict=True):
        if cache.lengths[slot] + length > cache.window and slot != cache.scratch:
            raise ValueError(
                f"slot {slot} holds {cache.lengths[slot]} tokens and is to grow by {length}: the window is "
                f"{cache.window} tokens; end the sequence, or make the cache with a window of "
                f"{cache.lengths[slot] + length} or more"
            )
    tokens = sum(lengths_N)
    packed = Packed.from_lengths(lengths_N, row_tokens=tokens, auxiliary_weight=0.0, device=cache.device)
    counts_N = torch.tensor(lengths_N)
    starts_T = torch.tensor([cache.lengths[slot] for slot in slots_N]).repeat_interleave(counts_N)
    slots_T = torch.tensor(slots_N).repeat_interleave(counts_N).to(cache.device)
    return replace(
        packed,
        positions_T=packed.positions_T + starts_T.to(cache.device),
        extension=Extension(cache, tuple(slots_N), num_single, slots_T),
    )


def extension_of(packed: Packed) -> Extension:
    """The extension of a microbatch that has one."""
    assert packed.extension is not None, packed
    return packed.extension
