"""What one rank does in the LASP+ tests: run every case of its group, count what it sends, bring back its share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from parallel.lasp import (
    ContextShare,
    horizon_of,
    lightning_attention_over_ranks,
    prefill_over_ranks,
)
from parallel.relay import Relay
from parallel.split import Segment, Split
from parallel.state_exchange import AllGather, Hierarchical, Ring, StateExchange

HEADS, KEY_DIM, VALUE_DIM = 2, 3, 5


@dataclass(frozen=True)
class Case:
    """One call of LASP+ on the first `len(segments)` ranks."""

    borders: tuple[int, ...]
    segments: tuple[tuple[Segment, ...], ...]
    exchange: str = "all_gather"
    inner: int = 1
    slopes: tuple[float, ...] = (0.3, 0.01)
    dtype: str = "float64"
    seed: int = 0
    decay_floor: float = 0.0
    fault: str = ""

    @property
    def split(self) -> Split:
        return Split.of(self.borders, self.segments)


def operands(case: Case) -> list[torch.Tensor]:
    """q, k, v and the gradient of o for all T tokens: a function of the seed alone."""
    generator = torch.Generator().manual_seed(case.seed)
    tokens = case.borders[-1]
    dims = (KEY_DIM, KEY_DIM, VALUE_DIM, VALUE_DIM)
    return [
        torch.randn(tokens, HEADS, dim, generator=generator, dtype=torch.float64).to(
            getattr(torch, case.dtype)
        )
        for dim in dims
    ]


def run_cases(cases: list[Case]) -> list[dict[str, Any] | None]:
    """On one rank: this rank's o, gradients and bytes of every case; None where it takes no part."""
    exchanges = _Exchanges()
    return [
        _run(case, exchanges) if dist.get_rank() < len(case.segments) else exchanges.stand_by(case)
        for case in cases
    ]


class _Exchanges:
    """Groups of the first ranks, made once each; every rank of the world must make them in the same order."""

    def __init__(self) -> None:
        self.made: dict[tuple, dist.ProcessGroup] = {}

    def of(self, case: Case) -> StateExchange:
        ranks = len(case.segments)
        if case.exchange != "hierarchical":
            group = self._group(tuple(range(ranks)))
            return AllGather(group) if case.exchange == "all_gather" else Ring(group)
        own = dist.get_rank()
        found = {}
        for name, groups in _node_groups(ranks, case.inner).items():
            for members in groups:
                group = self._group(members)
                if own in members:
                    found[name] = group
        return Hierarchical(found["inner"], found["outer"]) if found else AllGather(dist.group.WORLD)

    def stand_by(self, case: Case) -> None:
        self.of(case)

    def _group(self, members: tuple[int, ...]) -> dist.ProcessGroup:
        if members not in self.made:
            self.made[members] = dist.new_group(list(members))
        return self.made[members]


def _node_groups(ranks: int, inner: int) -> dict[str, list[tuple[int, ...]]]:
    nodes = [tuple(range(first, first + inner)) for first in range(0, ranks, inner)]
    return {"inner": nodes, "outer": [tuple(node[i] for node in nodes) for i in range(inner)]}


def _run(case: Case, exchanges: _Exchanges) -> dict[str, Any]:
    exchange, rank = exchanges.of(case), dist.get_rank()
    split = case.split
    q, k, v, grad_o = (split.cut(x, rank) for x in operands(case))
    for x in (q, k, v):
        x.requires_grad_()
    slopes = torch.tensor(case.slopes)
    if case.fault == "loses what entered":
        exchange = _GivesNothing(exchange)
    if case.fault == "leaks over a document edge":
        split = Split.of((0, case.borders[-1]), case.segments)
    share = ContextShare(split=split, exchange=exchange, horizon_tokens=horizon_of(slopes, case.decay_floor))
    with counted_bytes() as forward:
        o = lightning_attention_over_ranks(q, k, v, slopes, share)
    with counted_bytes() as backward:
        o.backward(grad_o)
    o_prefilled, states = prefill_over_ranks(q, k, v, slopes, share)
    assert torch.equal(o_prefilled, o), case
    return {
        "o": o.detach(),
        "states": states,
        "q": q.grad,
        "k": k.grad,
        "v": v.grad,
        "bytes": (sum(forward), sum(backward)),
    }


@dataclass(frozen=True)
class _GivesNothing:
    """An exchange that runs and then loses what it received."""

    whole: StateExchange

    @property
    def rank(self) -> int:
        return self.whole.rank

    def start(
        self, states_MhKV: torch.Tensor, slopes_h: torch.Tensor, relay: Relay, horizon_tokens: float
    ) -> Any:
        finish = self.whole.start(states_MhKV, slopes_h, relay, horizon_tokens)
        return lambda: torch.zeros_like(finish())


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Bytes this rank hands to each collective or message while it is open; the real calls run."""
    sent: list[int] = []
    real = {name: getattr(dist, name) for name in ("all_gather_into_tensor", "isend")}

    def gather(output: torch.Tensor, given: torch.Tensor, **options: Any) -> Any:
        sent.append(given.numel() * given.element_size())
        return real["all_gather_into_tensor"](output, given, **options)

    def isend(given: torch.Tensor, *places: Any, **options: Any) -> Any:
        sent.append(given.numel() * given.element_size())
        return real["isend"](given, *places, **options)

    dist.all_gather_into_tensor, dist.isend = gather, isend
    try:
        yield sent
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
