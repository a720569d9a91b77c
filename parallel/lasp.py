"""LASP+: lightning attention over context-parallel ranks, exact for packed documents on any split.

    S(f) = sum_j lambda^(n-1-j) k_j v_j^T          what a fragment f of n tokens adds to its document's state
    P(f) = sum_g lambda^(tokens between) S(g)       what enters it, from the fragments g before it
    o    = lightning attention of each fragment, with P(f) as the state that enters it
Only states travel (parallel/state_exchange.py), and only those of documents that cross a border of a rank. First one
pass over k and v sums the states that are sent; while they travel, the fragments that nothing enters are computed; then
those that continue a document, at most one per segment, with their state. Thousands of short documents need no states.

Why a state that enters the operator and not a correction of what it gave: per token and head a correction reads q and o
and writes o again, 3 tensors to the 4 of a forward pass and 9 to the 12 of a backward pass, and rounds twice. Its gain,
that all of the output is computed while states travel, is kept where it is large: dq needs no state from later ranks,
so one of the three passes of backward hides the exchange. In forward, one document alone on a rank waits for it.
Source: LASP-2 (arXiv 2502.07563), which has no decay and no documents; MiniMax-01 (arXiv 2501.08313), section 2.2.
Legend: T this rank's tokens, h heads, K and V channels, M states sent, N fragments of one call, R fragments that
continue another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels_cuda.lightning import check
from kernels_cuda.lightning.blocks import Span
from kernels_cuda.lightning.chunked import state_dtype_for
from kernels_cuda.lightning.spans import leaving_states, scan_backward_into, scan_into
from parallel.relay import plan_relay
from parallel.split import Fragment, Split
from parallel.state_exchange import Finish, StateExchange

# below this factor an fp64 number is zero, so leaving it out loses nothing
_SMALLEST_FACTOR = 2.0**-1074


def horizon_of(slopes_h: torch.Tensor, decay_floor: float) -> float:
    """Tokens after which the slowest of these heads has decayed to `decay_floor` (0: to nothing at all)."""
    if slopes_h.is_meta:
        # a model built without memory, to count its parameters
        return math.inf
    slowest = float(slopes_h.min())
    return math.inf if slowest == 0 else -math.log(max(decay_floor, _SMALLEST_FACTOR)) / slowest


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextShare:
    """This rank's place in a microbatch that is split over context-parallel ranks, and how it reaches the others.

    With a finite horizon H, at least ln(1 / floor) / slope for every head, a fragment's state is summed over its last H
    tokens, and what is H or more tokens away is not sent. Every pair (i, j) so dropped weighs at most floor: per head
        |error of o_i| <= floor / (1 - lambda) * max_j |q_i k_j| |v_j|, and the gradients' errors likewise.
    """

    split: Split
    exchange: StateExchange
    horizon_tokens: float = math.inf


def lightning_attention_over_ranks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    share: ContextShare,
) -> torch.Tensor:
    """Lightning attention of whole documents, of which this rank holds its share of the tokens; collective.

    Args:
        q, k: [T, h, K], v: [T, h, V], as `kernels_cuda.lightning.op.lightning_attention` takes them; T may be 0.
        slopes: fp32 [h], no gradient.
        share: the split and the exchange.

    Returns:
        o [T, h, V]; differentiable in q, k and v.

    Raises:
        ValueError: operands or slopes that the operator does not take, before anything is sent.
    """
    return _OverRanks.apply(q, k, v, slopes, share)


@torch.no_grad()
def prefill_over_ranks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, share: ContextShare
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lightning_attention_over_ranks` without gradients, and the states that generation goes on from.

    Returns:
        o [T, h, V], and for each of the N whole documents [N, h, K, V] its state after the last token on the rank that
        holds that token, zeros on all others: the sum over ranks is every document's state everywhere.
    """
    split = share.split
    fragments = split.fragments[share.exchange.rank]
    states_FhKV = _new_states(q, v, len(fragments))
    o, _ = _attend(q, k, v, slopes, share, states_FhKV)
    closed_NhKV = states_FhKV.new_zeros(len(split.chains), *states_FhKV.shape[1:])
    for fragment in fragments:
        if split.after(fragment) is None:
            closed_NhKV[fragment.document] = states_FhKV[fragment.index]
    return o, closed_NhKV


