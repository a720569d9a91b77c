"""Hands a run to sbatch: one job that queues itself again, or a chain of jobs, each after the one before."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from megatron_m1.launch.script import Job, render
from megatron_m1.launch.site import Site
from parallel.manifest import write_durably


def nodes_for(world_size: int, site: Site, nodes: int | None) -> int:
    """Nodes of a run: what its layout needs, or what was asked for (dp then grows to fill them).

    Raises:
        ValueError: the layout does not fill whole nodes.
    """
    if nodes is not None and nodes < 1:
        raise ValueError(
            f"--nodes {nodes} is not a count: a job needs 1 node or more; leave it out for the layout's"
        )
    if nodes is None:
        if world_size % site.tasks_per_node:
            raise ValueError(
                f"the layout's {world_size} ranks do not fill nodes of {site.tasks_per_node} ranks: choose a multiple "
                f"of {site.tasks_per_node} with layout.dp, or set ranks_per_node in the site file"
            )
        return world_size // site.tasks_per_node
    return nodes


def submit(job: Job, site: Site, run_file: str, chain: int) -> list[str]:
    """Write the run file and the script into the run directory and submit; the job numbers.

    Raises:
        ValueError: no sbatch here, sbatch refuses, or the directory cannot be written.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ValueError(
            "sbatch is not on PATH: submit on a login node of the cluster, or look at the script with --dry-run"
        )
    job = replace(job, chained=chain > 1)
    script = job.run_dir / "slurm" / "job.sbatch"
    try:
        # Slurm would end the job without a word if its log directory were missing
        for directory in (job.run_dir / "logs", script.parent):
            directory.mkdir(parents=True, exist_ok=True)
        # a job of this run may be starting
        write_durably(job.run_dir / "run.yaml", run_file.encode())
        (job.run_dir / "outcome.txt").unlink(missing_ok=True)
        script.write_text(render(job, site), encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"run_dir={job.run_dir} cannot be written ({error}): every node must reach it under this name; choose "
            "another with run_dir=PATH"
        ) from error
    numbers: list[str] = []
    for _ in range(chain):
        after = [f"--dependency=afterany:{numbers[-1]}"] if numbers else []
        numbers.append(_sbatch([sbatch, "--parsable", *after, str(script)], job.work_dir))
    return numbers


def _sbatch(command: list[str], work_dir: Path) -> str:
    done = subprocess.run(command, cwd=work_dir, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ValueError(
            f"sbatch refused the job: {done.stderr.strip()}; correct the site file or the run, and submit again"
        )
    # with several clusters: NUMBER;CLUSTER
    return done.stdout.strip().split(";")[0]
