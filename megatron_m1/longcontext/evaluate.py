"""How well a model uses its context: loss by position, and needles by length and depth. On the training layout.

Everything is read off the losses of single tokens, so no generation is needed: an answer counts as found when each of
its tokens has a probability above 1/2, for then greedy decoding gives exactly that answer. It is a lower bound of
what greedy decoding finds. Legend: T tokens of a microbatch, L lengths, D depths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_m1.longcontext.config import LongContextConfig
from megatron_m1.training.batch import Microbatch, Row, make_microbatch
from parallel.groups import Groups

FOUND_BELOW_NATS = math.log(2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleGrid:
    """Share of needles found."""

    lengths_L: tuple[int, ...]
    depths_D: tuple[float, ...]
    found_LD: np.ndarray
    """fp64 [L, D], 0 to 1."""
    trials: int


MakeRow = Callable[[int, float, int], Row]
"""(tokens, depth, trial) -> one row of that many tokens whose loss mask is on the needle's answer."""


def find_needles(
    chunks: Sequence[Any], groups: Groups, config: LongContextConfig, make_row: MakeRow
) -> NeedleGrid:
    """Look for needles at every length and depth; collective, the same result on every rank.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        groups: process groups; data-parallel ranks share the texts.
        config: which texts.
        make_row: makes them; called with multiples of what the layout splits a row into.
    """
    found = []
    for length in config.needle_lengths:
        tokens = length - length % groups.layout.token_shares
        cells = [(depth, trial) for depth in config.depths for trial in range(config.needle_trials)]

        def answer_is_found(cell: tuple[float, int], tokens: int = tokens) -> float:
            row = make_row(tokens, *cell)
            losses_T = token_losses(chunks, groups, _alone(row, groups))
            asked_T = torch.as_tensor(row.loss_mask_S) > 0
            return float((losses_T[asked_T] < FOUND_BELOW_NATS).all())

        values = _shared(cells, answer_is_found, groups)
        found.append(np.array(values).reshape(len(config.depths), config.needle_trials).mean(1))
    return NeedleGrid(
        lengths_L=tuple(config.needle_lengths),
        depths_D=tuple(config.depths),
        found_LD=np.array(found).reshape(len(found), len(config.depths)),
        trials=config.needle_trials,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossByPosition:
    """Mean loss over the tokens of documents by place in their document."""

    borders: tuple[int, ...]
    """Ascending; part i holds positions from border i up to border i + 1."""
    loss_nats: np.ndarray
    """fp64 [parts]; NaN where no document is that long."""
    tokens: np.ndarray
    """int64 [parts]."""


def loss_by_position(chunks: Sequence[Any], groups: Groups, rows: Sequence[Row]) -> LossByPosition:
    """Loss of held-out rows by position in the document, in parts that double; collective."""
    longest = max(int(max(row.document_lengths)) for row in rows)
    borders = [0, *(2**k for k in range(6, max(7, math.ceil(math.log2(longest + 1)) + 1)))]

    def sums(row: Row) -> tuple[np.ndarray, np.ndarray]:
        losses_T = token_losses(chunks, groups, _alone(row, groups)).numpy()
        starts = np.concatenate([[0], np.cumsum(row.document_lengths)[:-1]])
        positions_T = np.arange(len(losses_T)) - np.repeat(starts, row.document_lengths)
        mask_T = np.asarray(row.loss_mask_S) > 0
        return (
            np.histogram(positions_T[mask_T], borders, weights=losses_T[mask_T].astype(np.float64))[0],
            np.histogram(positions_T[mask_T], borders)[0],
        )

    by_row = _shared(list(rows), sums, groups)
    losses, tokens = (np.sum([pair[i] for pair in by_row], axis=0) for i in (0, 1))
    with np.errstate(invalid="ignore"):
        return LossByPosition(borders=tuple(borders), loss_nats=losses / tokens, tokens=tokens)


def _shared(items: Sequence[Any], measure: Callable[[Any], Any], groups: Groups) -> list[Any]:
    """`measure` of every item, the items dealt over data-parallel ranks, which all measure equally often."""
    dp = groups.collection.dp
    rounds = -(-len(items) // dp.size())
    # experts may be spread over dp: a rank without an item left repeats one, so that all stay in step
    own = [measure(items[min(i * dp.size() + dp.rank(), len(items) - 1)]) for i in range(rounds)]
    if dp.size() == 1:
        return own
    by_rank: list[Any] = [None] * dp.size()
    dist.all_gather_object(by_rank, own, group=dp)
    return [by_rank[i % dp.size()][i // dp.size()] for i in range(len(items))]


def _alone(row: Row, groups: Groups) -> Microbatch:
    return make_microbatch([row], global_rows=1, device=groups.device, piece=groups.piece)


@torch.no_grad()
def token_losses(chunks: Sequence[Any], groups: Groups, microbatch: Microbatch) -> torch.Tensor:
    """Loss of every token of a microbatch in nats, fp32 [T] in the order of the whole microbatch, on the host of
    every rank; collective over tp, cp and pp."""
    for chunk in chunks:
        chunk.eval()
    # interleaving wants as many microbatches as pipeline ranks: the copies are not used
    copies = groups.layout.pp if groups.layout.vpp > 1 else 1
    waiting = [iter([microbatch] * copies) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=waiting if len(waiting) > 1 else waiting[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=copies,
        # megatron-core divides it by cp
        seq_length=microbatch.packed.split.num_tokens,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    split, cp, pp = microbatch.packed.split, groups.collection.cp, groups.collection.pp
    parts = [torch.empty(split.tokens_of(rank), device=groups.device) for rank in range(cp.size())]
    if groups.is_last_stage:
        own = outputs[0].contiguous()
        if cp.size() > 1:
            dist.all_gather(parts, own, group=cp)
        else:
            parts = [own]
    losses_T = split.join(parts).contiguous()
    if pp.size() > 1:
        dist.broadcast(losses_T, dist.get_global_rank(pp, pp.size() - 1), group=pp)
    return losses_T.cpu()


def _forward(microbatches: Iterable[Microbatch], chunk: Any) -> tuple[torch.Tensor, Any]:
    microbatch = next(iter(microbatches))

    def keep(losses_T: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
        return losses_T.float()

    return chunk(microbatch.tokens_T, microbatch.packed, microbatch.labels_T), keep
