"""Weights alone, out of any checkpoint or into one of their own: what a generation server is given.

A checkpoint of weights has the format of a run's; only the optimizer and the position are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_m1.model.hybrid import HybridModel
from parallel.checkpoint import CheckpointStore
from parallel.checkpoint_config import CheckpointConfig
from parallel.groups import Groups
from parallel.manifest import step_path

BESIDE_WEIGHTS = ("optimizer.", "array.")
"""Prefixes of what a training checkpoint holds besides weights."""


def load_weights(store: CheckpointStore, step: int, chunks: Sequence[HybridModel]) -> dict[str, Any]:
    """Put the weights of a checkpoint, saved under any layout, into these chunks; collective.

    Returns:
        What was kept beside the state.

    Raises:
        CheckpointError: damaged or of another model; the chunks are as they were then.
    """
    state, extra = store.load(step, {"weights": _weights(chunks)}, ignore=BESIDE_WEIGHTS)
    with torch.no_grad():
        for index, chunk in enumerate(chunks):
            parameters = dict(chunk.named_parameters())
            for name, value in state["weights"][str(index)].items():
                parameters[name].copy_(value)
    return extra


class WeightsExport:
    """Writes the weights of a model in training for a server; the newest two are kept.

    Args:
        directory: receives step_N directories.
        chunks: this rank's model chunks, unwrapped.
        groups: process groups.
    """

    def __init__(self, directory: Path, chunks: Sequence[HybridModel], groups: Groups) -> None:
        self._chunks = chunks
        self._store = CheckpointStore(directory, CheckpointConfig(keep=2, asynchronous=False), groups)
        self._store.clean()

    def __call__(self, step: int) -> Path:
        """Write the present weights as those of `step` and wait until they are whole; where. Collective."""
        self._store.save(step, {"weights": _weights(self._chunks)}, {})
        self._store.wait()
        return step_path(self._store.directory, step)


def _weights(chunks: Sequence[HybridModel]) -> dict[str, Any]:
    return {str(index): chunk.logical_tensors() for index, chunk in enumerate(chunks)}
