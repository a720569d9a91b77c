"""What is watched while a run trains: hangs, refused steps, slow or full ranks, and the endpoint that shows it all.

The parts are `parallel/hang.py`, `megatron_m1/training/health.py` and `megatron_m1/training/endpoint.py`; here they are
put together for one stage. `Vitals` stands between the trainer and the reporter: every number goes through it once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_m1.config import RunConfig
from megatron_m1.training.endpoint import MetricsEndpoint
from megatron_m1.training.health import Judge, refused_steps, write_refused
from megatron_m1.training.loop import Reporter
from megatron_m1.training.metrics import StepMetrics
from parallel.groups import Groups
from parallel.hang import Watchdog

_SURVEY_EVERY_STEPS = 100
_LOG = logging.getLogger(__name__)
_PROBE_WIDTH = 512
_PROBE_REPEATS = 8
_SLOW = 1.3


class Vitals:
    """A context manager around the training of one stage, on every rank; also the reporter of its trainer."""

    def __init__(
        self, config: RunConfig, groups: Groups, reporter: Reporter, losses: Sequence[float]
    ) -> None:
        """config: of the run. losses: the window that the checkpoint holds, empty at a fresh start."""
        self._groups, self._reporter = groups, reporter
        health, rank = config.health, dist.get_rank()
        self.watchdog = Watchdog(
            config.run_dir / "hang",
            timeout_s=health.hang_timeout_s,
            rank=rank,
            world_size=dist.get_world_size(),
        )
        # rank 0's view is everybody's: a shared file system may be late on other nodes
        passed_over = [[record["step"] for record in refused_steps(config.run_dir)] if rank == 0 else []]
        dist.broadcast_object_list(passed_over, src=0)
        self.judge = Judge(
            health,
            self._any_rank,
            losses=losses,
            passed_over=passed_over[0],
            write=(lambda refused: write_refused(config.run_dir, refused)) if rank == 0 else lambda _: None,
        )
        self._endpoint: MetricsEndpoint | None = None
        if health.prometheus_port and rank == 0:
            self._endpoint = MetricsEndpoint(health.prometheus_port, {"run": config.name})
            _LOG.info(
                "metrics at http://127.0.0.1:%d/metrics, for processes of this machine only",
                self._endpoint.port,
            )
        self._surveyed: dict[str, float] = {}
        self._saved_s: float | None = None
        self.newest: StepMetrics
        """Of the last step; there once a step was taken."""
        self._stack = ExitStack()

    def step(self, metrics: StepMetrics) -> None:
        """A step was taken: pass it on with what the last survey found."""
        self.watchdog.beat()
        survey, self._surveyed = self._surveyed, {}
        age = {} if self._saved_s is None else {"checkpoint_age_s": time.monotonic() - self._saved_s}
        metrics = replace(metrics, extra={**metrics.extra, **survey, **age})
        if self._endpoint:
            values = {"step": metrics.step, "refused_steps": self.judge.refused_steps}
            self._endpoint.update(metrics.values() | values)
        self._reporter.step(metrics)
        self.newest = metrics
        if metrics.step % _SURVEY_EVERY_STEPS == 0:
            self._surveyed = self._survey()

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """An evaluation was made."""
        self.watchdog.beat()
        if self._endpoint:
            self._endpoint.update(values)
        self._reporter.evaluation(step, values)

    def saved(self) -> None:
        """A checkpoint was begun."""
        self._saved_s = time.monotonic()
        if self._endpoint:
            self._endpoint.saved()

    def _any_rank(self, condition: bool) -> bool:
        flag = torch.tensor([int(condition)], dtype=torch.int32, device=self._groups.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _survey(self) -> dict[str, float]:
        """Speed and free memory of all ranks: the slowest and the fullest one. Collective.

        All ranks of a step take equally long, because they wait for each other; so each one times the same small
        product by itself.
        """
        own = torch.tensor(
            [_probe_s(self._groups.device), _free_gib(self._groups.device)],
            dtype=torch.float64,
            device=self._groups.device,
        )
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        probe_s, free_gib = torch.stack(everyone).cpu().T
        slowest, fullest = int(probe_s.argmax()), int(free_gib.argmin())
        over_median = float(probe_s[slowest] / probe_s.median())
        return {
            "slowest_rank": slowest,
            "slowest_rank_over_median": over_median,
            "num_slow_ranks": int((probe_s > _SLOW * probe_s.median()).sum()),
            "least_free_memory_gib": float(free_gib[fullest]),
            "least_free_memory_rank": fullest,
        }

    def __enter__(self) -> Vitals:
        self._stack.enter_context(self.watchdog)
        if self._endpoint:
            self._stack.enter_context(self._endpoint)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _probe_s(device: torch.device) -> float:
    """Seconds of a few products of fixed size on this rank's device, the fastest of two tries."""
    x = torch.ones(_PROBE_WIDTH, _PROBE_WIDTH, device=device)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        for _ in range(_PROBE_REPEATS):
            y = x @ x
        # reading a value waits for the device
        y[0, 0].item()
        times.append(time.perf_counter() - started)
    return min(times)


def _free_gib(device: torch.device) -> float:
    """Memory still to be had: of the GPU, or of the machine where ranks run on CPUs."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free / 2**30
