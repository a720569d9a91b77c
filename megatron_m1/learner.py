"""What a run builds for a stage before it trains, whatever the stage learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_m1.model.hybrid import HybridModel
from megatron_m1.saves import Saves
from megatron_m1.training.optimizer import Optimizer
from megatron_m1.training.position import Position
from megatron_m1.vitals import Vitals
from parallel.groups import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerParts:
    """One rank's share of a stage, loaded."""

    groups: Groups
    chunks: list[HybridModel]
    wrapped: list[Any]
    """The chunks inside megatron-core's DistributedDataParallel."""
    optimizer: Optimizer
    vitals: Vitals
    saves: Saves
    position: Position
    stored: dict[str, Any]
    """What the checkpoint holds beside weights and optimizer; empty at a fresh start."""
