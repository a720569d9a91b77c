"""Finds out why ranks wait for each other for ever, writes it down, and ends the job.

torch's flight recorder keeps each rank's last collectives (`parallel/launch.py` switches it on). When a rank has made
no progress for too long, a thread writes these and the Python stacks of all threads into a file; the lowest rank that
is still able to reads all files and follows the waits to the first rank that did not come. A stopped rank writes
nothing, which is evidence too.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import threading
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

HANG_EXIT_CODE = 70
REPORT_NAME = "hang.txt"
_PEERS = re.compile(r"(\d+)\s*(->|<-)\s*(\d+)")
_LAST_CALLS = 200
_GRACE_S = 5.0
# the first look at the recorder's stacks takes seconds, and more on a busy machine
_EVIDENCE_S = 60.0
_OURS = re.compile(r"/(parallel|megatron_m1|kernels_cuda|data_pipeline)/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One collective or message that a rank has entered."""

    group: str
    """Name of its process group."""
    ranks: tuple[int, ...]
    """Ranks of the job that take part; of a message, the two."""
    number: int
    """Which call of its kind in the group this is, from 1."""
    name: str
    """Operation and shapes."""
    finished: bool
    time_ns: int
    """Unix time at which the rank entered it."""
    place: str
    """Where in our code."""

    def __str__(self) -> str:
        who = ", ".join(str(rank) for rank in self.ranks)
        return f"{self.name}, call {self.number} of group {self.group} (ranks {who}), at {self.place}"


@dataclass(frozen=True, slots=True)
class Finding:
    """The end of a chain of waits."""

    rank: int | None
    """The rank that the others wait for; None where nobody waits."""
    sentence: str


def first_divergence(
    journals: Mapping[int, Sequence[Call]], world_size: int, busy: Collection[int] = ()
) -> Finding:
    """Who does not come, by the journals of the ranks that wrote one.

    Args:
        journals: rank -> its calls, oldest first; a rank that could not write is absent.
        world_size: ranks of the job.
        busy: ranks that wait for nobody, by their stacks. Not every wait is in the journals: gloo's messages are not.
    """
    if different := _different_calls(journals):
        return different
    waiting = {rank: calls[-1] for rank, calls in _unfinished(journals).items() if calls}
    absent = [rank for rank in range(world_size) if rank not in journals]
    if absent:
        # whoever lives writes, so everybody waits for those who did not, over however many steps
        calls = [call for call in waiting.values() if absent[0] in call.ranks]
        where = f"; the others wait for it in {calls[0]}" if calls else ""
        return Finding(
            absent[0], f"rank {absent[0]} wrote nothing: it is stopped, dead, or its node is gone{where}"
        )
    if not waiting and 0 < len(busy) < world_size:
        rank = min(busy)
        return Finding(
            rank,
            f"rank {rank} has not come to where the others wait, and no collective of theirs is on record: they make "
            "groups, or wait for a message; the stacks show where",
        )
    if not waiting:
        return Finding(None, "no rank waits in a collective: the stacks show what each one does")
    return _follow_waits(journals, waiting, [rank for rank in busy if rank not in waiting])


def _follow_waits(
    journals: Mapping[int, Sequence[Call]], waiting: Mapping[int, Call], idle: Sequence[int]
) -> Finding:
    """From the rank that has waited longest to the one that it waits for, and on. idle: ranks that wait for nobody."""
    rank = min(waiting, key=lambda one: waiting[one].time_ns)
    seen = [rank]
    while True:
        call = waiting[rank]
        missing = [other for other in call.ranks if other != rank and not _has_entered(journals[other], call)]
        if not missing:
            return Finding(
                rank, f"all ranks of {call} are in it, and it does not end: the network, or a device"
            )
        rank = missing[0]
        if rank in seen:
            circle = ", ".join(f"rank {one} in {waiting[one]}" for one in seen)
            return Finding(rank, f"ranks wait for each other in a circle: {circle}")
        if rank not in waiting:
            break
        seen.append(rank)
    if rank not in idle and idle:
        # it waits for a message that is in no journal: the end of the chain is a rank that does not wait at all
        rank = idle[0]
        call = next((one for one in waiting.values() if rank in one.ranks), call)
    last = journals[rank][-1] if journals[rank] else "nothing"
    return Finding(rank, f"rank {rank} has not come to {call}; its last finished call is {last}")


