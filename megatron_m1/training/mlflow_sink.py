"""The thread that carries a run's record to MLflow; the trainer never waits for it.

The record on the disk is the queue: the thread reads it behind the trainer, holds one batch in memory, and
saves how far the server has confirmed it. So the queue cannot overflow, and a dead server costs only a longer
way to catch up.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_m1.training.mlflow_run import MlflowRun, RunGoneError, RunPosition
from megatron_m1.training.spool import Line, read_lines, read_lives

logger = logging.getLogger(__name__)

Point = tuple[str, float, int, int]
POINTS_PER_BATCH = 1000
_FILE_ATTEMPTS = 3
_TICK_S = 1.0
_LONGEST_PAUSE_S = 60.0
_NOT_METRICS = frozenset({"kind", "life", "step", "time_ms"})


class MlflowSink:
    """One daemon thread that sends one record; may be started by the trainer, or later by anyone who has "
    "the record."""

    def __init__(
        self, record: Path, position: RunPosition, experiment: str, system_metrics_interval_s: float | None
    ) -> None:
        self._record = record
        self._position = position
        self._experiment = experiment
        self._sampler = _SystemSampler(system_metrics_interval_s) if system_metrics_interval_s else None
        self._run: MlflowRun | None = None
        self._is_open = False
        self._lives: list[Line] = []
        self._run_file_attempts_left = 3
        self._file_attempts: dict[int, int] = {}
        self._rewritten_steps: tuple[int, int] | None = None
        self._num_refused = 0
        self._num_failures = 0
        self._failing_since_s = 0.0
        self._next_attempt_s = 0.0
        self._closing = threading.Event()
        self._is_abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-sink", daemon=True)

    def start(self) -> None:
        """Start the thread; it imports mlflow and opens the run itself."""
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, None until the server has answered for the first time."""
        return self._position.run_id

    @property
    def num_unsent_bytes(self) -> int:
        """Bytes of the record that the server has not confirmed."""
        return self._record.stat().st_size - self._position.sent_offset

    def take_system_sample(self) -> dict[str, float]:
        """The newest sample of the machine, each one handed out once; never waits."""
        sampler = self._sampler
        return sampler.take() if sampler else {}

    def close(self, timeout_s: float) -> bool:
        """Keep trying to send everything for at most `timeout_s`; False when something is left unsent."""
        self._closing.set()
        self._thread.join(timeout_s)
        self._is_abandoned.set()
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            is_closing = self._closing.wait(_TICK_S)
            if is_closing:
                if self._attempt() or self._is_abandoned.wait(_TICK_S):
                    return
            elif time.monotonic() >= self._next_attempt_s:
                self._attempt()
            self._sample()

    def _attempt(self) -> bool:
        """Bring the server up to date; True when it has every complete line of the record."""
        try:
            self._advance()
        except RunGoneError as error:
            logger.warning("%s: a new run is created and gets the whole record", error)
            self._position.run_id = None
            self._position.sent_offset = 0
            self._position.run_key = RunPosition(self._position.path, self._position.tracking_uri).run_key
            self._is_open = False
            return False
        # The client raises what its transport, database or server raise; no list of types would be complete.
        except Exception as error:
            self._pause(error)
            return False
        self._resume()
        return True

    def _advance(self) -> None:
        if self._run is None:
            self._run = MlflowRun(self._position, self._experiment)
        if not self._is_open:
            self._lives = read_lives(self._record)
            last_life = self._lives[-1].values if self._lives else None
            assert last_life is not None, f"{self._record} has no line that starts a life"
            self._run.open(last_life)
            self._is_open = True
        end = self._send_record(self._run)
        self._upload_run_file(self._run)
        if end is not None:
            status, end_offset = end
            self._run.end(status)
            self._confirm(end_offset)

    def _send_record(self, run: MlflowRun) -> tuple[str, int] | None:
        """Send what is new; returns status and offset when the record ends with the end of a life.

        The line of that end is confirmed only after the server knows the status.
        """
        batch: list[Point] = []
        end = None
        offset = self._position.sent_offset
        for line, start in self._new_lines():
            if line.values is not None and line.values["kind"] in ("end", "life"):
                is_end = line.values["kind"] == "end"
                end = (line.values["status"], line.end_offset) if is_end else None
                offset = start if is_end else line.end_offset
                continue
            if line.values is not None and line.values["kind"] == "file":
                # what stands before it is confirmed first, so that a repetition begins with the file
                self._send_batch(run, batch, start)
                batch, offset = [], line.end_offset
                self._upload_file(run, line.values, start)
                continue
            points = self._points(run, line, start)
            if batch and len(batch) + len(points) > POINTS_PER_BATCH:
                self._send_batch(run, batch, offset)
                batch = []
            batch += points
            offset = line.end_offset
        self._send_batch(run, batch, offset)
        return end

    def _new_lines(self) -> Iterator[tuple[Line, int]]:
        start = self._position.sent_offset
        for line in read_lines(self._record, start):
            yield line, start
            start = line.end_offset

    def _send_batch(self, run: MlflowRun, batch: list[Point], end_offset: int) -> None:
        if batch:
            num_refused = run.send(batch)
            if num_refused:
                self._num_refused += num_refused
                run.set_tag("num_refused_points", str(self._num_refused))
            if self._rewritten_steps:
                run.set_tag("rewritten_steps", "{}-{}".format(*self._rewritten_steps))
        if end_offset != self._position.sent_offset:
            self._confirm(end_offset)
        self._sample()

    def _confirm(self, end_offset: int) -> None:
        self._position.sent_offset = end_offset
        self._position.save()

    def _points(self, run: MlflowRun, line: Line, start: int) -> list[Point]:
        """Points of a line, without what a later life made void and what the server already holds."""
        values = line.values
        if values is None or self._is_void(values["step"], start):
            return []
        points = [
            (name, float(value), values["time_ms"], values["step"])
            for name, value in values.items()
            if name not in _NOT_METRICS and isinstance(value, int | float) and not isinstance(value, bool)
        ]
        # The witness stands last: a line too long for one call is then known to be whole when its witness is
        # there.
        witness_name = _witness(values)
        points.sort(key=lambda point: point[0] == witness_name)
        return [] if points and run.is_resumed and self._is_held(run, points[-1]) else points

    def _is_void(self, step: int, start: int) -> bool:
        later_lives = (life.values for life in self._lives if life.end_offset > start)
        return any(life is not None and step > life["step"] for life in later_lives)

    def _is_held(self, run: MlflowRun, witness: Point) -> bool:
        """Whether the server has this line from an earlier life.

        MLflow cannot overwrite. A repeated step with the same loss is the same step and is not sent twice;
        with another loss it is another history, so it is sent beside the old one and a tag names the steps.
        """
        name, value, _, step = witness
        held = run.held_values(name, step)
        if repr(value) in held:
            return True
        if held:
            first, last = self._rewritten_steps or (step, step)
            self._rewritten_steps = min(first, step), max(last, step)
        return False

    def _upload_file(self, run: MlflowRun, values: Mapping[str, Any], start: int) -> None:
        """A picture is a convenience: a server that cannot store it must not keep the metrics behind it waiting."""
        file = self._record.parent / values["file"]
        if self._is_void(values["step"], start) or not file.is_file():
            return
        if self._file_attempts.get(start, 0) == _FILE_ATTEMPTS:
            logger.warning(
                "%s is not stored in MLflow after %d attempts: it stays there", file, _FILE_ATTEMPTS
            )
            return
        # only a server that answers, and yet cannot store, uses up the attempts
        run.check_answers()
        self._file_attempts[start] = self._file_attempts.get(start, 0) + 1
        run.upload(file, Path(values["file"]).parent.as_posix())

    def _upload_run_file(self, run: MlflowRun) -> None:
        """The resolved run file is a convenience: after three failures the run goes on without it."""
        life: Mapping[str, Any] = self._lives[-1].values or {}
        if not self._run_file_attempts_left:
            return
        self._run_file_attempts_left -= 1
        if life.get("run_file") is not None:
            try:
                run.upload(Path(life["run_file"]))
            except Exception as error:
                logger.warning(
                    "run file not stored in MLflow (%d attempts left): %s",
                    self._run_file_attempts_left,
                    error,
                )
                return
        self._run_file_attempts_left = 0

    def _pause(self, error: Exception) -> None:
        now_s = time.monotonic()
        if self._num_failures == 0:
            self._failing_since_s = now_s
            text = " ".join(str(error).split())[:300]
            logger.warning(
                "MLflow at %s does not answer (%s: %s); training goes on, metrics are kept in %s and sent "
                "later",
                self._position.tracking_uri, type(error).__name__, text, self._record,
            )  # fmt: skip
        self._num_failures += 1
        self._next_attempt_s = now_s + min(_LONGEST_PAUSE_S, 2.0 ** min(self._num_failures, 10))

    def _resume(self) -> None:
        if self._num_failures:
            away_s = time.monotonic() - self._failing_since_s
            logger.info("MLflow answers again after %.0f s; everything kept meanwhile has been sent", away_s)
        self._num_failures = 0
        self._next_attempt_s = 0.0

    def _sample(self) -> None:
        # mlflow's collectors are used, so they wait until the client has been imported with its environment.
        if self._sampler is None or self._run is None:
            return
        try:
            self._sampler.sample_if_due()
        # A machine whose counters cannot be read must not cost the run its metrics.
        except Exception as error:
            logger.warning("system metrics are off: %s: %s", type(error).__name__, error)
            self._sampler = None


class _SystemSampler:
    """Samples of this machine under MLflow's own names.

    MLflow's own monitor thread is not used: it stops for ever at the first failed call, and starting it
    without psutil leaves an orphaned run. The samples go through the record instead, each with the next step.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next_s = 0.0
        self._collectors: list[Any] | None = None
        self._newest: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        newest, self._newest = self._newest, {}
        return newest

    def sample_if_due(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + self._interval_s
        if self._collectors is None:
            # The first CPU reading has no interval to refer to and is thrown away.
            self._collectors = _system_collectors()
            self._read()
            return
        self._newest = self._read()

    def _read(self) -> dict[str, float]:
        sample: dict[str, float] = {}
        for collector in self._collectors or []:
            collector.collect_metrics()
            sample |= {
                f"system/{name}": float(value) for name, value in collector.aggregate_metrics().items()
            }
            collector.clear_metrics()
        return sample


def _system_collectors() -> list[Any]:
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    except ImportError as error:
        logger.warning("system metrics are off: %s; `pip install psutil` turns them on", error)
        return []
    collectors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    collectors += _gpu_collector()
    return collectors


def _gpu_collector() -> list[Any]:
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    try:
        return [GPUMonitor()]
    except (ImportError, RuntimeError) as error:
        logger.info("GPU metrics are off: %s", error)
        return []


def _witness(values: Mapping[str, Any]) -> str:
    """The number by which a line is recognised: the loss, or the first quantity that is not a time or a "
    "rate of one."""
    if "loss_nats" in values:
        return "loss_nats"
    names = [name for name in values if name not in _NOT_METRICS and not name.startswith("system/")]
    return next((name for name in names if not name.endswith("_s")), names[0] if names else "")
