"""When a run saves, what goes into its checkpoints besides the state, and when a life ends before the last step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.config import data_identity
from megatron_m1.model.hybrid import HybridModel
from megatron_m1.stages import Stage
from megatron_m1.training.early_end import EarlyEnd
from megatron_m1.training.health import BrokenRun
from megatron_m1.training.optimizer import Optimizer
from megatron_m1.training.position import Position
from megatron_m1.training.state import save_state
from parallel.checkpoint import CheckpointStore
from parallel.groups import Groups
from parallel.hang import Watchdog
from parallel.launch import job_ends_at_s
from parallel.local_copies import LocalCopies


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedParts:
    """What a checkpoint is made of."""

    store: CheckpointStore
    copies: LocalCopies | None
    """On the nodes' own disks, where the run keeps some."""
    chunks: list[HybridModel]
    optimizer: Optimizer
    before_save: Sequence[Callable[[], None]]
    """Called before each save; one puts the record of the steps, which the checkpoint builds on, on the disk."""
    checkpoint_begins: Callable[[], None]
    """Called before each save to the shared checkpoints."""
    mlflow_run_id: Callable[[], str | None]
    losses: Callable[[], list[float]]
    """The window that loss spikes are measured against."""
    gradient_norms: Callable[[], dict[str, Any]]
    """What an explosion behind a length jump is measured against."""
    watchdog: Watchdog
    """Is told of progress while a save is waited for."""


class Saves:
    """Called after every step, on every rank; also measures what a save takes, for the one before the time is up."""

    def __init__(self, stage: Stage, run_file: str, groups: Groups, parts: SavedParts) -> None:
        self._stage, self._config, self._run_file = stage, stage.config, run_file
        self._parts = parts
        self.also: Callable[[], tuple[dict[str, Any], dict[str, np.ndarray]]] = lambda: ({}, {})
        """What the stage stores besides: JSON values and arrays, the same on every rank; collective."""
        self._begun_s: float | None = None
        parts.store.on_progress = parts.watchdog.beat

        def largest(number: int) -> int:
            shared = torch.tensor([number], dtype=torch.int32, device=groups.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            return int(shared)

        self._early_end = EarlyEnd(
            ends_at_s=job_ends_at_s(), margin_s=self._config.training.end_margin_s, agree=largest
        )

    def after_step(self, place: Position) -> str | None:
        """Save if it is time; why the run ends here, None to go on. Collective."""
        config, parts = self._config.checkpoint, self._parts
        self._note(parts.store.poll())
        reason = self._early_end.reason()
        last = place.step == self._stage.last.step or reason is not None
        targets: list[CheckpointStore | LocalCopies] = []
        if last or (config.every_steps and place.step % config.every_steps == 0):
            parts.checkpoint_begins()
            self._begun_s = time.monotonic()
            targets.append(parts.store)
        # after the last save of a life nothing is left that a copy could save
        if parts.copies is not None and not last and place.step % config.local.every_steps == 0:
            targets.append(parts.copies)
        if targets:
            self._save(place, targets)
        if last:
            self._note(parts.store.wait())
        return reason

    def _save(self, place: Position, targets: Sequence[CheckpointStore | LocalCopies]) -> None:
        parts = self._parts
        for action in parts.before_save:
            action()
        further, arrays = self.also()
        about = further | {
            "data": data_of(self._stage),
            "mlflow_run_id": parts.mlflow_run_id(),
            "run_file": self._run_file,
            "losses": parts.losses(),
            "gradient_norms": parts.gradient_norms(),
        }
        save_state(targets, place, parts.chunks, parts.optimizer, about, arrays)

    def _note(self, published: int | None) -> None:
        if published is not None and self._begun_s is not None:
            self._early_end.save_took(time.monotonic() - self._begun_s)
            self._begun_s = None


@contextmanager
def broken_set_aside(store: CheckpointStore) -> Iterator[None]:
    """Where training ends because a step has broken the weights, set aside what was saved after it; collective."""
    try:
        yield
    except BrokenRun as error:
        store.set_aside(error.broken_step)
        raise


def data_of(stage: Stage, num_mixes: int | None = None) -> dict[str, Any]:
    """What the meaning of a count of consumed samples depends on, as JSON values.

    Args:
        stage: that trains.
        num_mixes: mixes of the data that count: those that have begun; a later one may still change. The end of one
            may not: it decides which rows are read before it. None: those begun when the stage ends.
    """
    count = stage.num_mixes if num_mixes is None else num_mixes
    data = replace(stage.data, stages=stage.data.stages[:count])
    return data_identity(data, list(stage.sequence_lengths[:count]), stage.config.seed)
