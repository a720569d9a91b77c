"""One run on an MLflow server: its identity across lives, its description, its points, its end.

Every call may raise whatever the client, the network or the server raises, and every call may be repeated:
creation is found again by a key, and MLflow's SQL store keeps one copy of a point with the same name, step,
value and timestamp. When to call, and what to do when a call fails, is mlflow_sink.py's.
"""

import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 10
_METRICS_PER_CALL = 1000
_PARAMETERS_PER_CALL = 100
_PARAMETER_CHARACTERS = 6000
_TAG_CHARACTERS = 8000
_RUN_KEY_TAG = "run_key"
# Set before mlflow is imported. Its own retries would hold a dead server's call for minutes; the sink has its
# pauses.
_CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_TIMEOUT_S),
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class RunGoneError(Exception):
    """The server does not have the run, or has it deleted."""


@dataclass(slots=True)
class RunPosition:
    """Which run the record goes to and how far it has gone; persisted beside the record."""

    path: Path
    tracking_uri: str
    run_id: str | None = None
    sent_offset: int = 0
    """Bytes of the record that the server has confirmed."""
    run_key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Written as a tag when the run is created: a creation whose answer was lost is found again, not "
    "repeated."""

    @classmethod
    def load(cls, path: Path, tracking_uri: str) -> "RunPosition":
        """Position for `tracking_uri`: as saved, or at the start when none is saved for this server."""
        try:
            saved = json.loads(path.read_text())
            position = cls(path=path, **saved)
        except FileNotFoundError:
            return cls(path, tracking_uri)
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s is unreadable (%s): the whole record is sent again", path, error)
            return cls(path, tracking_uri)
        return position if position.tracking_uri == tracking_uri else cls(path, tracking_uri)

    def save(self) -> None:
        """Replace the file as one action. A lost save costs a repetition that the server recognises."""
        text = json.dumps({key: value for key, value in asdict(self).items() if key != "path"})
        unfinished = self.path.with_suffix(".unfinished")
        try:
            with unfinished.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.path)
        except OSError as error:
            logger.warning("position %s not saved: %s", self.path, error)


