"""What LASP+ adds to the lightning operator on one rank, as shares of the operator's time.

    python tests/bench/lasp_share.py

One process plays a rank in the middle of one document: it sums the state it would send, then runs the operator with a
state that it would have received; no exchange. On a GPU bf16, 64 and 8 heads of 128, else fp32, 4 heads of 64. `state`
is one pass over two operands, `entering` what the operator takes longer because a state enters. Median times in turns
in one process; `reach` is the tokens after which the slowest head has decayed to 1e-6. On a GPU the time is that of the
device (events), the host's is beside it. Printed: rows of BENCHMARKS.md.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from kernels_cuda.lightning.decay import lightning_slopes  # noqa: E402
from kernels_cuda.lightning.spans import leaving_states, scan_backward_into, scan_into  # noqa: E402
from parallel.lasp import horizon_of  # noqa: E402

ROUNDS = 9
FLOOR = 1e-6


def seconds(action: Callable[[], object], device: str) -> tuple[float, float]:
    """Time of one call on the device, and on the host until it may go on; a CPU is both."""
    if device == "cpu":
        started = time.perf_counter()
        action()
        return (time.perf_counter() - started,) * 2
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # keeps the device busy until everything is queued, so that the host's time is not in the device's
    torch.cuda._sleep(2_000_000)
    start.record()
    started = time.perf_counter()
    action()
    host = time.perf_counter() - started
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3, host


def measure(tokens: int, heads: int, dim: int, layer: int, device: str) -> list[str]:
    """Cells of one row: times of the operator in milliseconds and shares of the parts."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    slopes_h = lightning_slopes(heads, layer, 80).float().to(device)
    q, k, v, grad_o = (torch.randn(tokens, heads, dim, device=device, dtype=dtype) for _ in range(4))
    state = torch.randn(1, heads, dim, dim, device=device)
    o, whole = torch.empty_like(q), ((0, tokens),)
    grads = (torch.empty_like(q), torch.empty_like(q), torch.empty_like(q))
    reach = horizon_of(slopes_h, FLOOR)
    kept = min(tokens, math.ceil(reach))

    def backward(entering: torch.Tensor | None) -> None:
        scan_backward_into(grads, grad_o, lambda: entering, (q, k, v), slopes_h, entering, whole)

    actions: dict[str, Callable[[], object]] = {
        "forward": lambda: scan_into(o, (q, k, v), slopes_h, None, whole),
        "backward": lambda: backward(None),
        "state": lambda: leaving_states(k, v, slopes_h, whole, False),
        "forward, entered": lambda: scan_into(o, (q, k, v), slopes_h, state, whole),
        "state, against time": lambda: leaving_states(q, grad_o, slopes_h, whole, True),
        "backward, entered": lambda: backward(state),
        "state, truncated": lambda: leaving_states(k, v, slopes_h, ((tokens - kept, tokens),), False),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    for _ in range(ROUNDS + 2):
        for name, action in actions.items():
            found[name].append(seconds(action, device))
    median = {
        name: [statistics.median(column) for column in zip(*values[2:], strict=True)]
        for name, values in found.items()
    }
    forward, backward_s = median["forward"][0], median["backward"][0]
    parts = [
        median["state"][0] / forward,
        median["forward, entered"][0] / forward - 1,
        median["state, against time"][0] / backward_s,
        median["backward, entered"][0] / backward_s - 1,
        median["state, truncated"][0] / forward,
    ]
    times = [f"{x * 1e3:.3f}" for x in (forward, backward_s)]
    host = [f"{median[name][1] * 1e6:.0f}" for name in ("forward", "state")]
    return [*map(str, (tokens, heads, layer, round(reach))), *times, *(f"{x:.0%}" for x in parts), *host]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    name = torch.cuda.get_device_name() if device == "cuda" else "1 CPU core, fp32, head dim 64"
    print(f"{date.today()}, commit {commit}, {name}, n={ROUNDS}\n")
    print(
        "| tokens per rank | heads | layer | reach | forward ms | backward ms | state | entering | state, backward | "
        "entering, backward | state truncated at 1e-6 | forward host us | state host us |"
    )
    print("|" + "---|" * 13)
    shapes = [(8192, 64), (8192, 8), (32768, 8), (131072, 8)] if device == "cuda" else [(8192, 4), (32768, 4)]
    for tokens, heads in shapes:
        for layer in (0, 40, 78):
            print(
                "| "
                + " | ".join(measure(tokens, heads, 128 if device == "cuda" else 64, layer, device))
                + " |"
            )


if __name__ == "__main__":
    main()
