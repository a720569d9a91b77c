"""Ring attention equals dense masked attention in fp64: outputs and gradients, for drawn packs, splits and ranks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from parallel import ring
from parallel.ring import ring_attention
from parallel.ring_plan import plan_ring
from parallel.split import Split, cut_over_ranks
from tests import tolerances
from tests.parallel.packs import splits
from tests.spawn import run_ranks

WORLD = 8
TOLERANCES = {
    torch.float64: tolerances.RING_FP64_RMS,
    torch.float32: tolerances.RING_FP32_RMS,
    torch.bfloat16: tolerances.BF16_RING_RMS,
}


@dataclass(frozen=True)
class Case:
    """One attention of a drawn microbatch."""

    split: Split
    heads: int
    groups: int
    channels: int
    dtype: torch.dtype
    exchange: str
    seed: int
    fault: str = ""


def inputs(case: Case) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output for the whole microbatch, drawn in fp64, rounded to the case's dtype."""
    random = torch.Generator().manual_seed(case.seed)
    tokens, channels = case.split.num_tokens, case.channels
    heads = (case.heads, case.groups, case.groups, case.heads)
    return [
        torch.randn(tokens, n, channels, generator=random, dtype=torch.float64).to(case.dtype) for n in heads
    ]


def dense(case: Case) -> list[np.ndarray]:
    """o, dq, dk, dv by a T x T matrix with the mask written out, in fp64."""
    q, k, v, do = (x.double() for x in inputs(case))
    for x in (q, k, v):
        x.requires_grad_()
    document = torch.tensor(np.repeat(np.arange(len(case.split.borders) - 1), np.diff(case.split.borders)))
    allowed = (document[:, None] == document) & torch.ones(len(q), len(q), dtype=torch.bool).tril()
    per_group = case.heads // case.groups
    keys, values = (x.repeat_interleave(per_group, dim=1) for x in (k, v))
    scores = torch.einsum("thc,shc->hts", q, keys) / case.channels**0.5
    o = torch.einsum("hts,shc->thc", scores.masked_fill(~allowed, -torch.inf).softmax(-1), values)
    o.backward(do)
    return [x.detach().numpy() for x in (o, q.grad, k.grad, v.grad)]


def on_ranks(cases: list[Case]) -> list[tuple[int, int, list[np.ndarray]]]:
    """Every rank: join the groups of 1, 2, 4 and 8 ranks, run its groups' cases; (case, cp rank, o dq dk dv)."""
    groups = {
        size: [
            dist.new_group(list(range(first, first + size)))
            for first in range(0, dist.get_world_size(), size)
        ]
        for size in (1, 2, 4, 8)
    }
    found = []
    for index, case in enumerate(cases):
        size = case.split.num_ranks
        place, rank = divmod(dist.get_rank(), size)
        if index % len(groups[size]) == place:
            with planted(case.fault):
                found.append((index, rank, attend_on(rank, case, groups[size][place])))
    return found


def attend_on(rank: int, case: Case, group: dist.ProcessGroup | None) -> list[np.ndarray]:
    """One rank's o, dq, dk, dv."""
    q, k, v, do = (case.split.cut(x, rank) for x in inputs(case))
    for x in (q, k, v):
        x.requires_grad_()
    split = case.split
    if case.fault == "leak":
        split = Split.of([0, split.borders[-1]], split.segments)
    o = ring_attention(q, k, v, plan_ring(split, rank), group=group, exchange=case.exchange)  # type: ignore[arg-type]
    o.backward(do)
    return [x.detach().double().numpy() for x in (o, q.grad, k.grad, v.grad)]


def planted(fault: str) -> Any:
    """A deliberate mistake in the code under test."""

    def merge_without_rescale(o, lse, o_part, lse_part):  # type: ignore[no-untyped-def]
        total = torch.logaddexp(lse, lse_part)
        o += o_part * (lse_part - total).exp()[..., None]
        lse.copy_(total)

    if fault == "no rescale":
        return mock.patch.object(ring, "merge_keys", merge_without_rescale)
    if fault == "gradients stay abroad":
        return mock.patch.object(ring, "_add_home")
    return nullcontext()


def drawn(count: int) -> list[Case]:
    """Cases as hypothesis draws them, the same in every run."""
    cases: list[Case] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def collect(data: st.DataObject) -> None:
        groups = data.draw(st.sampled_from([1, 2, 3]))
        cases.append(
            Case(
                split=data.draw(splits(data.draw(st.sampled_from([1, 2, 4, 8])))),
                heads=groups * data.draw(st.sampled_from([1, 2, 3])),
                groups=groups,
                channels=data.draw(st.sampled_from([4, 8, 20])),
                dtype=data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
                exchange=data.draw(st.sampled_from(["ring", "all_gather"])),
                seed=len(cases),
            )
        )

    collect()
    return cases


def errors(case: Case, ranks: dict[int, list[np.ndarray]]) -> dict[str, float]:
    """RMS errors of o, dq, dk, dv, put together from the ranks, relative to what was expected.

    One-token documents have dq = dk = 0: an RMS below 0.1 (inputs have 1) counts as that.
    """
    parts = [[torch.from_numpy(x) for x in ranks[rank]] for rank in range(case.split.num_ranks)]
    found = [case.split.join(list(pieces)).numpy() for pieces in zip(*parts, strict=True)]
    return {
        name: float(np.sqrt(np.mean((x - y) ** 2) / max(np.mean(y**2), 1e-2)))
        for name, x, y in zip(("o", "dq", "dk", "dv"), found, dense(case), strict=True)
    }


@pytest.mark.multiprocess
def test_ring_equals_dense_attention_and_planted_faults_do_not() -> None:
    cases = drawn(96)
    split = cut_over_ranks([0, 23, 64, 65, 130], 4, "zigzag")
    faults = ["no rescale", "gradients stay abroad", "leak"]
    planted_cases = [
        Case(split, 4, 2, 8, torch.float64, exchange, 1, fault)
        for exchange in ("ring", "all_gather")
        for fault in faults
    ]
    by_case: dict[int, dict[int, list[np.ndarray]]] = {}
    for rank in run_ranks(WORLD, on_ranks, [*cases, *planted_cases]):
        for index, cp_rank, values in rank:
            by_case.setdefault(index, {})[cp_rank] = values
    assert {case.split.num_ranks for case in cases} == {1, 2, 4, 8}
    wrong = {}
    for index, case in enumerate(cases):
        found = errors(case, by_case[index])
        if max(found.values()) > TOLERANCES[case.dtype]:
            wrong[case] = found
    assert not wrong, wrong
    for index, case in enumerate(planted_cases, len(cases)):
        assert max(errors(case, by_case[index]).values()) > 1e-3, case.fault


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_process_equals_dense_attention(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2]))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    case = Case(data.draw(splits(1)), 2 * groups, groups, 8, dtype, "ring", data.draw(st.integers(0, 9)))
    found = errors(case, {0: attend_on(0, case, None)})
    assert max(found.values()) <= TOLERANCES[dtype], found


def test_wrong_token_counts_and_heads_are_refused() -> None:
    plan = plan_ring(cut_over_ranks([0, 8], 1, "zigzag"), 0)
    q, k = torch.zeros(8, 6, 4), torch.zeros(8, 4, 4)
    with pytest.raises(
        ValueError, match=r"must have the 8 tokens that the split gives this rank; cut the micro"
    ):
        ring_attention(q[:7], k[:7], k[:7], plan)
    with pytest.raises(
        ValueError, match="6 query heads over 4 key/value heads: .* divisor of model.num_heads"
    ):
        ring_attention(q, k, k, plan)
