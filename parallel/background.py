"""One call in a forked child: it gets a snapshot of this process's host memory, and gives back JSON or an
error.

The child uses no collective, no CUDA and one thread: the threads of gloo, NCCL and OpenMP do not exist in it.
It dies when its parent does, so that it cannot keep the sockets of a dead rank open, nor write into a later
run's directory. It ignores the signals of a batch system; whoever ends the job decides through the parent.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

_PR_SET_PDEATHSIG = 1
_START_TIMEOUT_S = 20.0
_FORK_ATTEMPTS = 5
_STARTED = b"started"


class BackgroundCall:
    """Runs `action` in a forked child, or here and now with fork=False; the outcome reads the same."""

    def __init__(self, action: Callable[[], dict[str, Any]], *, fork: bool) -> None:
        self.result: dict[str, Any] | None = None
        """What the action returned, once it has."""
        self.problem = ""
        """Why there will be no result; empty while it runs and after success."""
        self._started_s = time.monotonic()
        self._ended_s: float | None = None
        self._process: multiprocessing.process.BaseProcess | None = None
        if not fork:
            self._finish(_outcome(action))
            return
        if not any(self._fork(action) for _ in range(_FORK_ATTEMPTS)):
            self._process = None
            self._finish({"problem": f"none of {_FORK_ATTEMPTS} forked writer processes started"})
            return
        # a process that ends before it has the result has no use for it; multiprocessing would wait for the child
        atexit.register(self.end)

    def _fork(self, action: Callable[[], dict[str, Any]]) -> bool:
        """Fork a child; whether it came to run our code.

        CPython can deadlock inside fork: when a C++ thread is just getting its Python thread state, the child inherits
        the interpreter's list locked and waits for it for ever. Such a child is ended, and another one forked.
        """
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_child_main, args=(action, sender, os.getpid()), daemon=True)
        self._process.start()
        # with our copy of the sending end closed, a dead child reads as the end of the stream
        sender.close()
        try:
            if self._receiver.poll(_START_TIMEOUT_S) and self._receiver.recv_bytes() == _STARTED:
                return True
        except EOFError:
            pass
        self._process.kill()
        self._process.join()
        self._receiver.close()
        return False

    @property
    def running(self) -> bool:
        """Whether the outcome is still open. Never blocks for longer than it takes to receive a result."""
        self.wait(0.0)
        return self._ended_s is None

    @property
    def seconds(self) -> float:
        """How long it ran, up to now or up to its end."""
        return (self._ended_s or time.monotonic()) - self._started_s

    def wait(self, timeout_s: float) -> None:
        """Wait for the outcome, at most `timeout_s`."""
        if self._ended_s is not None or not self._receiver.poll(timeout_s):
            return
        assert self._process is not None, "only a forked call can be open"
        try:
            outcome = json.loads(self._receiver.recv_bytes())
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            outcome = {"problem": f"its writer process ended with exit code {code} before it was done"}
        self._process.join()
        self._finish(outcome)

    def end(self) -> None:
        """Kill the child if it is still at work. Idempotent."""
        if self._process is not None and self._ended_s is None:
            self._process.kill()
            self._process.join()
            self._finish({"problem": "it was ended"})

    def _finish(self, outcome: dict[str, Any]) -> None:
        self.result = outcome.get("result")
        self.problem = outcome.get("problem", "")
        self._ended_s = time.monotonic()
        if self._process is not None:
            self._receiver.close()
            atexit.unregister(self.end)


def _child_main(action: Callable[[], dict[str, Any]], sender: Connection, parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    sender.send_bytes(_STARTED)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # collecting here would run destructors of the parent's CUDA and process group objects
    gc.disable()
    torch.set_num_threads(1)
    sender.send_bytes(json.dumps(_outcome(action)).encode())


def _outcome(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"result": action()}
    except Exception as error:  # whatever went wrong must reach the parent, which raises it on every rank
        return {"problem": f"{type(error).__name__}: {error}"}
