"""What the ranks of the checkpoint tests do; every function here runs inside `run_ranks`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_m1.training.config import OptimizerConfig
from megatron_m1.training.optimizer import Optimizer, build_optimizer
from parallel.checkpoint import CheckpointStore
from parallel.checkpoint_config import CheckpointConfig
from parallel.groups import Groups, create_groups, destroy_groups
from parallel.layout import Layout
from parallel.manifest import read_manifest, step_path
from tests.parallel.small_model import build_chunks, set_gradients

LEARNING_RATE = 1e-2


@dataclass
class Trainer:
    """A model and its optimizer under one layout."""

    groups: Groups
    chunks: list[Any]
    optimizer: Optimizer
    done: list[float] = field(default_factory=list)

    def model_state(self) -> dict[str, Any]:
        return {"chunk0": self.chunks[0].module.sharded_state_dict()}

    def state(self) -> dict[str, Any]:
        model = self.model_state()
        return {"model": model, "optimizer": self.optimizer.sharded_state(model)}

    def template(self) -> dict[str, Any]:
        model = self.model_state()
        return {"model": model, "optimizer": self.optimizer.sharded_template(model)}

    def train(self, first: int, last: int) -> None:
        """Steps first..last, both included."""
        for step in range(first, last + 1):
            self.optimizer.zero_grad()
            set_gradients(self.chunks, step)
            self.done.append(self.optimizer.step(LEARNING_RATE))

    def load(self, store: CheckpointStore, step: int) -> dict[str, Any]:
        state, extra = store.load(step, self.template())
        self.chunks[0].module.load_state_dict(state["model"]["chunk0"], strict=True)
        self.optimizer.load_sharded_state(state["optimizer"])
        return extra


def start(layout: Layout, dtype: torch.dtype, config: OptimizerConfig | None = None) -> Trainer:
    """A fresh trainer; call `stop` before the next one in the same process."""
    groups = create_groups(layout, torch.device("cpu"))
    chunks = build_chunks(groups, dtype)
    return Trainer(groups, chunks, build_optimizer(chunks, config or OptimizerConfig(grad_clip=0.0), groups))


def open_store(directory: str, trainer: Trainer, **options: Any) -> CheckpointStore:
    return CheckpointStore(Path(directory), CheckpointConfig(**options), trainer.groups)


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every logical tensor of model and optimizer, put together from all ranks by key and offset."""
    from parallel import stored_tensors

    tensors, _ = stored_tensors.extract_tensors(trainer.state())
    own = [
        (leaf.key, leaf.global_shape, leaf.global_slice(), leaf.data.clone())
        for leaf in stored_tensors.leaves(tensors)
    ]
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, own)
    whole: dict[str, torch.Tensor] = {}
    for key, shape, place, data in (piece for rank in by_rank for piece in rank):
        target = whole.setdefault(key, torch.full(shape, float("nan")).to(data.dtype))
        target[place] = data.view(target[place].shape)
    return whole


def layouts_of_four(directory: str) -> dict[str, Any]:
    """One launch of four ranks for everything that needs no dead process; rank 0's view is what counts."""
    found: dict[str, Any] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found[name] = _save_and_resume(f"{directory}/{name}", dtype)
        for other in (Layout(tp=4, ep=2), Layout(pp=2, dp=2), Layout(dp=4, ep=4)):
            trainer = start(other, dtype)
            trainer.load(open_store(f"{directory}/{name}", trainer, keep=0), 3)
            found[name][_name(other)] = whole_state(trainer)
            trainer.train(4, 6)
            found[name][_name(other) + " trained on"] = whole_state(trainer)
            destroy_groups()
    return found


def _name(layout: Layout) -> str:
    return f"tp{layout.tp} pp{layout.pp} dp{layout.dp} ep{layout.ep}"


def _save_and_resume(directory: str, dtype: torch.dtype) -> dict[str, Any]:
    """TP2 x DP2 x EP2: six steps straight; saved after three; three resumed."""
    layout = Layout(tp=2, dp=2, ep=2)
    trainer = start(layout, dtype)
    store = open_store(directory, trainer, asynchronous=False, keep=0)
    found: dict[str, Any] = {"fresh": whole_state(trainer)}
    store.save(0, trainer.state(), {})
    trainer.train(1, 3)
    store.save(3, trainer.state(), {"position": 17, "text": "\u00e9"})
    found["saved"] = whole_state(trainer)
    found["bytes by rank"] = _sizes(store, 3)

    behind = open_store(f"{directory}.async", trainer, keep=0)
    behind.save(3, trainer.state(), {"position": 17, "text": "\u00e9"})
    found["published at once"] = behind.entries()
    trainer.train(4, 6)
    found["published"] = behind.wait()
    found["straight"], found["straight norms"] = whole_state(trainer), trainer.done[3:]
    destroy_groups()

    trainer = start(layout, dtype)
    store = open_store(directory, trainer, keep=0)
    found["extra"] = trainer.load(store, 3)
    found["loaded"], found["steps"] = whole_state(trainer), trainer.optimizer.num_steps
    trainer.train(4, 6)
    found["resumed"], found["resumed norms"] = whole_state(trainer), list(trainer.done)
    trainer.load(store, 0)
    found["back to fresh"] = whole_state(trainer)
    trainer.train(1, 3)
    found["trained again"] = whole_state(trainer)
    destroy_groups()
    return found


def _sizes(store: CheckpointStore, step: int) -> list[int]:
    records = {record.name: record.bytes for record in read_manifest(step_path(store.directory, step)).files}
    return [records[f"__{rank}_0.distcp"] for rank in range(dist.get_world_size())]


def load_alone(directory: str) -> dict[str, Any]:
    """The checkpoints of `layouts_of_four`, in one process."""
    found: dict[str, Any] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        trainer = start(Layout(), dtype)
        trainer.load(open_store(f"{directory}/{name}", trainer, keep=0), 3)
        found[name] = {"loaded": whole_state(trainer)}
        trainer.train(4, 6)
        found[name]["trained on"] = whole_state(trainer)
        found[name]["upstream"] = _read_by_megatron_core(trainer, f"{directory}/{name}/step_00000003")
        destroy_groups()
    return found


def _read_by_megatron_core(trainer: Trainer, directory: str) -> dict[str, torch.Tensor]:
    """The same files through megatron-core's own load."""
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_plain_tensors(directory)
