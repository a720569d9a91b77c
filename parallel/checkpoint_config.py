"""The section `checkpoint` of a run file; apart from what it configures, so that reading one loads no megatron-core."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalConfig:
    """Copies of the state on the nodes' own disks, for a start that does not wait for the shared file system."""

    directory: str = ""
    """Where on every node, an absolute path; a directory per node and run is made in it. Empty: no copies."""
    every_steps: int = 50
    """Steps between two copies."""
    keep: int = 2
    """Newest copies of a rank that stay on a node; at least 2, because the newest may not be whole on all nodes."""
    peer: bool = True
    """Keep them on the next node as well: one lost node loses nothing. Costs host memory for the state of two ranks
    while they are written, without a peer for one."""

    def __post_init__(self) -> None:
        if self.directory and not Path(self.directory).is_absolute():
            raise ValueError(
                f"checkpoint.local.directory={self.directory!r} is relative: it must be an absolute path that every "
                "node has on a disk of its own; name one such as /scratch/m1"
            )
        for name, least in (("every_steps", 1), ("keep", 2)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"checkpoint.local.{name}={getattr(self, name)} is too small: it must be {least} or more; "
                    "leave checkpoint.local.directory empty to keep no copies"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, how many stay, and how they are written."""

    every_steps: int = 500
    """Steps between two saves; 0 saves only at the end of a run."""
    keep: int = 3
    """Newest checkpoints that stay on disk; 0 keeps all."""
    asynchronous: bool = True
    """Write while training goes on; costs up to one more copy of the state in host memory, or `staging_mib`."""
    staging_mib: int = 0
    """Most host memory per rank that holds a state on its way to the writer, in MiB; a save that needs more waits until
    the writer has made room. At least the largest tensor of a rank. 0: the whole state, so that no save waits."""
    writer_timeout_s: float = 3600.0
    """A background writer that has not finished after this many seconds is ended and the run stops."""
    local: LocalConfig = field(default_factory=LocalConfig)
    """Copies on the nodes' own disks between two checkpoints."""

    def __post_init__(self) -> None:
        for name, meaning in (
            ("every_steps", "save only at the end"),
            ("keep", "keep all"),
            ("staging_mib", "stage everything"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"checkpoint.{name}={getattr(self, name)} is negative: it must be 0 or more; "
                    f"set checkpoint.{name}=0 to {meaning}"
                )
        if self.writer_timeout_s <= 0:
            raise ValueError(
                f"checkpoint.writer_timeout_s={self.writer_timeout_s} is not a time: it must be above 0 seconds; "
                "use several times what a save takes"
            )
