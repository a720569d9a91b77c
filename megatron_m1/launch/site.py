"""What a cluster is like, from one short YAML file: whose account, which nodes, what every process needs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from megatron_m1 import runfile

_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
_SECRET = re.compile(r"(^|_)(TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS?|KEY|APIKEY)(_|$)", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightLimits:
    """What a node must have before the run starts on it."""

    enabled: bool = True
    """Check the nodes first; a bad one is named, excluded, and the job queued again."""
    scratch_dir: str | None = None
    """Node-local directory that must have room; None is the system's directory for temporary files."""
    min_scratch_gib: float = 10.0
    """Free space of `scratch_dir`, in GiB."""
    min_run_dir_gib: float = 50.0
    """Free space of the run directory, in GiB."""
    min_write_mib_per_s: float = 50.0
    """Slowest write and sync into the run directory, in MiB/s."""
    max_clock_offset_s: float = 5.0
    """Distance of a node's clock from the middle one's, in seconds."""
    wait_s: float = 300.0
    """How long a rank may take to report before its node counts as bad, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A pyxis/enroot container for every task."""

    image: str
    """Image or path of a squashfs file, as `srun --container-image` takes it."""
    mounts: tuple[str, ...] = ()
    """`SOURCE:TARGET[:FLAGS]`; the run's and the data's directories must be among them, under the same names."""
    workdir: str | None = None
    """Directory inside; None is the one the job was submitted from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One cluster. Everything has a default, so that an empty file is a site too."""

    account: str | None = None
    """Who pays: `sbatch --account`."""
    partition: str | None = None
    """Where: `sbatch --partition`; None is the cluster's default."""
    qos: str | None = None
    """`sbatch --qos`."""
    time: str = "24:00:00"
    """Wall-time of one job, as Slurm writes it."""
    gpus_per_node: int = 8
    """GPUs of a node, one rank each; 0 where ranks run on CPUs."""
    ranks_per_node: int | None = None
    """Ranks of a node; None is one per GPU."""
    cpus_per_rank: int | None = None
    """Cores of a rank; None leaves it to Slurm."""
    signal_before_end_s: int = 300
    """Slurm tells the ranks to stop this long before the wall-time ends (up to 60 s earlier), in seconds."""
    max_starts_without_progress: int = 3
    """Starts in a row that may find no new checkpoint; then the job ends with the reason."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """One Slurm task per rank, or one torchrun per node. torchrun dies of SIGUSR1, so there only the clock and
    SIGTERM end a run in good order."""
    python: str | None = None
    """The interpreter that has megatron-m1, for example a virtual environment's `bin/python`; None is the one that
    submits, or `python` in a container."""
    container: Container | None = None
    """Run every task in a pyxis/enroot container."""
    preflight: PreflightLimits = field(default_factory=PreflightLimits)
    """What is checked on every node first."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every process: NCCL_SOCKET_IFNAME, NCCL_IB_HCA and the like."""
    sbatch: tuple[str, ...] = ()
    """Further sbatch options, one per entry: `--exclusive`, `--constraint=ib`."""
    setup: tuple[str, ...] = ()
    """Shell lines before anything starts, copied as they are: `module load cuda`."""

    def __post_init__(self) -> None:
        if not _TIME.fullmatch(self.time):
            raise ValueError(
                f"time={self.time!r} is not a wall-time: Slurm reads MINUTES, HOURS:MINUTES:SECONDS or "
                'DAYS-HOURS:MINUTES:SECONDS; write for example time: "24:00:00"'
            )
        if self.gpus_per_node < 0 or self.tasks_per_node < 1:
            raise ValueError(
                f"gpus_per_node={self.gpus_per_node} with ranks_per_node={self.ranks_per_node} puts no rank on a "
                "node: a node needs 1 rank or more; set gpus_per_node, or ranks_per_node where ranks run on CPUs"
            )
        if self.max_starts_without_progress < 1:
            raise ValueError(
                f"max_starts_without_progress={self.max_starts_without_progress} would stop every job before its "
                "first start: it must be 1 or more; the default is 3"
            )
        for name in self.environment:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(
                    f"environment name {name!r} is not a variable: letters, digits and _ are allowed, no digit "
                    "first; correct it in the site file"
                )
            if _SECRET.search(name):
                raise ValueError(
                    f"environment name {name} looks like a secret's: the batch script is shown and stored, so it may "
                    "hold none; export it in the shell that submits (sbatch passes the environment on), or keep it in "
                    "a file that `setup` reads"
                )
        for option in self.sbatch:
            if not option.startswith("-"):
                raise ValueError(
                    f"sbatch option {option!r} does not begin with '-': write one whole option per entry, "
                    "for example --constraint=ib"
                )

    @property
    def tasks_per_node(self) -> int:
        """Ranks of one node."""
        return self.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node


def load_site(path: Path) -> Site:
    """The site that a YAML file describes.

    Raises:
        ValueError: no such file, an unknown key, a value of the wrong type or out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"site file {path} cannot be read ({error}): it must be a YAML file with what your cluster is like; "
            "start from slurm/site.yaml"
        ) from error
    return parse_site(text, source=f"site file {path}")


def parse_site(text: str, *, source: str) -> Site:
    """As `load_site`, from text; `source` names it in errors."""
    values: Any = runfile.parse(text, source=source) or {}
    runfile.refuse_unknown_keys(Site, values, source=source)
    try:
        return TypeAdapter(Site).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ValueError(
            "\n".join(f"{source}: {runfile.sentence_of(detail)}" for detail in error.errors())
        ) from error


def parse_limits(texts: Sequence[str], scratch_dir: str | None) -> PreflightLimits:
    """Limits from `NAME=NUMBER` each, as the batch script passes them on."""
    values: dict[str, Any] = {"scratch_dir": scratch_dir}
    for text in texts:
        name, value = runfile.parse_override(text)
        values[name] = value
    runfile.refuse_unknown_keys(PreflightLimits, values, source="--limit")
    return PreflightLimits(**values)
