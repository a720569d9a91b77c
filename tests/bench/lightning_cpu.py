"""Lightning attention on one CPU core, forward and backward, against two other pure-PyTorch implementations.

    python tests/bench/lightning_cpu.py [rounds, default 9]

8 heads of 128, 4,096 tokens, one thread, q, k, v as strided views of one projection. Peers, in the same process and in
turns: `naive_chunk_simple_gla` of fla-core 0.5.2 where it is installed (`pip install --no-deps fla-core==0.5.2`; it
computes in fp32 whatever it is given, and its file is loaded alone, as the package imports Triton), and the loop of
transformers' MiniMaxLightningAttention with its projections, activation and norm replaced by nothing. Printed: rows of
BENCHMARKS.md, by processor time, which other programs on the machine hardly touch, in memory that the process keeps, as
fetching fresh pages for each result takes up to a sixth of a call; errors are relative RMS of the worst head against
fp64.
"""

from __future__ import annotations

import ctypes
import importlib.util
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

from kernels_cuda.bench.measure import worst_head_error  # noqa: E402
from kernels_cuda.lightning.chunked import lightning_scan  # noqa: E402
from kernels_cuda.lightning.decay import lightning_slopes  # noqa: E402
from kernels_cuda.lightning.projection import lightning_of_projection  # noqa: E402

TOKENS, HEADS, HEAD_DIM, LAYER, LAYERS = 4096, 8, 128, 3, 8
SLOPES_H = lightning_slopes(HEADS, LAYER, LAYERS)

# of glibc's malloc.h
TRIM_THRESHOLD, MMAP_MAX = -1, -4

Attention = Callable[[torch.Tensor], torch.Tensor]
"""[T, H, 3, D] -> [T, H, D]."""


def ours(qkv: torch.Tensor) -> torch.Tensor:
    return lightning_of_projection(qkv, SLOPES_H)


def load_fla() -> Attention | None:
    """fla's pure-PyTorch chunked form, from its file: importing the package needs Triton. None if not installed."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / "ops/simple_gla/naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive", path)
    assert spec is not None and spec.loader is not None, path
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    log_decay_1TH = -SLOPES_H.expand(1, TOKENS, HEADS)

    def attention(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (x[None] for x in qkv.unbind(2))
        return naive.naive_chunk_simple_gla(q, k, v, log_decay_1TH, scale=1.0)[0][0]

    return attention


class HalfOfOnes(torch.nn.Module):
    """Stands for the output gate: its sigmoid is 1/2 everywhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(())


def load_transformers(dtype: torch.dtype) -> Attention:
    """The loop of transformers' layer; in bf16 its decay factors are bf16 too, as `model.to(bfloat16)` makes them."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=64, num_attention_heads=HEADS, head_dim=HEAD_DIM, num_hidden_layers=LAYERS
    )
    layer = MiniMaxLightningAttention(config, LAYER).to(dtype)
    layer.output_gate = HalfOfOnes()
    for name in ("qkv_proj", "out_proj", "norm", "act_fn"):
        setattr(layer, name, torch.nn.Identity())

    def attention(qkv: torch.Tensor) -> torch.Tensor:
        o, _ = layer(qkv.view(1, TOKENS, -1), None, None)
        return 2 * o.view(TOKENS, HEADS, HEAD_DIM)

    return attention


def timed(attention: Attention, qkv: torch.Tensor, grad_o: torch.Tensor) -> tuple[float, float]:
    """Seconds of one forward (graph kept) and of its backward."""
    leaf = qkv.detach().requires_grad_()
    start = time.process_time()
    o = attention(leaf)
    middle = time.process_time()
    grad_o = grad_o.to(o.dtype)
    restart = time.process_time()
    o.backward(grad_o)
    return middle - start, time.process_time() - restart


def measure(dtype: torch.dtype, rounds: int) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Median (forward, backward) seconds and error of each implementation, in turns after two warm-ups."""
    torch.manual_seed(0)
    qkv = torch.nn.functional.silu(torch.randn(TOKENS, HEADS, 3, HEAD_DIM)).to(dtype)
    grad_o = torch.randn(TOKENS, HEADS, HEAD_DIM)
    peers = {"ours": ours, "fla": load_fla(), "transformers": load_transformers(dtype)}
    calls = {name: call for name, call in peers.items() if call is not None}
    exact, _ = lightning_scan(*qkv.double().unbind(2), SLOPES_H, None, (0, TOKENS), output_state=False)
    errors = {name: worst_head_error(call(qkv), exact) for name, call in calls.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            sample = timed(call, qkv, grad_o)
            if turn >= 2:
                samples[name].append(sample)
    medians = {
        name: tuple(statistics.median(column) for column in zip(*pairs, strict=True))
        for name, pairs in samples.items()
    }
    return medians, errors  # type: ignore[return-value]


def keep_memory() -> None:
    """Let glibc give nothing back to the kernel, and take nothing past the heap, for the rest of this process."""
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(TRIM_THRESHOLD, 2**31 - 1) and libc.mallopt(MMAP_MAX, 0)):
        raise RuntimeError("mallopt refused: this bench needs glibc, or times page faults too")


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    keep_memory()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    print(f"{date.today()}, commit {commit}, torch {torch.__version__}, medians of {rounds}")
    print("| dtype | forward | backward | backward / forward | error | fla / ours | transformers / ours |")
    print("|---|---|---|---|---|---|---|")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        medians, errors = measure(dtype, rounds)
        (forward, backward), both = medians["ours"], sum(medians["ours"])
        ratios = {"fla": "fla-core is not installed"} | {
            peer: f"{medians[peer][0] / forward:.1f} fwd, {sum(medians[peer]) / both:.1f} both, "
            f"error {errors[peer]:.0e}"
            for peer in medians
        }
        print(
            f"| {name} | {TOKENS / forward / 1e3:.0f}k tokens/s | {TOKENS / backward / 1e3:.0f}k tokens/s "
            f"| {backward / forward:.2f} | {errors['ours']:.0e} | {ratios['fla']} | {ratios['transformers']} |"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
