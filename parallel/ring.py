"""Softmax attention over context-parallel ranks: keys and values visit the queries, partial results are merged.

Forward: while a rank computes with the keys it has, the next ones travel; each part gives an output and a
log-sum-exp, and two parts merge exactly:
    lse = log(exp(lse_1) + exp(lse_2)),   o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2
Backward, written beside it: the keys make the same journey, and their gradients travel behind them, each rank adding
its part, and go home from the last rank that needed them. What is computed and sent is decided by `RingPlan`.
`all_gather` hands every payload to everyone at once (Llama 3, arXiv 2407.21783, section 3.3.2): fewer messages, but
all crossing keys in memory; good where key/value heads are few.
Source: Ring Attention (arXiv 2310.01889); MiniMax-01 (arXiv 2501.08313), section 3.2.1.
Legend: T this rank's tokens, h query heads, g key/value heads, K channels, R rows of a payload.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
import torch.distributed as dist

from parallel.attention import attend, attend_backward, merge_keys
from parallel.layout import KeyExchange
from parallel.ring_plan import RingPlan, Span


def ring_attention(
    q_ThK: torch.Tensor,
    k_TgK: torch.Tensor,
    v_TgK: torch.Tensor,
    plan: RingPlan,
    *,
    group: dist.ProcessGroup | None = None,
    exchange: KeyExchange = "ring",
) -> torch.Tensor:
    """Causal attention within documents that may lie on several ranks, scale 1 / sqrt(K); differentiable.

    Args:
        q_ThK: this rank's queries [T, h, K], already rotated by their positions in the whole document.
        k_TgK: this rank's keys [T, g, K], likewise; they are sent as they are, never expanded to h heads.
        v_TgK: this rank's values.
        plan: this rank's work, from `plan_ring`.
        group: the context-parallel ranks; may be None where nothing travels.
        exchange: how keys reach the other ranks.

    Returns:
        [T, h, K] in q's dtype.

    Raises:
        ValueError: not the plan's number of tokens, or query heads that key/value heads do not divide.
    """
    tokens, heads, groups = q_ThK.shape[0], q_ThK.shape[1], k_TgK.shape[1]
    if not tokens == k_TgK.shape[0] == v_TgK.shape[0] == plan.num_tokens:
        raise ValueError(
            f"queries {tuple(q_ThK.shape)}, keys {tuple(k_TgK.shape)} and values {tuple(v_TgK.shape)} on rank "
            f"{plan.rank}: each must have the {plan.num_tokens} tokens that the split gives this rank; cut the "
            "microbatch with the split that the plan was made from"
        )
    if heads % groups:
        raise ValueError(
            f"{heads} query heads over {groups} key/value heads: query heads must be a multiple; "
            "set model.num_kv_heads to a divisor of model.num_heads"
        )
    return _RingAttention.apply(q_ThK, k_TgK, v_TgK, plan, group, exchange)


class _RingAttention(torch.autograd.Function):
    """Attention of one rank's queries; forward and backward make the same journey round the ring."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: RingPlan, *how: Any
    ) -> Any:
        journey = _depart(k, v, plan, *how)
        o, lse = attend(q, k, v, plan.borders)
        if plan.own or any(plan.hops):
            o = o.to(lse.dtype)
        for rectangle in plan.own:
            queries, keys = slice(*rectangle.queries), slice(*rectangle.keys)
            merge_keys(o[queries], lse[queries], *attend(q[queries], k[keys], v[keys], None))
        for hop in range(1, plan.num_ranks):
            payload = journey.arrive(hop)
            for rectangle in plan.hops[hop]:
                queries, keys = slice(*rectangle.queries), slice(*rectangle.keys)
                part = attend(q[queries], payload[keys, 0], payload[keys, 1], None)
                merge_keys(o[queries], lse[queries], *part)
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.plan, ctx.how = plan, how
        return o

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (do,), (q, k, v, o, lse), plan = gradients, ctx.saved_tensors, ctx.plan
        journey = _depart(k, v, plan, *ctx.how)
        dq, dk, dv = attend_backward(do, q, k, v, o, lse, plan.borders)
        if plan.own or plan.travels:
            dq, dk, dv = (x.to(lse.dtype) for x in (dq, dk, dv))

        def add(queries: Span, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            at = slice(*queries)
            dq_part, *dkv_part = attend_backward(do[at], q[at], keys, values, o[at], lse[at], None)
            dq[at] += dq_part
            return dkv_part[0], dkv_part[1]

        for rectangle in plan.own:
            keys = slice(*rectangle.keys)
            for gradient, part in zip((dk, dv), add(rectangle.queries, k[keys], v[keys]), strict=True):
                gradient[keys] += part
        for hop in range(1, plan.num_ranks):
            payload = journey.arrive(hop)
            dpayload = torch.zeros_like(payload, dtype=lse.dtype)
            for rectangle in plan.hops[hop]:
                keys = slice(*rectangle.keys)
                parts = add(rectangle.queries, payload[keys, 0], payload[keys, 1])
                dpayload[keys, 0] += parts[0]
                dpayload[keys, 1] += parts[1]
            journey.give_back(hop, dpayload)
        _add_home(journey.home(), dk, dv, plan)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _pack(k: torch.Tensor, v: torch.Tensor, plan: RingPlan) -> torch.Tensor:
    """The rows of key and value that leave this rank, [R, 2, g, K]."""
    rows = [torch.stack([k[start:stop], v[start:stop]], 1) for start, stop in plan.payload]
    return torch.cat(rows) if rows else k.new_empty(0, 2, *k.shape[1:])


def _add_home(dpayload: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, plan: RingPlan) -> None:
    """Add what other ranks computed to the gradients of the keys and values that left this rank."""
    row = 0
    for start, stop in plan.payload:
        dk[start:stop] += dpayload[row : row + stop - start, 0]
        dv[start:stop] += dpayload[row : row + stop - start, 1]
        row += stop - start


class Journey(Protocol):
    """How payloads reach the ranks that need them, and their gradients come home. Every rank makes every call."""

    def arrive(self, hop: int) -> torch.Tensor:
        """The payload of the rank `hop` places back, [R, 2, g, K]; what comes next starts to travel."""

    def give_back(self, hop: int, dpayload: torch.Tensor) -> None:
        """This rank's part of that payload's gradient, [R, 2, g, K] in fp32 or fp64."""

    def home(self) -> torch.Tensor:
        """The other ranks' gradient of this rank's payload, like it in shape."""


def _depart(
    k: torch.Tensor, v: torch.Tensor, plan: RingPlan, group: dist.ProcessGroup | None, exchange: KeyExchange
) -> Journey:
    payload = _pack(k, v, plan)
    if not plan.travels:
        return _Staying(payload)
    assert group is not None and group.size() == plan.num_ranks, (group, plan.num_ranks)
    _meet(group, k.device)
    return _Ring(payload, plan, group) if exchange == "ring" else _Gathering(payload, plan, group)


@functools.lru_cache(maxsize=8)
def _meet(group: dist.ProcessGroup, device: torch.device) -> None:
    """NCCL wants every rank in a group's first communication; in the ring some have nothing to send."""
    if device.type == "cuda":
        dist.all_reduce(torch.zeros(1, device=device), group=group)


class _Staying:
    """No document lies on two ranks."""

    def __init__(self, payload: torch.Tensor) -> None:
        self._nothing = payload

    def arrive(self, hop: int) -> torch.Tensor:
        return self._nothing

    def give_back(self, hop: int, dpayload: torch.Tensor) -> None: ...

    def home(self) -> torch.Tensor:
        return self._nothing


class _Ring:
    """Point to point, from rank to rank + 1; gradients follow one hop behind the keys."""

    def __init__(self, payload: torch.Tensor, plan: RingPlan, group: dist.ProcessGroup) -> None:
        self._payload, self._plan, self._group = payload, plan, group
        self._home: torch.Tensor | None = None
        self._from_left: torch.Tensor | None = None
        self._keys_travel: list[dist.Work] = []
        self._gradients_travel: list[dist.Work] = []
        # what is being sent must stay alive until it has arrived
        self._sent: torch.Tensor | None = None
        self._start(1)

    def arrive(self, hop: int) -> torch.Tensor:
        _wait(self._keys_travel)
        self._payload = self._next
        self._start(hop + 1)
        return self._payload

    def _start(self, hop: int) -> None:
        """Send on the keys that are here after hop - 1 hops, receive those of the next."""
        plan = self._plan
        if hop == plan.num_ranks:
            return
        self._next = self._payload.new_empty(plan.rows_here(hop), *self._payload.shape[1:])
        onward = self._payload[: plan.rows_onward(hop - 1)]
        self._keys_travel = self._exchange(
            [(onward, plan.rank + 1)], [(self._next, plan.rank - 1)], tag=2 * hop
        )

    def give_back(self, hop: int, dpayload: torch.Tensor) -> None:
        plan = self._plan
        _wait(self._gradients_travel)
        if self._from_left is not None:
            dpayload += self._from_left
        if self._home is None:
            self._home = dpayload.new_empty(plan.reach[plan.rank][0], *dpayload.shape[1:])
        onward, reach = plan.rows_onward(hop), plan.reach[plan.rank]
        self._from_left = dpayload.new_empty(plan.rows_here(hop + 1), *dpayload.shape[1:])
        self._sent = dpayload
        self._gradients_travel = self._exchange(
            [(dpayload[:onward], plan.rank + 1), (dpayload[onward:], plan.owner(hop))],
            [
                (self._from_left, plan.rank - 1),
                (self._home[reach[hop + 1] : reach[hop]], plan.rank + hop),
            ],
            tag=2 * hop + 1,
        )

    def home(self) -> torch.Tensor:
        _wait(self._gradients_travel)
        assert self._home is not None, self._gradients_travel
        return self._home

    def _exchange(
        self, sends: list[tuple[torch.Tensor, int]], receives: list[tuple[torch.Tensor, int]], *, tag: int
    ) -> list[dist.Work]:
        """Start the messages that are not empty; both ends know from the plan which are."""
        kinds = ((dist.isend, sends), (dist.irecv, receives))
        messages = [
            dist.P2POp(kind, x, self._peer(rank), self._group, tag)
            for kind, batch in kinds
            for x, rank in batch
            if len(x)
        ]
        return dist.batch_isend_irecv(messages) if messages else []

    def _peer(self, rank: int) -> int:
        return dist.get_global_rank(self._group, rank % self._plan.num_ranks)


class _Gathering:
    """Every payload, padded to the longest, to everyone; gradients come home by a reduce-scatter."""

    def __init__(self, payload: torch.Tensor, plan: RingPlan, group: dist.ProcessGroup) -> None:
        self._plan, self._group, self._rows = plan, group, len(payload)
        longest = max(rows[0] for rows in plan.reach)
        self._own = payload.new_zeros(longest, *payload.shape[1:])
        self._own[: len(payload)] = payload
        self._all = payload.new_empty(plan.num_ranks, *self._own.shape)
        self._gradients: torch.Tensor | None = None
        everyone = self._all.flatten(0, 1)
        self._travel = [dist.all_gather_into_tensor(everyone, self._own, group=group, async_op=True)]

    def arrive(self, hop: int) -> torch.Tensor:
        _wait(self._travel)
        return self._all[self._plan.owner(hop), : self._plan.rows_here(hop)]

    def give_back(self, hop: int, dpayload: torch.Tensor) -> None:
        if self._gradients is None:
            self._gradients = torch.zeros_like(self._all, dtype=dpayload.dtype)
        self._gradients[self._plan.owner(hop), : len(dpayload)] = dpayload

    def home(self) -> torch.Tensor:
        assert self._gradients is not None, "home before a gradient was given back"
        own = torch.empty_like(self._gradients[0])
        dist.reduce_scatter_tensor(own, self._gradients.flatten(0, 1), group=self._group)
        return own[: self._rows]


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()
    works.clear()
