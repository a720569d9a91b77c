"""The checkpoints of a run: save (also in the background), publish, load under any layout, prune.

Tensors are stored under logical names with global shapes (`parallel/stored_tensors.py`), so any layout loads any
checkpoint. A checkpoint exists from the moment its finished directory gets its name (`parallel/manifest.py`).

A background save is written by a forked child. Fork gives it a snapshot of host memory, so the trainer may go on
changing its parameters; tensors of a GPU are copied to the host first. With a bound on that memory the state goes to
the child through a ring instead (`parallel/staging.py`). At most one save is in flight: the next one waits for it.
Whatever fails on one rank is raised on every rank, with the same message.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch.distributed.checkpoint.metadata import Metadata

from parallel import manifest as disk
from parallel import shards, stored_tensors
from parallel.agreement import Agreement
from parallel.background import BackgroundCall
from parallel.checkpoint_config import CheckpointConfig
from parallel.groups import Groups
from parallel.manifest import CheckpointError, Entry, Manifest
from parallel.staging import Staging, forget

_LOG = logging.getLogger(__name__)
_LONGEST_WAIT_S = 5.0
_MAKE_ROOM = (
    "the directory must be writable and have room: free space, lower checkpoint.keep or choose another run_dir, "
    "then resume; the previous checkpoint is untouched"
)


@dataclass(slots=True)
class _Flight:
    """A save between its plan and its publication."""

    step: int
    directory: Path
    num_bytes: int
    """What this rank writes."""
    metadata: Metadata | None
    """megatron-core's description of the whole; on rank 0 only."""
    extra: dict[str, Any]
    call: BackgroundCall


