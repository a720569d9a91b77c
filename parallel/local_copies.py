"""Copies of a run's state on its nodes' own disks, between two shared checkpoints; each node also keeps its peer's.

A save writes every rank's whole state (`parallel/local_shard.py`) to a directory of its node and of the next one, in
the background. A start uses the newest step of which every rank's shard is whole on some node: a node whose disk was
lost, or whose shard is damaged, gets it from the other holder. Shards of two saves are never mixed, and none is used
that the run has gone back behind (`manifest.timeline`). They fit one layout only; the shared checkpoints fit all.

A disk or a writer that fails costs copies and a warning, never the run. The words are those of NVIDIA's resiliency
extension (local checkpointing, replication); the exchange is a ring over the nodes.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from parallel import manifest as disk
from parallel import stored_tensors
from parallel.agreement import Agreement
from parallel.background import BackgroundCall
from parallel.checkpoint_config import LocalConfig
from parallel.groups import Groups
from parallel.launch import node_name
from parallel.local_shard import Shard, directory_of, read_shard, shard_of, write_shard
from parallel.manifest import CheckpointError
from parallel.parcels import Parcel, exchange

_LOG = logging.getLogger(__name__)
_RANK_NAME = "rank_{:05d}"


@dataclass(frozen=True, slots=True, order=True)
class Save:
    """One save of all ranks."""

    step: int
    life: str
    """Token of the life of the run that made it: two lives may have saved the same step."""


class LocalCopies:
    """The copies of one run, seen from one rank. A method that is not marked local is collective over all ranks."""

    def __init__(self, config: LocalConfig, run_dir: Path, groups: Groups, *, asynchronous: bool) -> None:
        """Open this node's directory and delete what dead saves, and timelines that were given up, left in it.

        Raises:
            CheckpointError: it cannot be made on any node.
        """
        self._config, self._groups, self._asynchronous = config, groups, asynchronous
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._node = node_name()
        self._agreement = Agreement(groups.device, CheckpointError, self._text_of)
        nodes: list[Any] = [None] * self._world_size
        dist.all_gather_object(nodes, self._node)
        self._nodes: list[str] = nodes
        timeline = self._agreement.on_first_rank(lambda: disk.timeline(run_dir / "checkpoints"))
        self._life = self._agreement.on_first_rank(lambda: secrets.token_hex(4))
        self.directory = directory_of(Path(config.directory), self._node, run_dir) / timeline
        """Of this node, for this run."""
        self._peers = self._pair() if config.peer else {}
        self._call: BackgroundCall | None = None
        self._open()

    @property
    def _is_first_on_node(self) -> bool:
        return self._nodes.index(self._node) == self._rank

    def _ranks_on(self, node: str) -> list[int]:
        return [rank for rank, where in enumerate(self._nodes) if where == node]

    def _pair(self) -> dict[int, int]:
        """Rank -> the rank of the next node that keeps its copies."""
        names = list(dict.fromkeys(self._nodes))
        if len(names) == 1:
            return {}
        peers: dict[int, int] = {}
        for number, name in enumerate(names):
            there = self._ranks_on(names[(number + 1) % len(names)])
            peers |= {rank: there[place % len(there)] for place, rank in enumerate(self._ranks_on(name))}
        return peers

    def _open(self) -> None:
        """Make this node's directory; one broken disk among others costs copies only."""
        problem = ""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if self._is_first_on_node:
                for other in self.directory.parent.iterdir():
                    if other != self.directory:
                        shutil.rmtree(other, ignore_errors=True)
                for root in self._roots():
                    disk.clean(root)
        except OSError as error:
            problem = self._text_of(error)
        problems: list[Any] = [None] * self._world_size
        dist.all_gather_object(problems, problem)
        if all(problems):
            raise CheckpointError(problems[0])
        if problem and self._is_first_on_node:
            _LOG.warning("no node-local copies here: %s", problem)

    def _roots(self) -> list[Path]:
        """A directory per rank of which this node keeps copies."""
        return sorted(self.directory.iterdir()) if self.directory.is_dir() else []

    def _root(self, rank: int) -> Path:
        return self.directory / _RANK_NAME.format(rank)

    def save(self, step: int, sharded_state: ShardedStateDict, extra: dict[str, Any]) -> None:
        """Copy the state to this node and to its peer; returns once it is staged. Left out while a save is in flight.

        step, sharded_state, extra: as `CheckpointStore.save` takes them.
        """
        self._tell_of_failure()
        if self._agreement.any(self.writing)[0]:
            _LOG.warning("no node-local copy of step %d: the one before it is still being written", step)
            return
        # as in a shared checkpoint, rank 0's are kept
        given = extra if self._rank == 0 else {}
        about = {"life": self._life, "rank": self._rank, "world_size": self._world_size, "given": given}
        layout = asdict(self._groups.layout)
        shard = self._agreement.everywhere(lambda: shard_of(step, sharded_state, layout, about))
        own = Parcel(shard.header, shard.payload)
        sources = [rank for rank, peer in self._peers.items() if peer == self._rank]
        received = exchange(own, self._peers.get(self._rank), sources, self._groups.device)
        shards = [shard, *(Shard(**parcel.header, payload=parcel.payload) for parcel in received)]

        def write() -> dict[str, Any]:
            for one in shards:
                write_shard(self._root(one.extra["rank"]), one, keep=self._config.keep)
            return {}

        self._call = BackgroundCall(write, fork=self._asynchronous)

    @property
    def writing(self) -> bool:
        """Whether a save of this rank is in flight. Local."""
        return self._call is not None and self._call.running

    def close(self) -> None:
        """End a save in flight: another may write here from now on. Local."""
        if self._call is not None:
            self._call.end()

    def _tell_of_failure(self) -> None:
        if self._call is not None and not self._call.running and self._call.problem:
            _LOG.warning(
                "no node-local copy on %s: %s; training goes on, the shared checkpoints are untouched",
                self._node,
                self._call.problem,
            )

    def bring(self, at_least: int) -> int | None:
        """Have the newest usable save on this node's disk, every byte checked; its step, None where there is none.

        at_least: step below which no copy is of use. Older or unusable copies of later steps are deleted.
        """
        holders = self._inventory()
        found = None
        for save in sorted((save for save in holders if save.step >= at_least), reverse=True):
            if self._bring(save, holders[save]):
                found = save.step
                break
        self._agreement.everywhere(lambda: self._forget(at_least if found is None else found))
        return found

    def _inventory(self) -> dict[Save, dict[int, list[str]]]:
        """Save -> rank -> nodes that have its shard, the rank's own node first."""
        own: list[tuple[int, str, int]] = []
        if self._is_first_on_node:
            own = list(self._agreed_shards())
        by_rank: list[Any] = [None] * self._world_size
        dist.all_gather_object(by_rank, own)
        holders: dict[Save, dict[int, list[str]]] = {}
        for node, shards in zip(self._nodes, by_rank, strict=True):
            for step, life, rank in shards:
                nodes = holders.setdefault(Save(step, life), {}).setdefault(rank, [])
                nodes.insert(0 if node == self._nodes[rank] else len(nodes), node)
        return holders

    def _agreed_shards(self) -> Iterator[tuple[int, str, int]]:
        """Step, life and rank of the shards on this node that this layout can use. Local."""
        layout = asdict(self._groups.layout)
        for root in self._roots():
            for entry in disk.list_checkpoints(root):
                if not entry.complete:
                    _LOG.warning("not resumed from, node-local copy: %s", entry.problem)
                    continue
                manifest = disk.read_manifest(entry.path)
                about = manifest.extra
                if (manifest.layout, about["world_size"]) == (layout, self._world_size):
                    yield entry.step, about["life"], about["rank"]

    def _bring(self, save: Save, holders: dict[int, list[str]]) -> bool:
        """Get the shards of a save onto the nodes of their ranks; whether all are there."""
        pending, moved = set(range(self._world_size)), set()
        while pending:
            lost = sorted(rank for rank in pending if not holders.get(rank))
            if lost:
                if self._rank == 0:
                    _LOG.warning(
                        "node-local copies of step %d are not used: no node has ranks %s", save.step, lost
                    )
                return False
            problem = ""
            for rank in sorted(pending):
                # only one of them is this rank's own
                problem = self._fetch(save, rank, holders[rank][0]) or problem
            if self._rank in pending and not problem:
                problem = self._problem_of_own(save)
            problems: list[Any] = [None] * self._world_size
            dist.all_gather_object(problems, problem)
            for rank in sorted(pending):
                if not problems[rank]:
                    pending.remove(rank)
                    moved |= {rank} if holders[rank][0] != self._nodes[rank] else set()
                    continue
                bad = holders[rank].pop(0)
                if self._rank == 0:
                    _LOG.warning(
                        "rank %d cannot use the node-local copy of step %d on %s (%s); next: %s",
                        rank, save.step, bad, problems[rank], holders[rank][:1] or "none",
                    )  # fmt: skip
        if moved and self._rank == 0:
            _LOG.info(
                "ranks %s have their node-local copies of step %d from other nodes", sorted(moved), save.step
            )
        return True

    def _fetch(self, save: Save, rank: int, node: str) -> str:
        """Send a rank's shard from another node's disk to its own; why it did not come. Only these two take part."""
        sender = self._nodes.index(node)
        if node == self._nodes[rank] or self._rank not in (sender, rank):
            return ""
        device = self._groups.device
        if self._rank == sender:
            try:
                shard = read_shard(self._path(rank, save.step))
                parcel = Parcel(shard.header, shard.payload)
            except (CheckpointError, OSError) as error:
                parcel = Parcel({"problem": str(error)}, torch.empty(0, dtype=torch.uint8))
            exchange(parcel, rank, [], device)
            return ""
        (received,) = exchange(None, None, [sender], device)
        try:
            if problem := received.header.get("problem"):
                return problem
            write_shard(self._root(rank), Shard(**received.header, payload=received.payload), keep=0)
        except OSError as error:
            return str(error)
        return ""

    def _problem_of_own(self, save: Save) -> str:
        """Why this rank's shard on this node cannot be used; empty when every byte is as it was written. Local."""
        try:
            read_shard(self._path(self._rank, save.step))
        except (CheckpointError, OSError) as error:
            return str(error)
        return ""

    def _forget(self, after_step: int) -> None:
        """Delete what this node keeps for ranks that are not its own or its peer's, and of later steps. Local."""
        if not self._is_first_on_node:
            return
        here = set(self._ranks_on(self._node))
        ours = here | {rank for rank, peer in self._peers.items() if peer in here}
        names = {self._root(rank).name for rank in ours}
        for root in self._roots():
            if root.name not in names:
                shutil.rmtree(root, ignore_errors=True)
                continue
            for entry in disk.list_checkpoints(root):
                if entry.step > after_step:
                    disk.remove(root, entry.step, secrets.token_hex(4))

    def about(self, step: int) -> dict[str, Any]:
        """As `CheckpointStore.about`, of a save that `bring` found."""
        return self._agreement.on_first_rank(lambda: disk.read_manifest(self._path(0, step)).extra["given"])

    def load(self, step: int, template: ShardedStateDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `CheckpointStore.load`, of a save that `bring` found: its bytes have just been checked.

        Raises:
            CheckpointError: the save is of another model.
        """
        path = self._path(self._rank, step)

        def read() -> dict[str, Any]:
            table = stored_tensors.read_table(path, disk.read_manifest(path))
            tensors, _ = stored_tensors.extract_tensors(template)
            stored, wanted = stored_tensors.logical_table(table), stored_tensors.wanted_table(tensors)
            stored_tensors.check_fit(path, stored, wanted, ())
            return stored_tensors.read_tensors(template, path, table, verify=False)

        return self._agreement.everywhere(read), self.about(step)

    def _path(self, rank: int, step: int) -> Path:
        return disk.step_path(self._root(rank), step)

    def _text_of(self, error: Exception) -> str:
        if isinstance(error, CheckpointError):
            return str(error)
        return (
            f"checkpoint.local.directory={self._config.directory} cannot be used on {self._node} by rank "
            f"{self._rank} ({type(error).__name__}: {error}): every node needs a directory there that this user may "
            "write; choose another, or leave it empty to keep no copies"
        )