def _different_calls(journals: Mapping[int, Sequence[Call]]) -> Finding | None:
    """The earliest call of a group that a rank entered as another operation, or with other shapes, than the rest."""
    by_call: dict[tuple[str, tuple[int, ...], int], dict[int, Call]] = {}
    for rank, calls in journals.items():
        for call in calls:
            if len(call.ranks) > 2 or not _is_message(call.name):
                by_call.setdefault((call.group, call.ranks, call.number), {})[rank] = call
    found = []
    for entered in by_call.values():
        names = [call.name for call in entered.values()]
        usual = max(names, key=names.count)
        found += [(call.time_ns, rank, call, usual) for rank, call in entered.items() if call.name != usual]
    if not found:
        return None
    _, rank, call, usual = min(found, key=lambda one: (one[0], one[1]))
    return Finding(rank, f"rank {rank} entered {call}, where the others entered {usual}")


def _is_message(name: str) -> bool:
    return "send" in name or "recv" in name


def _unfinished(journals: Mapping[int, Sequence[Call]]) -> dict[int, list[Call]]:
    return {rank: [call for call in calls if not call.finished] for rank, calls in journals.items()}


def _has_entered(calls: Sequence[Call] | None, call: Call) -> bool:
    """Whether a journal holds its end of a call; a message has two ends of different names and numbers."""
    if calls is None:
        return False
    if _is_message(call.name):
        return any(
            _is_message(other.name) and other.ranks == call.ranks and not other.finished for other in calls
        )
    same = [other.number for other in calls if (other.group, other.ranks) == (call.group, call.ranks)]
    return max(same, default=0) >= call.number


def read_journal(rank: int) -> list[Call]:
    """This rank's last calls, oldest first, from torch's flight recorder."""
    recorded = pickle.loads(torch._C._distributed_c10d._dump_fr_trace(includeStackTraces=True))
    # the recorder knows the members of NCCL's groups only
    groups = torch.distributed.distributed_c10d._world.pg_names
    members = {name: torch.distributed.get_process_group_ranks(group) for group, name in groups.items()}
    calls = []
    for entry in recorded.get("entries", [])[-_LAST_CALLS:]:
        group, description = entry["process_group"]
        ranks = tuple(sorted(members[group]))
        name = entry["profiling_name"].split(":")[-1]
        if entry["is_p2p"] and (peers := _PEERS.search(name)):
            ranks = tuple(sorted(ranks[int(peers[side])] for side in (1, 3)))
        shapes = [shape for shape in entry["input_sizes"] if shape]
        calls.append(
            Call(
                group=group if description in ("", "undefined") else f"{group} {description}",
                ranks=ranks,
                number=entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
                name=f"{name} {shapes}" if shapes else name,
                finished=bool(entry["retired"]) or entry["state"] == "completed",
                time_ns=entry["time_created_ns"],
                place=_own_place(entry["frames"]),
            )
        )
    return calls


def _own_place(frames: Sequence[Mapping[str, Any]]) -> str:
    """The innermost frame in our code; in whatever is not torch's where there is none."""
    others = [frame for frame in frames if "/torch/" not in frame["filename"]]
    for frame in [*filter(lambda one: _OURS.search(one["filename"]), others), *others]:
        return f"{'/'.join(Path(frame['filename']).parts[-3:])}:{frame['line']} {frame['name']}"
    return "an unknown place"


