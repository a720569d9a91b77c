"""Context parallelism on GPUs: LASP+ over NCCL with the kernels, and ring attention, against fp64.

With one GPU the ring's ranks take turns on it and a journey in memory stands for the messages; with two they are real.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kernels_cuda.bench.measure import worst_head_error
from kernels_cuda.lightning.chunked import lightning_scan
from kernels_cuda.lightning.decay import lightning_slopes
from parallel import ring
from parallel.lasp import ContextShare, lightning_attention_over_ranks
from parallel.ring import ring_attention
from parallel.ring_plan import RingPlan, plan_ring
from parallel.split import Split, cut_over_ranks
from parallel.state_exchange import AllGather, Ring
from tests import tolerances
from tests.parallel.test_ring import Case, dense, inputs
from tests.spawn import run_ranks

pytestmark = pytest.mark.gpu
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here")

BORDERS = (0, 200, 1300, 1301, 2000)
HEADS, HEAD_DIM = 4, 64
RING = Case(cut_over_ranks(BORDERS, 4, "zigzag"), 4, 2, 64, torch.bfloat16, "ring", seed=3)


@dataclasses.dataclass
class LocalJourney:
    """The messages of one rank where all ranks are in one process: payloads lie ready, gradients are put down."""

    plan: RingPlan
    payloads: list[torch.Tensor]
    gradients: dict[tuple[int, int], torch.Tensor]
    """By (owner, rank that computed it)."""

    def arrive(self, hop: int) -> torch.Tensor:
        return self.payloads[self.plan.owner(hop)][: self.plan.rows_here(hop)]

    def give_back(self, hop: int, dpayload: torch.Tensor) -> None:
        self.gradients[self.plan.owner(hop), self.plan.rank] = dpayload

    def home(self) -> torch.Tensor:
        payload = self.payloads[self.plan.rank]
        total = torch.zeros_like(payload, dtype=torch.float32)
        for (owner, _), part in self.gradients.items():
            if owner == self.plan.rank:
                total[: len(part)] += part
        return total


def test_ranks_in_turn_on_one_gpu_equal_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    split = RING.split
    plans = [plan_ring(split, rank) for rank in range(split.num_ranks)]
    tensors = [[x.cuda() for x in (split.cut(whole, plan.rank) for whole in inputs(RING))] for plan in plans]
    payloads = [ring._pack(k, v, plan) for (_, k, v, _), plan in zip(tensors, plans, strict=True)]
    gradients: dict[tuple[int, int], torch.Tensor] = {}
    monkeypatch.setattr(ring, "_depart", lambda k, v, plan, *_: LocalJourney(plan, payloads, gradients))
    # the first round puts down what other ranks' keys receive, the second takes it home
    for _ in range(2):
        parts = []
        for (q, k, v, do), plan in zip(tensors, plans, strict=True):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            o = ring_attention(*leaves, plan)
            o.backward(do)
            parts.append([o.detach(), *(x.grad for x in leaves)])
    for number, expected in enumerate(dense(RING)):
        found = split.join([part[number].cpu() for part in parts])
        error = worst_head_error(found, torch.from_numpy(expected))
        assert error < tolerances.BF16_RING_RMS, (number, error)


def ring_on_rank(case: Case) -> list[Any]:
    """One rank's o, dq, dk, dv through NCCL."""
    rank = dist.get_rank()
    q, k, v, do = (case.split.cut(x, rank).cuda() for x in inputs(case))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plan = plan_ring(case.split, rank)
    o = ring_attention(*leaves, plan, group=dist.group.WORLD, exchange=case.exchange)  # type: ignore[arg-type]
    o.backward(do)
    return [x.detach().cpu() for x in (o, q.grad, k.grad, v.grad)]


@needs_two
@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
def test_ring_attention_over_two_gpus_equals_fp64(kind: Any, exchange: str) -> None:
    case = dataclasses.replace(RING, split=cut_over_ranks(BORDERS, 2, kind), exchange=exchange)
    ranks = run_ranks(2, ring_on_rank, case)
    for number, expected in enumerate(dense(case)):
        found = case.split.join([rank[number] for rank in ranks])
        assert worst_head_error(found, torch.from_numpy(expected)) < tolerances.BF16_RING_RMS, number


def lightning_inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(BORDERS[-1], HEADS, HEAD_DIM, generator=generator).bfloat16() for _ in range(4)]


def lasp_on_rank(split: Split, exchange: str) -> list[torch.Tensor]:
    """One rank's o, dq, dk, dv through NCCL, with the kernels where they are built."""
    rank, group = dist.get_rank(), dist.group.WORLD
    q, k, v, grad_o = (split.cut(x, rank).cuda() for x in lightning_inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    share = ContextShare(split=split, exchange=AllGather(group) if exchange == "all_gather" else Ring(group))
    o = lightning_attention_over_ranks(*leaves, lightning_slopes(HEADS, 3, 8).float().cuda(), share)
    o.backward(grad_o)
    return [x.detach().cpu() for x in (o, q.grad, k.grad, v.grad)]


@needs_two
@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
def test_lasp_over_two_gpus_equals_fp64(kind: Any, exchange: str) -> None:
    split = cut_over_ranks(BORDERS, 2, kind)
    ranks = run_ranks(2, lasp_on_rank, split, exchange)
    q, k, v, grad_o = (x.double() for x in lightning_inputs())
    slopes = lightning_slopes(HEADS, 3, 8).double()
    pairs = {
        "o": (q, k, v, False),
        "q": (grad_o, v, k, False),
        "k": (v, grad_o, q, True),
        "v": (k, q, grad_o, True),
    }
    for number, (name, (a, b, c, reverse)) in enumerate(pairs.items()):
        exact, _ = lightning_scan(a, b, c, slopes, None, BORDERS, reverse)
        found = split.join([rank[number] for rank in ranks])
        assert worst_head_error(found, exact) < tolerances.BF16_OUTPUT_RMS, name
