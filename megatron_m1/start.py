"""`m1 train`: prepare the run directory, then be a rank, or start the local ranks where no launcher has.

Whoever only starts ranks does not load megatron-core, which takes seconds.
"""

from __future__ import annotations

import time

from megatron_m1.config import RUN_FILE, RunConfig, dump_run
from megatron_m1.stages import stages_of
from parallel.launch import read_environment, run_local_ranks
from parallel.manifest import write_durably

OUTCOME_FILE = "outcome.txt"
"""One line for whoever started the ranks: "finished at step N", "stopped after step N: why"; no file after a crash."""


def train(config: RunConfig, *, resume: bool = True) -> None:
    """Train a run to its end, from its newest complete checkpoint or from the start.

    Raises:
        ValueError: the run cannot start as it stands; says what to change.
        SystemExit: a local rank failed; its own output says why.
    """
    launch = read_environment()
    if launch.rank == 0:
        _prepare_directory(config, resume)
    world_size = max(stage.config.layout.world_size for stage in stages_of(config))
    if launch.launcher == "single" and world_size > 1:
        code = run_local_ranks(world_size, ["train", str(config.run_dir / RUN_FILE)])
        if code:
            raise SystemExit(code)
        return
    from megatron_m1.run import live

    live(config, launch)


def _prepare_directory(config: RunConfig, resume: bool) -> None:
    """Write the resolved run file; a fresh start moves an earlier run's directory aside, never deletes it."""
    directory = config.run_dir
    if not resume and directory.exists():
        aside = directory.with_name(f"{directory.name}.before-{time.strftime('%Y%m%dT%H%M%S')}")
        directory.rename(aside)
        print(f"moved the earlier run to {aside}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # the other ranks are reading it at this moment: a file cut short would be another run to them
        write_durably(directory / RUN_FILE, dump_run(config).encode())
        (directory / OUTCOME_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"run_dir={directory} cannot be written ({error}): it must be a directory this user may write; "
            "choose another with run_dir=PATH"
        ) from error
