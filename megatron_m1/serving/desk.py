"""Between the threads that speak HTTP and the ranks that generate: rank 0 takes what waits, all ranks do it together.

Requests that wait and are drawn alike are generated at once, with continuous batching among them; what comes meanwhile
waits for the next turn.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_m1.rl.generate import Request
from megatron_m1.rl.sample import Prompt, Sample
from megatron_m1.serving.model import Drawing, ServedModel
from megatron_m1.serving.protocol import Choice, Question
from parallel.manifest import CheckpointError

_LOG = logging.getLogger(__name__)
MOST_WAITING = 4096
# idle ranks wait in a collective, which must not run into its timeout
_HEARTBEAT_S = 5.0


class Busy(RuntimeError):
    """Too many requests wait."""


class Closed(RuntimeError):
    """The server is ending."""


@dataclass(slots=True)
class _Job:
    """One request and where its answer goes."""

    question: Question
    done: concurrent.futures.Future[tuple[list[Sample], int]] = field(
        default_factory=concurrent.futures.Future
    )


@dataclass(slots=True)
class _Load:
    """New weights that are asked for."""

    directory: Path
    step: int | None
    done: concurrent.futures.Future[tuple[int, float]] = field(default_factory=concurrent.futures.Future)


@dataclass(frozen=True, slots=True)
class _Turn:
    """What all ranks do next."""

    what: str
    """ "generate", "load", "wait" or "end"."""
    requests: list[Request] = field(default_factory=list)
    drawing: Drawing | None = None
    directory: Path | None = None
    step: int | None = None


class Desk:
    """Where requests wait; on rank 0 the threads of the server call `ask`, `load` and `close`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._loads: list[_Load] = []
        self._closed = False

    def ask(self, question: Question) -> tuple[list[Sample], int]:
        """Wait for the samples of a question and the step of the weights that made them.

        Raises:
            Busy, Closed: it is not taken.
            Exception: of the generation.
        """
        job = _Job(question)
        with self._changed:
            self._refuse_if_closed()
            if len(self._jobs) >= MOST_WAITING:
                raise Busy(f"{len(self._jobs)} requests wait: ask again later")
            self._jobs.append(job)
            self._changed.notify()
        return job.done.result()

    def load(self, directory: Path, step: int | None) -> tuple[int, float]:
        """Wait until other weights are in; their step and the seconds that it took.

        Raises:
            ValueError, CheckpointError: they cannot be loaded; the old ones stay.
            Closed: it is not taken.
        """
        load = _Load(directory, step)
        with self._changed:
            self._refuse_if_closed()
            self._loads.append(load)
            self._changed.notify()
        return load.done.result()

    def close(self) -> None:
        """Take nothing more, and end after the present turn. May be called from a signal handler's thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def serve(self, model: ServedModel) -> None:
        """Do what is asked for until closed; on every rank. Whoever still waits then is told."""
        try:
            while True:
                jobs, load, turn = self._next() if dist.get_rank() == 0 else ([], None, None)
                turn = _told(turn)
                if turn.what == "end":
                    return
                if turn.what == "load":
                    _load(model, turn, load)
                elif turn.what == "generate":
                    _generate(model, turn, jobs)
        finally:
            self._turn_away()

    def _next(self) -> tuple[list[_Job], _Load | None, _Turn]:
        """What rank 0 takes now: new weights first, else all jobs that are drawn as the oldest one is."""
        with self._changed:
            if not (self._closed or self._jobs or self._loads):
                self._changed.wait(_HEARTBEAT_S)
            if self._closed:
                return [], None, _Turn("end")
            if self._loads:
                load = self._loads.pop(0)
                return [], load, _Turn("load", directory=load.directory, step=load.step)
            if not self._jobs:
                return [], None, _Turn("wait")
            drawing = self._jobs[0].question.drawing
            jobs = [job for job in self._jobs if job.question.drawing == drawing]
            self._jobs = [job for job in self._jobs if job.question.drawing != drawing]
        requests = [
            _request(number, choice, job.question.max_tokens)
            for number, (job, choice) in enumerate(
                (job, choice) for job in jobs for choice in job.question.choices
            )
        ]
        return jobs, None, _Turn("generate", requests=requests, drawing=drawing)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Closed("the server is ending: ask another one")

    def _turn_away(self) -> None:
        self.close()
        with self._changed:
            waiting: list[Any] = [*self._jobs, *self._loads]
            self._jobs, self._loads = [], []
        for one in waiting:
            one.done.set_exception(Closed("the server has ended"))


def _request(number: int, choice: Choice, max_tokens: int) -> Request:
    prompt = Prompt(prompt_id=number, tokens_S=np.array(choice.prompt, dtype=np.int64), text="", task="serve")
    return Request(prompt=prompt, sample_id=0, key=choice.key, max_tokens=max_tokens)


def _told(turn: _Turn | None) -> _Turn:
    """Rank 0's turn, on every rank."""
    told: list[Any] = [turn]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(told, src=0)
    return told[0]


def _generate(model: ServedModel, turn: _Turn, jobs: list[_Job]) -> None:
    """Hand every job its samples; a fault ends the server, and whoever waits for these is told."""
    assert turn.drawing is not None, turn
    try:
        samples = model.generate(turn.requests, turn.drawing)
    except BaseException as error:
        for job in jobs:
            job.done.set_exception(Closed(f"the server has ended: {error}"))
        raise
    begin = 0
    for job in jobs:
        count = len(job.question.choices)
        job.done.set_result((samples[begin : begin + count], model.step))
        begin += count


def _load(model: ServedModel, turn: _Turn, load: _Load | None) -> None:
    """Load; what cannot be loaded is a fault of the request, on every rank alike, and ends nobody."""
    assert turn.directory is not None, turn
    try:
        model.load(turn.directory, turn.step)
    except (ValueError, CheckpointError) as error:
        if load is not None:
            load.done.set_exception(error)
        return
    _LOG.info("loaded the weights of step %d from %s in %.2f s", model.step, turn.directory, model.load_s)
    if load is not None:
        load.done.set_result((model.step, model.load_s))
