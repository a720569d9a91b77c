"""LASP+ against the two other ways to run a lightning layer over context-parallel ranks: bytes moved and step time.

    python tests/bench/lasp_exchange.py [most tokens, default 262144] [cp, default 2 4 8]

One document; on CPUs fp32, 8 heads of 16, gloo ranks of one thread; where there are GPUs bf16, 64 heads of 128, one
NCCL rank per GPU. The three ways take turns in the same processes and are checked against each other. A step is forward
and backward of attention alone, from q, k, v to their gradients, until the slowest rank is done. Bytes are what a rank
receives per layer and step, counted at the collectives. Overlap is 1 - waited / in flight of the state exchanges, from
the times at which each was started, complete, and waited for; left open on GPUs, where the host waits for nothing.
Printed: rows of BENCHMARKS.md, times as ratios to LASP+; ranks beyond the processor's cores share them, alike for all.
"""

from __future__ import annotations

import importlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from kernels_cuda.lightning.decay import lightning_slopes  # noqa: E402
from parallel.lasp import ContextShare, lightning_attention_over_ranks  # noqa: E402
from parallel.split import cut_over_ranks  # noqa: E402
from parallel.state_exchange import AllGather  # noqa: E402
from tests.bench.context_peers import heads_over_ranks, sequence_gathered  # noqa: E402
from tests.spawn import run_ranks  # noqa: E402

ON_GPU = torch.cuda.device_count() > 1
HEADS, HEAD_DIM, LAYER, LAYERS, ROUNDS = (64, 128, 40, 80, 7) if ON_GPU else (8, 16, 3, 8, 3)
LENGTHS, SIZES = (8192, 32768, 131072, 262144), (2, 4, 8)


@dataclass
class Timeline:
    """What one rank's collectives moved and how long they flew and were waited for."""

    received_bytes: int = 0
    in_flight_s: float = 0.0
    waited_s: float = 0.0
    works: list[Any] = field(default_factory=list)


class _Timed:
    """A work handle that notes when its collective is complete and how long somebody waits for it."""

    def __init__(self, work: Any, timeline: Timeline) -> None:
        self._work, self._timeline, self._started = work, timeline, time.perf_counter()
        work.get_future().then(self._landed)

    def _landed(self, _future: Any) -> None:
        self._timeline.in_flight_s += time.perf_counter() - self._started

    def wait(self) -> None:
        before = time.perf_counter()
        self._work.wait()
        self._timeline.waited_s += time.perf_counter() - before


@contextmanager
def observed() -> Iterator[Timeline]:
    """Count bytes and time of every collective called inside; the real ones run."""
    timeline = Timeline()
    real = {
        name: getattr(dist, name)
        for name in ("all_gather_into_tensor", "all_to_all_single", "reduce_scatter_tensor")
    }

    def wrapped(name: str) -> Callable[..., Any]:
        def call(output: torch.Tensor, given: torch.Tensor, **options: Any) -> Any:
            ranks = options["group"].size()
            from_each = {"all_to_all_single": given.nbytes // ranks, "reduce_scatter_tensor": output.nbytes}
            timeline.received_bytes += (ranks - 1) * from_each.get(name, given.nbytes)
            work = real[name](output, given, **options)
            return _Timed(work, timeline) if options.get("async_op") else work

        return call

    for name in real:
        setattr(dist, name, wrapped(name))
    try:
        yield timeline
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def measure(lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """On one rank: per length and way, the median step time in seconds, bytes received and the timeline."""
    group, device = dist.group.WORLD, torch.device("cuda", torch.cuda.current_device()) if ON_GPU else "cpu"
    slopes_H = lightning_slopes(HEADS, LAYER, LAYERS).float().to(device)
    exchange = AllGather(group)

    def lasp(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        split = cut_over_ranks((0, len(q) * group.size()), group.size(), "contiguous")
        return lightning_attention_over_ranks(q, k, v, slopes_H, ContextShare(split=split, exchange=exchange))

    ways: dict[str, Callable[..., torch.Tensor]] = {
        "LASP+": lasp,
        "heads": lambda q, k, v: heads_over_ranks(q, k, v, slopes_H, group),
        "gather": lambda q, k, v: sequence_gathered(q, k, v, slopes_H, group),
    }
    # the shortest length is measured twice: first to warm up
    found = [_measure_length(length // group.size(), ways, group) for length in (lengths[0], *lengths)]
    return found[1:]


def _measure_length(tokens: int, ways: dict[str, Callable[..., torch.Tensor]], group: Any) -> dict[str, Any]:
    torch.manual_seed(group.rank())
    options = {"device": "cuda", "dtype": torch.bfloat16} if ON_GPU else {}
    qkv = [torch.randn(tokens, HEADS, HEAD_DIM, **options).requires_grad_() for _ in range(3)]
    grad_o = torch.randn(tokens, HEADS, HEAD_DIM, **options)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    timelines, outputs = {}, {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            _all_done()
            started = time.perf_counter()
            with observed() as timelines[name]:
                o = way(*qkv)
                gradients = torch.autograd.grad(o, qkv, grad_o)
            _all_done()
            seconds[name].append(time.perf_counter() - started)
            outputs[name] = (o.detach(), *gradients)
            del o, gradients
    for name, found in outputs.items():
        for mine, theirs in zip(outputs["LASP+"], found, strict=True):
            error = float((mine.float() - theirs.float()).norm() / mine.float().norm())
            assert error < (1e-2 if ON_GPU else 1e-4), (name, error)
    mine = timelines["LASP+"]
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "bytes": {name: timeline.received_bytes for name, timeline in timelines.items()},
        "overlap": math.nan if ON_GPU else 1 - mine.waited_s / mine.in_flight_s,
    }


def _all_done() -> None:
    if ON_GPU:
        torch.cuda.synchronize()
    dist.barrier()


def main() -> None:
    most = int(sys.argv[1]) if len(sys.argv) > 1 else LENGTHS[-1]
    lengths = tuple(length for length in LENGTHS if length <= most)
    sizes = tuple(map(int, sys.argv[2:])) or SIZES
    device = f"{os.cpu_count()} CPU cores, fp32"
    if ON_GPU:
        device = f"{torch.cuda.get_device_name()}, bf16"
        sizes = tuple(size for size in sizes if size <= torch.cuda.device_count())
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    # the ranks import this file by its name, which is not __main__ there
    named = importlib.import_module("tests.bench.lasp_exchange").measure
    print(f"{date.today()}, commit {commit}, {device}, {HEADS} heads x {HEAD_DIM}, n={ROUNDS}\n")
    print(
        "| cp | tokens | LASP+ MB | heads MB | gather MB | LASP+ ms | heads / LASP+ | gather / LASP+ | overlap |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for size in sizes:
        ranks = run_ranks(size, named, lengths, timeout_s=600.0)
        for index, length in enumerate(lengths):
            one = ranks[0][index]
            megabytes = [
                f"{max(rank[index]['bytes'][way] for rank in ranks) / 1e6:.2f}" for way in one["bytes"]
            ]
            ours, *others = one["seconds"].values()
            overlap = statistics.mean(rank[index]["overlap"] for rank in ranks)
            cells = [
                size,
                length,
                *megabytes,
                f"{1e3 * ours:.1f}",
                *(f"{x / ours:.2f}" for x in others),
                "-" if ON_GPU else f"{overlap:.2f}",
            ]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