class _OverRanks(torch.autograd.Function):
    """Forward sends states with time; backward, its transpose, sends the gradients of states against time.

    With R(f) = sum_i lambda^i q_i dO_i^T, what f adds to the state of the backward walk, which goes against time, and
    E(f) = sum_g lambda^(tokens between) R(g) over the fragments g after f: dq of f is the operator with P(f) entering,
    dk and dv are the operators of op.py with E(f) entering.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slopes: torch.Tensor,
        share: ContextShare,
    ) -> torch.Tensor:
        o, entered_RhKV = _attend(q, k, v, slopes, share, None)
        ctx.save_for_backward(q, k, v, slopes, entered_RhKV)
        ctx.share = share
        return o

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, slopes, entered_RhKV = ctx.saved_tensors
        share, grad_o = ctx.share, gradients[0].contiguous()
        entering = _begin(q, grad_o, slopes, share, reverse=True)
        grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
        alone, touched = _parted(share, both_ways=True)

        def later_state() -> torch.Tensor:
            return _placed(entering(), _receivers(share, reverse=True), touched)

        if alone:
            scan_backward_into(grads, grad_o, lambda: None, (q, k, v), slopes, None, _spans(alone))
        if touched:
            earlier = _placed(entered_RhKV, _receivers(share, reverse=False), touched)
            scan_backward_into(grads, grad_o, later_state, (q, k, v), slopes, earlier, _spans(touched))
        else:
            entering()
        return *grads, None, None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    share: ContextShare,
    states_FhKV: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and the states [R, h, K, V] that entered; the state after each fragment is written to `states`, if asked."""
    check.check_operands(q, k, v, "[T, H, head_dim]")
    check.check_slopes_shape(slopes, q)
    check.check_slopes_values(slopes)
    entering = _begin(k, v, slopes, share, reverse=False)
    o = v.new_empty(v.shape)
    alone, touched = _parted(share, both_ways=False)
    _attend_to(o, (q, k, v), slopes, None, alone, states_FhKV)
    entered_RhKV = entering()
    _attend_to(o, (q, k, v), slopes, entered_RhKV, touched, states_FhKV)
    return o, entered_RhKV


def _attend_to(
    o: torch.Tensor,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slopes: torch.Tensor,
    entering_NhKV: torch.Tensor | None,
    fragments: Sequence[Fragment],
    states_FhKV: torch.Tensor | None,
) -> None:
    """Write the fragments' rows of o, and their last states to the rows of `states` with their index."""
    if not fragments:
        return
    left_NhKV = None
    if states_FhKV is not None:
        left_NhKV = states_FhKV.new_empty(len(fragments), *states_FhKV.shape[1:])
    scan_into(o, operands, slopes, entering_NhKV, _spans(fragments), state_out=left_NhKV)
    if states_FhKV is not None:
        states_FhKV[[f.index for f in fragments]] = left_NhKV


def _begin(
    a: torch.Tensor, b: torch.Tensor, slopes: torch.Tensor, share: ContextShare, *, reverse: bool
) -> Finish:
    """Sum the states that this rank sends, from operands [T, h, K] and [T, h, V], and start the exchange."""
    relay = plan_relay(share.split, reverse)
    spans = []
    for fragment in relay.sends[share.exchange.rank]:
        start, stop = fragment.local_start, fragment.local_start + fragment.length
        if share.horizon_tokens < fragment.length:
            reach = math.ceil(share.horizon_tokens)
            start, stop = (start, start + reach) if reverse else (stop - reach, stop)
        spans.append((start, stop))
    states_MhKV = leaving_states(a, b, slopes, tuple(spans), reverse) if spans else _new_states(a, b, 0)
    return share.exchange.start(states_MhKV, slopes, relay, share.horizon_tokens)


def _new_states(a: torch.Tensor, b: torch.Tensor, count: int) -> torch.Tensor:
    return a.new_empty(count, *a.shape[1:], b.shape[2], dtype=state_dtype_for(a.dtype))


def _receivers(share: ContextShare, *, reverse: bool) -> Sequence[Fragment]:
    return plan_relay(share.split, reverse).receives[share.exchange.rank]


def _parted(share: ContextShare, *, both_ways: bool) -> tuple[list[Fragment], list[Fragment]]:
    """This rank's fragments: those no state enters, and those that one does (both_ways: also against time)."""
    entered = {
        f.index for reverse in (False, True)[: 1 + both_ways] for f in _receivers(share, reverse=reverse)
    }
    fragments = share.split.fragments[share.exchange.rank]
    return [f for f in fragments if f.index not in entered], [f for f in fragments if f.index in entered]


def _placed(
    states_RhKV: torch.Tensor, receivers: Sequence[Fragment], fragments: Sequence[Fragment]
) -> torch.Tensor:
    """The receivers' states as states of all `fragments`, zeros where none entered, [N, h, K, V]."""
    if len(receivers) == len(fragments):
        return states_RhKV
    placed_NhKV = states_RhKV.new_zeros(len(fragments), *states_RhKV.shape[1:])
    row_of = {f.index: row for row, f in enumerate(fragments)}
    for state_hKV, fragment in zip(states_RhKV, receivers, strict=True):
        placed_NhKV[row_of[fragment.index]] = state_hKV
    return placed_NhKV


def _spans(fragments: Sequence[Fragment]) -> tuple[Span, ...]:
    return tuple((f.local_start, f.local_start + f.length) for f in fragments)