def stacks() -> str:
    """The Python stacks of all threads of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)))
    return "\n".join(parts)


def waits_for_others() -> bool:
    """Whether some thread of this process is inside a collective or a message, by its innermost Python frame."""
    for frame in sys._current_frames().values():
        innermost = traceback.extract_stack(frame)[-1]
        if "/torch/distributed/" in innermost.filename or ".wait(" in (innermost.line or ""):
            return True
    return False


class Watchdog:
    """Ends a rank that has made no progress for `timeout_s`, with a report; a context manager around training."""

    def __init__(self, directory: Path, *, timeout_s: float, rank: int, world_size: int) -> None:
        """directory: shared by all ranks, gets the evidence. timeout_s: longer than any step; 0 watches nothing."""
        self._directory = directory
        self._timeout_s = timeout_s
        self._rank, self._world_size = rank, world_size
        # not armed before the first beat: loading and compiling have their own limits
        self._last_beat_s: float | None = None
        self._ended = threading.Event()
        self._reports = False
        self._thread = threading.Thread(target=self._watch, name="hang watchdog", daemon=True)

    def beat(self) -> None:
        """This rank has made progress."""
        self._last_beat_s = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self._timeout_s > 0:
            if self._rank == 0:
                # an earlier life's; nobody writes before all ranks have taken a step
                for old in self._directory.glob("rank*.*"):
                    old.unlink()
                (self._directory / REPORT_NAME).unlink(missing_ok=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._reports:
            # what broke this rank is that another one has written its evidence and left: this one's still counts
            self._thread.join(2 * _EVIDENCE_S + self._timeout_s)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._timeout_s / 4)):
            last = self._last_beat_s
            if last is not None and time.monotonic() - last > self._timeout_s:
                self._reports = True
                self._report()
                # nothing less ends a process whose main thread waits in a collective
                os._exit(HANG_EXIT_CODE)

    def _report(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        # at once, so that a rank that still gathers its evidence is not taken for a stopped one
        (self._directory / f"rank{self._rank}.alive").touch()
        evidence = {
            "calls": [asdict(call) for call in read_journal(self._rank)],
            "stacks": stacks(),
            "waits": waits_for_others(),
        }
        waiting = self._directory / f"rank{self._rank}.tmp"
        waiting.write_text(json.dumps(evidence), encoding="utf-8")
        waiting.rename(self._directory / f"rank{self._rank}.json")
        present = self._wait_for_evidence()
        if self._rank == min(present):
            text = compose_report(
                {rank: json.loads(file.read_text()) for rank, file in present.items()}, self._world_size
            )
            (self._directory / REPORT_NAME).write_text(text, encoding="utf-8")
            print(text.split("\n\n")[0], file=sys.stderr, flush=True)
        else:
            # do not die while the report is written: a dead rank makes the launcher kill the others
            deadline = time.monotonic() + _EVIDENCE_S + _GRACE_S
            while time.monotonic() < deadline and not (self._directory / REPORT_NAME).exists():
                time.sleep(0.1)

    def _wait_for_evidence(self) -> dict[int, Path]:
        """Rank -> its evidence, of all that write some."""
        files = {rank: self._directory / f"rank{rank}.json" for rank in range(self._world_size)}
        began = time.monotonic()
        # the others' last beats were within one step of ours, and they look as often
        all_alive_s, all_written_s = self._timeout_s / 2 + _GRACE_S, self._timeout_s / 2 + _EVIDENCE_S
        while (waited := time.monotonic() - began) < all_written_s:
            missing = [file for file in files.values() if not file.exists()]
            still_write = any(file.with_suffix(".alive").exists() for file in missing)
            if not missing or (waited > all_alive_s and not still_write):
                break
            time.sleep(0.1)
        return {rank: file for rank, file in files.items() if file.exists()}


def compose_report(evidence: Mapping[int, Mapping[str, Any]], world_size: int) -> str:
    """The report from every rank's evidence: the finding, each rank's last call, all stacks."""
    journals = {
        rank: [Call(**{**call, "ranks": tuple(call["ranks"])}) for call in found["calls"]]
        for rank, found in evidence.items()
    }
    busy = [rank for rank, found in sorted(evidence.items()) if not found["waits"]]
    lines = [f"HANG: {first_divergence(journals, world_size, busy).sentence}", ""]
    for rank in range(world_size):
        calls = journals.get(rank)
        if calls is None:
            lines.append(f"rank {rank}: wrote nothing")
        elif calls:
            lines.append(f"rank {rank}: {'after' if calls[-1].finished else 'in'} {calls[-1]}")
        else:
            lines.append(f"rank {rank}: no collective yet")
    for rank, found in evidence.items():
        lines += ["", f"==== rank {rank} ====", found["stacks"]]
    return "\n".join(lines)
