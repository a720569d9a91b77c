"""Training speed of preset `tiny` on one CPU core against the same model in the transformers library.

    python tests/bench/against_transformers.py [steps, default 7]

Two processes of one thread each hold the same weights (ours, exported) and take turns, so that a machine that slows
down slows both; a step is forward, loss and backward of one row of 2,048 tokens in fp32, no optimizer. Ours is in
training mode, its load-balancing loss included; transformers runs its own defaults (scaled-dot-product attention,
its chosen expert kernels), without that loss and with whole-head rotary. Printed: one row of BENCHMARKS.md, by wall
clock, and the ratio by processor time, which other programs on the machine do not touch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SEQUENCE_LENGTH = 2048


def our_step(directory: Path) -> Callable[[torch.Tensor], None]:
    """Build `tiny` on one process, leave its weights in `directory`, give one training step."""
    from megatron_m1.config import load_run
    from megatron_m1.interop.huggingface import Export, export_weights
    from megatron_m1.model.hybrid import build_model
    from megatron_m1.model.packed import Packed
    from parallel import cpu
    from parallel.groups import create_groups
    from parallel.launch import connect, read_environment
    from parallel.layout import Layout

    cpu.install()
    connect(read_environment({}))
    groups = create_groups(Layout(), torch.device("cpu"))
    (model,) = build_model(load_run("tiny").model, groups)
    export = Export(dialect="native", stored_as="fp32", max_position_embeddings=SEQUENCE_LENGTH)
    export_weights(directory, [model], groups, export)
    packed = Packed.from_lengths(
        [SEQUENCE_LENGTH], row_tokens=SEQUENCE_LENGTH, auxiliary_weight=1.0, device=groups.device
    )

    def step(tokens_T: torch.Tensor) -> None:
        model(tokens_T, packed, labels_T=tokens_T.roll(-1)).mean().backward()
        model.zero_grad()
        for _, router in model.routers():
            router.take_load()

    return step


def their_step(directory: Path) -> Callable[[torch.Tensor], None]:
    """Load the exported weights into transformers, give one training step."""
    from transformers import MiniMaxForCausalLM

    model = MiniMaxForCausalLM.from_pretrained(directory, dtype=torch.float32).train()

    def step(tokens_T: torch.Tensor) -> None:
        model(tokens_T[None], labels=tokens_T[None], use_cache=False).loss.backward()
        model.zero_grad()

    return step


def serve(whose: str, directory: Path) -> None:
    """Run one step per line of standard input; answer with its wall and processor seconds."""
    torch.set_num_threads(1)
    step = {"ours": our_step, "theirs": their_step}[whose](directory)
    tokens_T = torch.randint(4096, (SEQUENCE_LENGTH,), generator=torch.Generator().manual_seed(0))
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        step(tokens_T)
        print(json.dumps([time.perf_counter() - wall, time.process_time() - processor]), flush=True)


class Worker:
    """A process that runs the steps of one of the two."""

    def __init__(self, whose: str, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, whose, str(directory)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        while self._answer() != "ready":
            pass

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with exit code {self._process.wait()}")
        return line.strip()

    def step(self) -> tuple[float, float]:
        """Wall and processor seconds of one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        wall_s, processor_s = json.loads(self._answer())
        return wall_s, processor_s

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(num_steps: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Alternating steps after two that are not counted: (wall, processor) seconds of ours and of theirs."""
    with tempfile.TemporaryDirectory() as directory:
        ours = Worker("ours", Path(directory))
        theirs = Worker("theirs", Path(directory))
        try:
            pairs = [(ours.step(), theirs.step()) for _ in range(num_steps + 2)][2:]
        finally:
            ours.end()
            theirs.end()
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def main(num_steps: int) -> None:
    ours, theirs = measure(num_steps)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    our_rate, their_rate = (
        SEQUENCE_LENGTH / statistics.median(wall for wall, _ in times) for times in (ours, theirs)
    )
    by_processor = statistics.median(t for _, t in theirs) / statistics.median(t for _, t in ours)
    print(
        f"| {date.today()} | {commit} | 1 CPU core, fp32 | tiny, 1 x {SEQUENCE_LENGTH} tokens, forward + backward "
        f"| `python tests/bench/against_transformers.py` | {our_rate:,.0f} tokens/s (n={num_steps}) "
        f"| transformers: {their_rate:,.0f} tokens/s | {our_rate / their_rate:.2f} |"
    )
    print(f"ratio by processor time: {by_processor:.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        serve(sys.argv[1], Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
