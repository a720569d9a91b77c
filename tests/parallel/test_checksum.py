"""The checksum of stored numbers: the same however they arrive, another one after any small change."""

from __future__ import annotations

import numpy as np

from parallel.checksum import BLOCK_BYTES, Checksum

NUMBERS = np.random.default_rng(0).integers(0, 256, 2 * BLOCK_BYTES + 12345, dtype=np.uint8)


def of(*parts: np.ndarray) -> str:
    checksum = Checksum()
    for part in parts:
        checksum.add_blocks(part.data)
    return checksum.hexdigest()


def test_it_does_not_depend_on_how_blocks_arrive() -> None:
    assert of(NUMBERS) == of(NUMBERS[:BLOCK_BYTES], NUMBERS[BLOCK_BYTES:])
    assert of(NUMBERS) == of(NUMBERS[: 2 * BLOCK_BYTES], NUMBERS[2 * BLOCK_BYTES :])


def test_flips_exchanges_and_zeros_change_it() -> None:
    seen = {of(NUMBERS)}
    for place in (0, 7, 4095, 4096, BLOCK_BYTES - 1, BLOCK_BYTES, len(NUMBERS) - 1):
        for bit in (0, 7):
            changed = NUMBERS.copy()
            changed[place] ^= 1 << bit
            seen.add(of(changed))
    pages = NUMBERS.copy().reshape(-1)
    pages[:4096], pages[4096:8192] = NUMBERS[4096:8192], NUMBERS[:4096]
    seen.add(of(pages))
    words = NUMBERS.copy()
    words[:8], words[8:16] = NUMBERS[8:16], NUMBERS[:8]
    seen.add(of(words))
    lost = NUMBERS.copy()
    lost[8192:12288] = 0
    seen.add(of(lost))
    blocks = np.concatenate(
        [NUMBERS[BLOCK_BYTES : 2 * BLOCK_BYTES], NUMBERS[:BLOCK_BYTES], NUMBERS[2 * BLOCK_BYTES :]]
    )
    seen.add(of(blocks))
    seen.add(of(NUMBERS[:-1]))
    assert len(seen) == 1 + 14 + 5
