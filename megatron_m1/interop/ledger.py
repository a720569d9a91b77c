"""The account of a conversion: what was read, what was written, and proof that it happened exactly once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch.distributed as dist


@dataclass(slots=True)
class Ledger:
    """Elements moved, by tensor name. Each rank counts only the parts it owns; `settle` adds the ranks up."""

    consumed: Counter[str] = field(default_factory=Counter)
    """Elements read of every source tensor."""
    written: Counter[str] = field(default_factory=Counter)
    """Elements written of every target tensor."""
    ignored: tuple[str, ...] = ()
    """Source tensors that are left out on purpose: constants that the target computes itself."""
    rounded: set[str] = field(default_factory=set)
    """Source tensors stored in a wider dtype than their target's."""

    def record(self, source: str, target: str, num_elements: int) -> None:
        """Note that a part of `source` became a part of `target`."""
        self.consumed[source] += num_elements
        self.written[target] += num_elements

    def settle(self, sources: dict[str, int], targets: dict[str, int]) -> Ledger:
        """Add up all ranks and compare with the number of elements that every tensor has.

        Raises:
            RuntimeError: a tensor was not moved exactly once; it is named. No user can cause this.
        """
        ledgers: list[Ledger | None] = [None] * dist.get_world_size()
        dist.all_gather_object(ledgers, self)
        total = Ledger(ignored=self.ignored)
        for ledger in ledgers:
            assert ledger is not None, "a rank sent no ledger"
            total.consumed += ledger.consumed
            total.written += ledger.written
            total.rounded |= ledger.rounded
        wrong = [
            f"{role} {name}: {moved[name]} of {expected.get(name, 0)} elements"
            for role, moved, expected in (
                ("source", total.consumed, sources),
                ("target", total.written, targets),
            )
            for name in sorted(moved.keys() | expected.keys())
            if moved[name] != expected.get(name, 0)
        ]
        if wrong:
            raise RuntimeError(
                f"{len(wrong)} tensors were not converted exactly once: {'; '.join(wrong[:20])}"
            )
        return total