class CheckpointStore:
    """All checkpoints of one run. A method that is not marked local is collective over all ranks."""

    def __init__(self, directory: Path, config: CheckpointConfig, groups: Groups) -> None:
        """Open the checkpoints in a directory, which is created if it does not exist.

        Raises:
            CheckpointError: the directory cannot be created.
        """
        self.directory = Path(directory)
        self.pinned_step: int | None = None
        """Step whose checkpoint stays, however old it is: where a stage would go back to."""
        self._config = config
        self._groups = groups
        self._agreement = Agreement(groups.device, CheckpointError, self._text_of)
        self._is_first = dist.get_rank() == 0
        self._flight: _Flight | None = None
        self.on_progress: Callable[[], None] = lambda: None
        """Called, on every rank, whenever all ranks have agreed to go on waiting for a writer."""
        self._spread = shards.ReplicaSpread(groups.collection.dp_cp)
        self._agreement.on_first_rank(lambda: self.directory.mkdir(parents=True, exist_ok=True))

    def clean(self) -> list[str]:
        """Delete what dead saves left; the names. Only for the job that writes here, at its start: a save that
        another living job has in flight would be deleted with them.
        """
        cleaned = self._agreement.on_first_rank(lambda: disk.clean(self.directory))
        if cleaned:
            _LOG.info("deleted leftovers of unfinished saves in %s: %s", self.directory, ", ".join(cleaned))
        return cleaned

    def save(self, step: int, sharded_state: ShardedStateDict, extra: dict[str, Any]) -> None:
        """Save a state; with `asynchronous` return once it is staged. Waits for a save that is in flight.

        step: optimizer steps done. sharded_state: nested dict of ShardedTensors (and their factories).
        extra: JSON values; rank 0's are kept.

        Raises:
            CheckpointError: this save, or the one waited for, failed on some rank.
        """
        self.wait()
        tensors, _ = self._agreement.everywhere(lambda: stored_tensors.extract_tensors(sharded_state))
        if self._agreement.any(self._spread.is_new(tensors))[0]:
            everywhere = self._spread.learn(tensors)
            # megatron-core checks on rank 0 only; the others must hear of it
            self._agreement.on_first_rank(lambda: shards.check_coverage(everywhere))
        self._spread.apply(tensors)
        directory = self._agreement.on_first_rank(lambda: self._begin(step, extra))
        try:
            self._agreement.everywhere(lambda: directory.mkdir(exist_ok=True))
            writer, metadata = shards.plan_save(tensors, directory)
            self._check_space(writer.num_bytes)
            self._agreement.everywhere(lambda: self._check_staging(writer.tensors))
        except CheckpointError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        call = self._start(writer, directory)
        self._flight = _Flight(step, directory, writer.num_bytes, metadata, extra, call)
        writer.release()
        if not self._config.asynchronous:
            self.wait()

    def _start(self, writer: shards.ShardWriter, directory: Path) -> BackgroundCall:
        """Start to write; returns when what is written cannot change any more."""
        config = self._config
        if not config.asynchronous:
            return BackgroundCall(lambda: writer.write(directory), fork=False)
        if not config.staging_mib:
            writer.copy_to_host()
            return BackgroundCall(lambda: writer.write(directory), fork=True)
        staging = Staging(writer.tensors, config.staging_mib << 20)

        def write() -> dict[str, Any]:
            forget(writer.tensors)
            return writer.write(directory, staging.tensors())

        call = BackgroundCall(write, fork=True)

        def alive() -> bool:
            self.on_progress()
            return call.running and call.seconds <= config.writer_timeout_s

        staging.fill(writer.tensors, alive)
        return call

    def _check_staging(self, tensors: Sequence[torch.Tensor]) -> None:
        largest = max((tensor.nbytes for tensor in tensors), default=0)
        staging_mib = self._config.staging_mib
        if self._config.asynchronous and 0 < staging_mib << 20 < largest:
            raise CheckpointError(
                f"checkpoint.staging_mib={staging_mib} is less than the largest tensor of rank {dist.get_rank()}, "
                f"{largest / 2**20:.1f} MiB: a tensor is staged whole; "
                f"use {-(-largest >> 20)} or more, or 0 for no bound"
            )

    def _begin(self, step: int, extra: dict[str, Any]) -> Path:
        json.dumps(extra, allow_nan=False)
        directory = disk.partial_path(self.directory, step, secrets.token_hex(4))
        directory.mkdir()
        return directory

    def _check_space(self, own_bytes: int) -> None:
        """Refuse a save that cannot fit before a byte of it is written."""
        needed_bytes, free_bytes = self._agreement.sum(own_bytes), _free_bytes(self.directory)
        problem = ""
        if needed_bytes > free_bytes:
            problem = (
                f"a checkpoint in {self.directory} needs {needed_bytes} bytes: {free_bytes} bytes are free there; "
                f"{_MAKE_ROOM}"
            )
        self._agreement.raise_if_any(problem)

    def poll(self) -> int | None:
        """Publish the save in flight if every rank has written its part; call it once per step.

        Returns: the step that became a checkpoint, else None. No communication when nothing is in flight.

        Raises:
            CheckpointError: the save failed on some rank; what there is of it is deleted.
        """
        return self._advance(block=False)

    def wait(self) -> int | None:
        """Like `poll`, but waits for the writers. Call it before the process group ends."""
        return self._advance(block=True)

    def _advance(self, *, block: bool) -> int | None:
        flight = self._flight
        if flight is None:
            return None
        running = True
        while running:
            if block:
                # in short waits, so that no rank sits in one collective for as long as another one writes
                flight.call.wait(min(_LONGEST_WAIT_S, self._config.writer_timeout_s))
            problem = self._writer_problem(flight)
            running, failed = self._agreement.any(flight.call.running, bool(problem))
            if failed:
                self._give_up(flight, problem)
            if running and not block:
                return None
            self.on_progress()
        self._flight = None
        reports: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(flight.call.result, reports if self._is_first else None)
        try:
            self._agreement.on_first_rank(lambda: self._publish(flight, reports))
        except CheckpointError as error:
            self._give_up(flight, str(error))
        self.prune()
        return flight.step

    def _publish(self, flight: _Flight, reports: list[dict[str, Any]]) -> None:
        assert flight.metadata is not None, "rank 0 plans the whole"
        files = [disk.FileRecord(*record) for report in reports for record in report["files"]]
        files += shards.write_index(flight.directory, flight.metadata, reports)
        table = stored_tensors.logical_table(stored_tensors.read_table(flight.directory))
        disk.write_manifest(
            flight.directory,
            Manifest(
                step=flight.step,
                files=tuple(files),
                tensors_sha256=disk.sha256_of_json(table),
                layout=asdict(self._groups.layout),
                versions={"torch": torch.__version__, "megatron-core": megatron.core.__version__},
                extra=flight.extra,
            ),
        )
        disk.publish(flight.directory, self.directory, flight.step)

    def _give_up(self, flight: _Flight, problem: str) -> None:
        """Delete what there is of a save (it may be what fills the disk) and raise why on every rank."""
        flight.call.end()
        self._flight = None
        if self._is_first:
            shutil.rmtree(flight.directory, ignore_errors=True)
        self._agreement.raise_if_any(problem)

    def _writer_problem(self, flight: _Flight) -> str:
        """Why this rank's part of a save cannot be had; empty while there is hope."""
        if not flight.call.running and flight.call.problem:
            return (
                f"rank {dist.get_rank()} cannot write its part of {flight.directory}: {flight.call.problem}; it needs "
                f"{flight.num_bytes} bytes, {_free_bytes(self.directory)} bytes are free; {_MAKE_ROOM}"
            )
        if flight.call.running and flight.call.seconds > self._config.writer_timeout_s:
            return (
                f"the writer of rank {dist.get_rank()} has been at {flight.directory} for "
                f"{flight.call.seconds:.0f} s: allowed are checkpoint.writer_timeout_s="
                f"{self._config.writer_timeout_s:g}; check the file system, or raise the limit; "
                "the previous checkpoint is untouched"
            )
        return ""

    def load(
        self, step: int, template: ShardedStateDict, *, verify: bool = True, ignore: Sequence[str] = ()
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load a checkpoint, saved under any layout, into this layout.

        template: nested dict of ShardedTensors; one with data is filled in place, others get a new CPU tensor.
        verify: check every piece that is read against its checksum; else only the sizes of the files.
        ignore: prefixes of keys that the checkpoint may have and the template need not ("optimizer." to load
        weights only; then call the optimizer's take_masters_from_parameters).

        Returns: the template's structure with tensors as leaves, and `extra` as it was saved.

        Raises:
            CheckpointError: not complete, a damaged file, or tensors that are missing, unexpected or of another
                shape or dtype, by name.
        """
        path = disk.step_path(self.directory, step)
        found = self._agreement.everywhere(lambda: disk.read_manifest(path))
        own = found.files[dist.get_rank() :: dist.get_world_size()]
        self._agreement.everywhere(lambda: disk.check_files(path, own, hashed=False))
        table = self._agreement.everywhere(lambda: stored_tensors.read_table(path, found))
        tensors, _ = self._agreement.everywhere(lambda: stored_tensors.extract_tensors(template))
        by_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, stored_tensors.wanted_table(tensors))
        wanted = {key: entry for rank in by_rank for key, entry in rank.items()}
        stored_tensors.check_fit(path, stored_tensors.logical_table(table), wanted, tuple(ignore))
        state = self._agreement.everywhere(
            lambda: stored_tensors.read_tensors(template, path, table, verify=verify)
        )
        return state, found.extra

    def about(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds as JSON, without its tensors.

        Raises:
            CheckpointError: not complete.
        """
        path = disk.step_path(self.directory, step)
        return self._agreement.everywhere(lambda: disk.read_manifest(path)).extra

    def entries(self) -> list[Entry]:
        """Every checkpoint by ascending step, complete or not. Local."""
        return disk.list_checkpoints(self.directory)

    def newest_complete(self) -> int | None:
        """Step of the newest checkpoint that may be resumed from, as rank 0 sees it; None if there is none."""
        newest, passed_over = self._agreement.on_first_rank(self._newest_complete)
        for problem in passed_over:
            _LOG.warning("not resumed from: %s", problem)
        return newest

    def _newest_complete(self) -> tuple[int | None, list[str]]:
        passed_over: list[str] = []
        for entry in reversed(self.entries()):
            if entry.complete:
                return entry.step, passed_over
            passed_over.append(entry.problem)
        return None, passed_over

    def set_aside(self, from_step: int) -> None:
        """Go back before a step that broke the weights: what was saved with it is not resumed from any more."""
        self.wait()
        steps = self._agreement.on_first_rank(lambda: disk.set_aside(self.directory, from_step))
        _LOG.warning("set aside as broken, in %s: checkpoints of steps %s", self.directory, steps)

    def prune(self) -> list[int]:
        """Delete all complete checkpoints but the newest `keep` and the pinned one; the deleted steps."""
        return self._agreement.on_first_rank(self._prune) if self._config.keep else []

    def _prune(self) -> list[int]:
        complete = [entry.step for entry in self.entries() if entry.complete]
        doomed = [step for step in complete[: -self._config.keep] if step != self.pinned_step]
        for step in doomed:
            disk.remove(self.directory, step, secrets.token_hex(4))
        return doomed

    def _text_of(self, error: Exception) -> str:
        """A local error as the message that every rank raises."""
        if isinstance(error, CheckpointError):
            return str(error)
        where = f"rank {dist.get_rank()} on checkpoints in {self.directory}"
        if isinstance(error, OSError):
            return f"{where}: {error}; {_free_bytes(self.directory)} bytes are free there; {_MAKE_ROOM}"
        return f"{where}: {type(error).__name__}: {error}"


def _free_bytes(directory: Path) -> int:
    """Free bytes of the file system that a directory is on, or would be on if it existed."""
    existing = next(place for place in (directory, *directory.parents) if place.exists())
    return shutil.disk_usage(existing).free
