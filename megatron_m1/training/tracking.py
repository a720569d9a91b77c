"""Tracking of one run: every number into the record beside the checkpoints, and from there to MLflow.

The trainer calls `Tracking` on one rank. Writing the record is spool.py, sending it is mlflow_sink.py, and
what a step reports is metrics.py.
"""

import json
import logging
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlparse

from megatron_m1.training.metrics import StepMetrics
from megatron_m1.training.mlflow_run import REQUEST_TIMEOUT_S, RunPosition
from megatron_m1.training.mlflow_sink import MlflowSink
from megatron_m1.training.spool import RECORD_FILE_NAME, Spool

logger = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
POSITION_FILE_NAME = "mlflow_position.json"
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
_VERSIONED_PACKAGES = ("megatron-m1", "torch", "megatron-core", "mlflow")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """Where the metrics of a run go, besides the record that is always written."""

    enabled: bool = True
    """Send to MLflow; the record `metrics.jsonl` in the run directory is written in any case."""
    uri: str | None = None
    """MLflow server or database; None is a SQLite file in the run directory."""
    experiment: str = "megatron-m1"
    """MLflow experiment the run belongs to; created when missing."""
    system_metrics: bool = True
    """Sample CPU, memory, disk, network and GPUs of the machine of the logging rank."""
    system_metrics_interval_s: float = 10.0
    """Seconds between two samples; each one is logged with the next step."""
    tags: dict[str, str] = field(default_factory=dict)
    """Further tags of the run."""

    def __post_init__(self) -> None:
        if self.uri is not None and urlparse(self.uri).scheme.split("+")[0] not in _SCHEMES:
            raise ValueError(
                f"tracking.uri={self.uri!r} is not a server or a database that MLflow 3 writes to: allowed "
                f"are URIs that begin with {', '.join(f'{scheme}:' for scheme in _SCHEMES)}; for a local "
                "file write sqlite:///path/mlflow.db, or leave uri out"
            )
        if self.uri is not None and urlparse(self.uri).password is not None:
            # not shown: a log is the place where it must not be
            raise ValueError(
                "tracking.uri holds a password: the resolved run file is written to the run directory, into every "
                "checkpoint and to MLflow, so it must hold no secret; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD (a database: PGPASSWORD or its own password file) in the environment instead"
            )
        if not self.experiment.strip():
            raise ValueError(
                f"tracking.experiment={self.experiment!r} is empty: MLflow needs a name; leave it out for "
                "'megatron-m1'"
            )
        if not self.system_metrics_interval_s > 0:
            raise ValueError(
                f"tracking.system_metrics_interval_s={self.system_metrics_interval_s} is not a time: it must "
                "be above 0; to sample nothing set system_metrics=false"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDescription:
    """What MLflow shows about a run besides its metrics."""

    name: str
    """Name of the run in lists and plots."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Resolved run file as nested mappings; flattened to `section.field`."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Layout, commit, versions: strings to search runs by."""
    run_file: Path | None = None
    """Resolved run file, stored as an artifact."""

    def record(self) -> dict[str, Any]:
        """The description as it stands in the line that starts a life."""
        return {
            "run_name": self.name,
            "parameters": flatten(self.parameters),
            "tags": {name: str(value) for name, value in self.tags.items()},
            "run_file": None if self.run_file is None else str(self.run_file.resolve()),
        }


class Tracking:
    """Records one life of a run and sends it to MLflow; as a context manager it also records how the life "
    "ended."""

    def __init__(
        self,
        config: TrackingConfig,
        run_directory: Path,
        description: RunDescription,
        *,
        resume_from_step: int | None = None,
        run_id: str | None = None,
    ) -> None:
        """Start a life; returns before MLflow is imported or asked.

        `resume_from_step` is the step of the checkpoint the life starts from; None starts the run afresh,
        under a new MLflow run if the directory was used before. `run_id` is the one stored in the checkpoint;
        the position file in the run directory, where there is one, goes before it.
        """
        record = description.record()
        record["tags"] |= config.tags
        self._spool = Spool(run_directory, resume_from_step, record)
        self._sink: MlflowSink | None = None
        self._last_step = resume_from_step or 0
        if config.enabled:
            position = _position(config, run_directory)
            if resume_from_step is None:
                position = RunPosition(
                    position.path, position.tracking_uri, sent_offset=self._spool.life_offset
                )
                position.save()
            elif position.run_id is None:
                position.run_id = run_id
            self._sink = _sink(config, self._spool.path, position)
            self._sink.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run for the checkpoint; None while the server has not answered yet."""
        return self._sink.run_id if self._sink else None

    def log_step(self, metrics: StepMetrics) -> None:
        """Record one step: one write to a local file, whatever the server does."""
        system = self._sink.take_system_sample() if self._sink else {}
        self._last_step = metrics.step
        self._spool.append("step", metrics.step, metrics.values() | system)

    def log_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Record an evaluation made after `step` steps."""
        self._spool.append("evaluation", step, values)

    def log_file(self, step: int, file: Path) -> None:
        """Have a file of the run directory stored with the run, under the folder it lies in; it must not change."""
        name = file.resolve().relative_to(self._spool.path.parent.resolve())
        self._spool.append("file", step, {"file": name.as_posix()})

    def sync(self) -> None:
        """Put the record on the disk; part of every checkpoint."""
        self._spool.sync()

    def close(self, status: RunStatus = "FINISHED", timeout_s: float = REQUEST_TIMEOUT_S + 5.0) -> None:
        """End the life; waits at most `timeout_s` for MLflow, and says what it has not got."""
        self._spool.append("end", self._last_step, {"status": status})
        self._spool.close()
        if self._sink and not self._sink.close(timeout_s):
            logger.warning(
                "MLflow has not got the last %d bytes of %s: they are sent when the run is resumed, or by "
                "megatron_m1.training.tracking.replay",
                self._sink.num_unsent_bytes, self._spool.path,
            )  # fmt: skip

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")


def replay(config: TrackingConfig, run_directory: Path, timeout_s: float) -> bool:
    """Send what MLflow has not got of a run that is not running; True when it has everything.

    Everything needed is in the record, also for a run whose server was never reached. A run that was killed
    stays RUNNING in MLflow, for its next life.
    """
    record = run_directory / RECORD_FILE_NAME
    if not record.is_file():
        raise ValueError(
            f"run directory {run_directory} has no {RECORD_FILE_NAME}: replay needs the directory of a run "
            "that has been started; give that directory"
        )
    sink = MlflowSink(
        record, _position(config, run_directory), config.experiment, system_metrics_interval_s=None
    )
    sink.start()
    return sink.close(timeout_s)


def tracking_uri(config: TrackingConfig, run_directory: Path) -> str:
    """The configured URI, or the SQLite file of the run directory."""
    return config.uri or f"sqlite:///{run_directory.resolve() / 'mlflow.db'}"


def open_command(config: TrackingConfig, run_directory: Path) -> str:
    """What a user types to see the run: a command for a database, the address for a server."""
    uri = tracking_uri(config, run_directory)
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def flatten(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as `section.field` to text; lists and the like as JSON."""
    flat: dict[str, str] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def provenance_tags() -> dict[str, str]:
    """Git commit of the running code, where it runs from a checkout, and versions of what the numbers "
    "depend on."""
    tags = {"python_version": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        try:
            tags[f"{package}_version"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            tags[f"{package}_version"] = "not installed"
    root = Path(__file__).resolve().parents[2]
    # An installed wheel may lie inside the checkout of another project, whose commit would be a lie.
    if (root / ".git").exists():
        commit = _git(root, "rev-parse", "HEAD")
        if commit is not None:
            tags["git_commit"] = commit
            tags["git_has_local_changes"] = str(bool(_git(root, "status", "--porcelain", "-uno")))
    return tags


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("git commit of this run is unknown: %s", error)
        return None
    return done.stdout.strip()


def _position(config: TrackingConfig, run_directory: Path) -> RunPosition:
    return RunPosition.load(run_directory / POSITION_FILE_NAME, tracking_uri(config, run_directory))


def _sink(config: TrackingConfig, record: Path, position: RunPosition) -> MlflowSink:
    interval_s = config.system_metrics_interval_s if config.system_metrics else None
    return MlflowSink(record, position, config.experiment, interval_s)
