"""How far a run has come: data order, schedule and stages are functions of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Position:
    """How far a run has come. The data order and the schedule are functions of it."""

    step: int = 0
    """Optimizer steps taken."""
    consumed_samples: int = 0
    """Rows of all global batches so far: the loader's only state besides the seed."""
    consumed_tokens: int = 0
    """Tokens of those rows."""
