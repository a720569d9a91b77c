"""Keyed permutations that are never stored: item -> place in O(1), from a 64-bit key.

A Feistel network over the smallest even split of bits that holds the items; places outside the range
are sent through again (cycle walking, Black and Rogaway 2002), which keeps the map one-to-one. Only
integer arithmetic is used, so the order is the same on every machine and with every numpy.
"""

import hashlib
from typing import TypeVar

import numpy as np

NUM_ROUNDS = 8
MASK_64 = 0xFFFF_FFFF_FFFF_FFFF
GOLDEN_64 = 0x9E37_79B9_7F4A_7C15

Places = TypeVar("Places", int, np.ndarray)
"""One place, or a uint64 array of them: the arithmetic is the same."""


def derive_key(seed: int, *names: int | str) -> int:
    """A 64-bit key for one use of a seed; other names give an unrelated key."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(value: Places, key: int) -> Places:
    """32 well-mixed bits of `value` and `key`, for one integer or a uint64 array."""
    mixed = ((value ^ key) * GOLDEN_64) & MASK_64
    mixed = ((mixed ^ (mixed >> 32)) * 0xD6E8_FEB8_6659_FD93) & MASK_64
    return mixed >> 32


class KeyedPermutation:
    """A permutation of range(num_items) chosen by `key`; `permutation(i)` is where item i goes."""

    def __init__(self, num_items: int, key: int) -> None:
        assert 0 < num_items < 2**62, num_items
        self.num_items = num_items
        num_bits = max(2, (num_items - 1).bit_length())
        self._left_bits = num_bits // 2
        self._right_bits = num_bits - self._left_bits
        self._round_keys = [(_mix(key, 2 * n) << 32) | _mix(key, 2 * n + 1) for n in range(NUM_ROUNDS)]

    def __call__(self, item: int) -> int:
        """The place of one item."""
        assert 0 <= item < self.num_items, (item, self.num_items)
        place = self._rounds(item)
        while place >= self.num_items:
            place = self._rounds(place)
        return place

    def all(self) -> np.ndarray:
        """The places of all items: int64 [num_items]."""
        places = self._rounds(np.arange(self.num_items, dtype=np.uint64))
        outside = np.flatnonzero(places >= self.num_items)
        while len(outside):
            places[outside] = self._rounds(places[outside])
            outside = outside[places[outside] >= self.num_items]
        return places.astype(np.int64)

    def _rounds(self, value: Places) -> Places:
        left_bits, right_bits = self._left_bits, self._right_bits
        left, right = value >> right_bits, value & ((1 << right_bits) - 1)
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right, key) & ((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return left << right_bits | right
