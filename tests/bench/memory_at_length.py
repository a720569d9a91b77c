"""Peak memory of a training step per rank, against the tokens of the rank and the length of the whole microbatch.

    python -m tests.bench.memory_at_length [--document-tokens 65536] [--layouts 4x32768 4x1048576 ...]

A layout CPxTOKENS is one step of a small hybrid (three lightning layers, one softmax layer of one head) on CP gloo
ranks: one microbatch of TOKENS tokens, layers recomputed, logits in chunks of 16 MiB. Softmax work grows with the
square of a document, and a CPU has little of it: documents are `--document-tokens` long, the first half as long, so
that every border between zigzag chunks lies inside a document. Printed: rows of BENCHMARKS.md. The peak is what the
kernel counted as resident during the step, less what was resident before it, after a step of 512 tokens per rank has
made what any step makes; the largest rank counts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.spawn import ROOT, run_ranks

LAYOUTS = ["4x32768", "4x131072", "4x524288", "4x1048576", "2x65536", "1x32768"]
"""Growing length at CP4, then equal tokens per rank at other lengths."""
VOCABULARY = 4096


@dataclass(frozen=True)
class Row:
    """A microbatch of random tokens in documents of given lengths."""

    tokens_S: np.ndarray
    labels_S: np.ndarray
    loss_mask_S: np.ndarray
    document_lengths: list[int]
    sample_id: int = 0


def documents(tokens: int, document_tokens: int) -> list[int]:
    """Half a document, whole ones, and what is left."""
    lengths = [min(tokens, document_tokens // 2)]
    while sum(lengths) < tokens:
        lengths.append(min(document_tokens, tokens - sum(lengths)))
    return lengths


def make_row(tokens: int, document_tokens: int) -> Row:
    """The same on every rank."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, tokens + 1)
    return Row(ids[:-1], ids[1:], np.ones(tokens, dtype=np.float32), documents(tokens, document_tokens))


def step(cp: int, tokens: int, document_tokens: int) -> dict[str, Any]:
    """On one rank: a training step; MiB beyond what was resident before, seconds and loss."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_m1.model.config import ModelConfig
    from megatron_m1.model.hybrid import build_model
    from megatron_m1.training.batch import make_microbatch
    from megatron_m1.training.config import OptimizerConfig
    from megatron_m1.training.optimizer import build_optimizer
    from megatron_m1.training.step import run_microbatches, wrap_for_gradients
    from parallel.groups import create_groups
    from parallel.layout import Layout

    model = ModelConfig(
        num_layers=4, softmax_every=4, hidden_size=32, num_heads=1, num_kv_heads=1, head_dim=16, rotary_dim=8,
        num_experts=4, ffn_size=32, vocab_size=VOCABULARY,
    )  # fmt: skip
    groups = create_groups(Layout(cp=cp), torch.device("cpu"))
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    chunks = build_model(model, groups, recompute="full", logits_mib=16)
    wrapped = wrap_for_gradients(chunks, groups)
    optimizer = build_optimizer(wrapped, OptimizerConfig(), groups)

    def train(tokens: int) -> float:
        row = make_row(tokens, document_tokens)
        microbatch = make_microbatch([row], global_rows=1, device=groups.device, piece=groups.piece)
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        loss = run_microbatches(wrapped, [microbatch], groups).loss_nats
        optimizer.step(1e-3)
        return loss

    train(512 * cp)
    before_mib = resident_mib("VmRSS")
    # from here the kernel counts the peak anew
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    loss = train(tokens)
    seconds = time.perf_counter() - started
    return {"mib": resident_mib("VmHWM") - before_mib, "seconds": seconds, "loss": loss}


def resident_mib(name: str) -> float:
    """A field of this process's status: resident now (VmRSS) or at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no {name} in /proc/self/status: this bench needs Linux; run it there")


def main() -> None:
    """Print one row per layout."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--document-tokens", type=int, default=65536)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    options = parser.parse_args()
    # glibc keeps freed blocks below a threshold that it raises: what a step needs would be hidden behind them
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    print(f"{date.today()}, commit {commit}, {torch.get_num_threads()} CPU threads for all ranks\n")
    print(
        "| cp | tokens | longest document | tokens per rank | peak MiB per rank | bytes per token of the rank | s |"
    )
    print("|---|---|---|---|---|---|---|")
    for layout in options.layouts:
        cp, tokens = map(int, layout.split("x"))
        ranks = run_ranks(cp, step, cp, tokens, options.document_tokens, timeout_s=3600.0)
        peak, held = max(rank["mib"] for rank in ranks), tokens // cp
        longest = max(documents(tokens, options.document_tokens))
        assert all(np.isfinite(rank["loss"]) for rank in ranks)
        print(
            f"| {cp} | {tokens:,} | {longest:,} | {held:,} | {peak:,.0f} | {peak * 2**20 / held:,.0f} "
            f"| {max(rank['seconds'] for rank in ranks):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