class MlflowRun:
    """The run that a position names, on its server; created on first use."""

    def __init__(self, position: RunPosition, experiment: str) -> None:
        for name, value in _CLIENT_ENVIRONMENT.items():
            os.environ[name] = value
        # Imported here and not above: it takes seconds, which belong to the sink's thread.
        from mlflow.tracking import MlflowClient

        # A new database announces each of its migrations, over the progress line.
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._position = position
        self._experiment = experiment
        _create_local_database(position.tracking_uri)
        self._client = MlflowClient(tracking_uri=position.tracking_uri)
        self._held: dict[str, dict[int, set[str]]] = {}
        self.is_resumed = False

    def open(self, life: Mapping[str, Any]) -> None:
        """Find or create the run, set it RUNNING, and describe it by the line that started the life.

        Raises: RunGoneError when the run was deleted.
        """
        if self._position.run_id is None:
            self._position.run_id = self._find_run_id() or self._create_run_id(life)
            self._position.save()
        run = self._active_run()
        self.is_resumed = bool(run.data.metrics)
        if run.info.status != "RUNNING":
            self._client.update_run(self._position.run_id, status="RUNNING")
        self._describe(run.data.params, life)

    def send(self, points: Sequence[tuple[str, float, int, int]]) -> int:
        """Send (name, value, time_ms, step) points in order; returns how many the server refused for ever."""
        num_refused = 0
        for start in range(0, len(points), _METRICS_PER_CALL):
            num_refused += self._send_call(points[start : start + _METRICS_PER_CALL])
        return num_refused

    def held_values(self, name: str, step: int) -> set[str]:
        """The values, as `repr`, that the server held for one metric and step when first asked for that "
        "metric."""
        if name not in self._held:
            history: dict[int, set[str]] = {}
            for point in self._client.get_metric_history(self._run_id, name):
                history.setdefault(point.step, set()).add(repr(point.value))
            self._held[name] = history
        return self._held[name].get(step, set())

    def set_tag(self, name: str, value: str) -> None:
        """Set or overwrite one tag."""
        self._client.set_tag(self._run_id, name, value[:_TAG_CHARACTERS])

    def check_answers(self) -> None:
        """Raises: what the server or the network raises when the run cannot be had."""
        self._active_run()

    def upload(self, file: Path, folder: str | None = None) -> None:
        """Store a file as an artifact of the run, in a folder of its artifacts."""
        self._client.log_artifact(self._run_id, str(file), folder)

    def end(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self._run_id, status)

    @property
    def _run_id(self) -> str:
        run_id = self._position.run_id
        assert run_id is not None, f"run of {self._position.path} used before it was opened"
        return run_id

    def _find_run_id(self) -> str | None:
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is None:
            return None
        condition = f"tags.{_RUN_KEY_TAG} = '{self._position.run_key}'"
        found = self._client.search_runs([experiment.experiment_id], condition, max_results=1)
        return found[0].info.run_id if found else None

    def _create_run_id(self, life: Mapping[str, Any]) -> str:
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            location = _local_artifact_location(self._position.tracking_uri)
            experiment_id = self._client.create_experiment(self._experiment, artifact_location=location)
        tags = {_RUN_KEY_TAG: self._position.run_key}
        run = self._client.create_run(experiment_id, tags=tags, run_name=life.get("run_name"))
        return run.info.run_id

    def _active_run(self) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(self._run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RunGoneError(
                    f"run {self._run_id} is unknown to {self._position.tracking_uri}"
                ) from error
            raise
        if run.info.lifecycle_stage != "active":
            raise RunGoneError(f"run {self._run_id} was deleted at {self._position.tracking_uri}")
        return run

    def _describe(self, known: Mapping[str, str], life: Mapping[str, Any]) -> None:
        """Parameters are written once by MLflow's rule: what a later life changes becomes a tag of that "
        "life."""
        from mlflow.entities import Param, RunTag

        wanted = {name: value[:_PARAMETER_CHARACTERS] for name, value in life.get("parameters", {}).items()}
        new = [Param(name, value) for name, value in wanted.items() if name not in known]
        for start in range(0, len(new), _PARAMETERS_PER_CALL):
            self._client.log_batch(self._run_id, params=new[start : start + _PARAMETERS_PER_CALL])
        tags = dict(life.get("tags", {})) | {"life": str(life["life"])}
        if not life.get("is_fresh", True):
            tags["resume_from_step"] = str(life["step"])
        if "git_commit" in tags:
            tags["mlflow.source.git.commit"] = tags["git_commit"]
        changed = {
            name: [known[name], value] for name, value in wanted.items() if known.get(name, value) != value
        }
        if changed:
            tags[f"changed_parameters.life_{life['life']}"] = json.dumps(changed)
        limited = [RunTag(name, value[:_TAG_CHARACTERS]) for name, value in tags.items()]
        self._client.log_batch(self._run_id, tags=limited)

    def _send_call(self, points: Sequence[tuple[str, float, int, int]]) -> int:
        """One call; what the server will never take is found by halving, named and left out."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self._run_id, metrics=[Metric(*point) for point in points])
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    self._active_run()
                raise
            # A deleted run answers with the same code; then it is not the points that are wrong.
            self._active_run()
            if len(points) == 1:
                logger.error("MLflow refuses metric %r of step %d: %s", points[0][0], points[0][3], error)
                return 1
            half = len(points) // 2
            return self._send_call(points[:half]) + self._send_call(points[half:])
        return 0


def _create_local_database(tracking_uri: str) -> None:
    """Create a missing SQLite database under another name and rename it when its schema is whole.

    MLflow creates it by dozens of migrations; a run killed in the middle would leave a file that no later life opens.
    """
    database = _sqlite_path(tracking_uri)
    if database is None or database.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    unfinished = database.with_name(f"{database.name}.unfinished-{os.getpid()}")
    for leftover in database.parent.glob(f"{database.name}.unfinished-*"):
        leftover.unlink()
    store = SqlAlchemyStore(f"sqlite:///{unfinished}", _local_artifact_location(tracking_uri))
    store.engine.dispose()
    unfinished.replace(database)


def _local_artifact_location(tracking_uri: str) -> str | None:
    """Artifacts of a local database lie beside it; None leaves the place to the server."""
    database = _sqlite_path(tracking_uri)
    return (database.parent / "mlflow_artifacts").resolve().as_uri() if database else None


def _sqlite_path(tracking_uri: str) -> Path | None:
    """The file of a SQLite URI, None for anything else."""
    return Path(urlparse(tracking_uri).path[1:]) if tracking_uri.startswith("sqlite:") else None
