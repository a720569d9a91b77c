"""The section `long_context` of a run file; apart from the measuring itself, so that reading a run file loads no
megatron-core.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_NEEDLES = 10
"""Needles in one text: each belongs to another city."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongContextConfig:
    """What is measured of long contexts, at the end of every stage and in between."""

    needle_lengths: tuple[int, ...] = ()
    """Tokens of the texts that hide a needle; () looks for none. Lengths above the stage's rows show extrapolation."""
    needle_depths: int = 5
    """Depths, evenly from the beginning to the end of the text."""
    needle_trials: int = 4
    """Texts per length and depth."""
    multi_needles: int = 0
    """Needles hidden together in one text of each of these lengths, at even depths, and asked for together; 0 looks for
    none."""
    position_rows: int = 0
    """Held-out rows whose loss is measured by position; 0 measures none."""
    every_steps: int = 0
    """Steps between measurements; 0 measures at the end of stages only."""

    def __post_init__(self) -> None:
        for name in ("needle_depths", "needle_trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"long_context.{name}={getattr(self, name)}: it must be 1 or more")
        for name in ("position_rows", "every_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"long_context.{name}={getattr(self, name)}: it must be 0 (off) or more")
        if self.multi_needles and not 2 <= self.multi_needles <= MOST_NEEDLES:
            raise ValueError(
                f"long_context.multi_needles={self.multi_needles}: it must be 2 to {MOST_NEEDLES} needles, or 0 for "
                f"none; choose {min(max(self.multi_needles, 2), MOST_NEEDLES)}"
            )
        if any(length < 64 for length in self.needle_lengths):
            raise ValueError(
                f"long_context.needle_lengths={list(self.needle_lengths)}: a text with a needle has 64 tokens or more"
            )

    @property
    def depths(self) -> list[float]:
        """Depths of needles, 0 at the beginning."""
        return [i / max(1, self.needle_depths - 1) for i in range(self.needle_depths)]
