"""Everything a run needs to go on exactly: weights, optimizer, random state and the position in data and schedule.

Tensors travel as megatron-core sharded tensors under logical names; the rest is JSON in the checkpoint's manifest.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_m1.model.hybrid import HybridModel
from megatron_m1.training.optimizer import Optimizer
from megatron_m1.training.position import Position


class StateTarget(Protocol):
    """What a state is saved to: the checkpoints of a run, or the copies on its nodes."""

    def save(self, step: int, sharded_state: dict[str, Any], extra: dict[str, Any]) -> None:
        """Save it; collective."""


class StateSource(Protocol):
    """What a state is loaded from: the same two."""

    directory: Path
    """For messages."""

    def about(self, step: int) -> dict[str, Any]:
        """The JSON of a step; collective."""

    def load(self, step: int, template: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The template filled, and the JSON; collective."""


def save_state(
    targets: Sequence[StateTarget],
    position: Position,
    chunks: Sequence[HybridModel],
    optimizer: Optimizer,
    extra: dict[str, Any],
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Start to save the whole state; collective.

    Args:
        targets: where to.
        position: how far the run has come.
        chunks: this rank's model chunks.
        optimizer: of them.
        extra: kept beside the state as JSON.
        arrays: by name, further numbers that are the same on every rank; empty ones are left out.
    """
    weights = _weights(chunks)
    given = {name: torch.from_numpy(array) for name, array in (arrays or {}).items() if array.size}
    state = {"weights": weights, "optimizer": optimizer.sharded_state(weights), "arrays": _shared(given)}
    about = {name: [str(tensor.dtype)[6:], list(tensor.shape)] for name, tensor in given.items()}
    extra = extra | {"position": asdict(position), "random": random_state(), "arrays": about}
    for target in targets:
        target.save(position.step, state, extra)


def load_state(
    source: StateSource, step: int, chunks: Sequence[HybridModel], optimizer: Optimizer
) -> tuple[Position, dict[str, Any]]:
    """Load a saved state into this process; from a checkpoint, under whatever layout it was saved. Collective.

    Returns:
        The position, and what `save_state` was given as `extra`, with its arrays under "arrays".

    Raises:
        CheckpointError: damaged or of another model; nothing in this process has been trained on then.
    """
    weights = _weights(chunks)
    # checkpoints of versions without arrays have no such entry
    about = source.about(step).get("arrays", {})
    empty = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in about.items()}
    template = {
        "weights": weights,
        "optimizer": optimizer.sharded_template(weights),
        "arrays": _shared(empty),
    }
    state, extra = source.load(step, template)
    with torch.no_grad():
        for index, chunk in enumerate(chunks):
            parameters = dict(chunk.named_parameters())
            for name, value in state["weights"][str(index)].items():
                parameters[name].copy_(value)
    optimizer.load_sharded_state(state["optimizer"])
    set_random_state(extra.pop("random"))
    extra["arrays"] = {name: state["arrays"][name].numpy() for name in about}
    return Position(**extra.pop("position")), extra


def _weights(chunks: Sequence[HybridModel]) -> dict[str, Any]:
    return {str(index): chunk.logical_tensors() for index, chunk in enumerate(chunks)}


def _shared(tensors: Mapping[str, torch.Tensor]) -> dict[str, ShardedTensor]:
    """Tensors that every rank holds whole, as sharded ones that rank 0 writes."""
    return {
        name: ShardedTensor.from_rank_offsets(f"array.{name}", tensor, replica_id=dist.get_rank())
        for name, tensor in tensors.items()
    }


def random_state() -> dict[str, str]:
    """State of every generator of this process as text; training draws from none of them, user code may."""
    generators = {"torch": torch.get_rng_state().numpy().tobytes()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    state = {name: base64.b64encode(raw).decode() for name, raw in generators.items()}
    return state | {
        "python": _to_json(random.getstate()),
        "numpy": _to_json(np.random.get_state(legacy=True)),
    }


def set_random_state(state: dict[str, str]) -> None:
    """Put back what `random_state` read. Rank 0's state is everybody's: ranks differ by explicit seeds only."""

    def tensor(name: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(state[name])), dtype=torch.uint8)

    torch.set_rng_state(tensor("torch"))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(tensor("cuda"))
    version, words, gauss = _from_json(state["python"])
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = _from_json(state["numpy"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def _to_json(value: Any) -> str:
    return json.dumps(value, default=lambda array: array.tolist())


def _from_json(text: str) -> Any:
    return json.loads(text)
