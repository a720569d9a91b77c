"""Softmax attention inside the documents of a pack, with the log-sum-exp of every query: the inner step of a ring.

    o_t = sum_j exp(s_tj - lse_t) v_j,   lse_t = log sum_j exp(s_tj),   s_tj = q_t . k_j / sqrt(K)
Backward takes o and lse of the WHOLE attention, of which these keys may be a part: with them the gradients of the
parts add up (FlashAttention, arXiv 2205.14135, section 3.1; Ring Attention, arXiv 2310.01889). Key/value heads are
never expanded in memory. Three ways to the same numbers, by device and dtype:
- bf16 and fp16 on CUDA: torch's flash kernel over all documents at once (FA3 or FA4 once torch.nn.attention activates
  one of them);
- CPU: torch's flash kernel for CPU, short documents of like length padded into one batch;
- the rest, such as fp32 on CUDA: torch operations in blocks, on the same batches.
Memory is linear in tokens in all three.
Legend: T query tokens, S key tokens, h query heads, g key/value heads, m = h / g, K channels, B documents of a batch,
L tokens of each, N = B g.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

Borders = tuple[int, ...]
"""Cumulative lengths of documents, from 0."""

_BATCHED_BELOW_TOKENS = 128
"""Longer documents are worth a call each, without a copy; shorter ones share one."""
_SHORTEST_IN_BATCH = 0.5
"""A batch holds documents of at least this share of its longest: the rest of a row is padding."""
_BLOCK_QUERIES, _BLOCK_KEYS = 512, 2048


def attend(
    q_ThK: torch.Tensor, k_SgK: torch.Tensor, v_SgK: torch.Tensor, borders: Borders | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of packed documents, causal in each, or of every query to every key.

    Args:
        q_ThK: queries [T, h, K], fp64, fp32, bf16 or fp16, the last dim dense.
        k_SgK: keys [S, g, K] of the same dtype; h is a multiple of g, and consecutive query heads share a key head.
        v_SgK: values, like the keys.
        borders: where documents begin and end, for both queries and keys (S = T); None: no mask at all.

    Returns:
        o [T, h, K] in q's dtype, and lse [T, h] in fp32 (fp64 for fp64). No tensor has T x S elements.
    """
    if not q_ThK.shape[0]:
        return torch.empty_like(q_ThK), q_ThK.new_empty(q_ThK.shape[:2], dtype=_sum_dtype(q_ThK))
    if _has_varlen_kernel(q_ThK):
        o_ThK, lse_hT = torch.ops.aten._flash_attention_forward(
            q_ThK, k_SgK, v_SgK, *_varlen(q_ThK, k_SgK, borders), 0.0, borders is not None, False
        )[:2]
        return o_ThK, lse_hT.t()
    o_ThK = q_ThK.new_empty(q_ThK.shape)
    lse_Th1 = q_ThK.new_empty(*q_ThK.shape[:2], 1, dtype=_sum_dtype(q_ThK))
    for queries, keys in _calls(q_ThK, k_SgK, borders):
        o, lse = _dense(queries.take(q_ThK), keys.take(k_SgK), keys.take(v_SgK), causal=borders is not None)
        queries.put(o, o_ThK)
        queries.put(lse[..., None], lse_Th1)
    return o_ThK, lse_Th1[..., 0]


def attend_backward(
    do_ThK: torch.Tensor,
    q_ThK: torch.Tensor,
    k_SgK: torch.Tensor,
    v_SgK: torch.Tensor,
    o_ThK: torch.Tensor,
    lse_Th: torch.Tensor,
    borders: Borders | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What these keys and values contribute to dq, dk and dv: `attend`'s transpose.

    Args:
        do_ThK: gradient of the whole attention's output.
        q_ThK, k_SgK, v_SgK, borders: as given to `attend`.
        o_ThK: output of the whole attention, in q's dtype.
        lse_Th: log-sum-exp of the whole attention, over the keys of every part.
    """
    if not q_ThK.shape[0]:
        return torch.empty_like(q_ThK), torch.zeros_like(k_SgK), torch.zeros_like(v_SgK)
    if _has_varlen_kernel(q_ThK):
        # the random state is dropout's, of which there is none
        random_state = torch.zeros(2, dtype=torch.uint64, device=q_ThK.device)
        return torch.ops.aten._flash_attention_backward(
            do_ThK.contiguous(),
            q_ThK,
            k_SgK,
            v_SgK,
            o_ThK,
            lse_Th.t().contiguous(),
            *_varlen(q_ThK, k_SgK, borders),
            0.0,
            borders is not None,
            random_state,
            random_state.new_empty(0),
        )
    dq_ThK, dk_SgK, dv_SgK = (x.new_empty(x.shape) for x in (q_ThK, k_SgK, v_SgK))
    for queries, keys in _calls(q_ThK, k_SgK, borders):
        dq, dk, dv = _dense_backward(
            # padding repeats a real token: without an output gradient it contributes nothing
            queries.take(do_ThK, zero_padding=True),
            queries.take(q_ThK),
            keys.take(k_SgK),
            keys.take(v_SgK),
            queries.take(o_ThK),
            queries.take(lse_Th[..., None]),
            causal=borders is not None,
        )
        queries.put(dq, dq_ThK)
        keys.put(dk, dk_SgK)
        keys.put(dv, dv_SgK)
    return dq_ThK, dk_SgK, dv_SgK


def merge_keys(
    o_ThK: torch.Tensor, lse_Th: torch.Tensor, o_part: torch.Tensor, lse_part: torch.Tensor
) -> None:
    """Make the attention of some queries that to more keys, in place.

        lse = log(exp(lse_1) + exp(lse_2)),   o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2

    Args:
        o_ThK: output over the keys so far [T, h, K], in lse's dtype; becomes that over both.
        lse_Th: its log-sum-exp [T, h]; likewise.
        o_part: output of the same queries over other keys, in any dtype.
        lse_part: its log-sum-exp.
    """
    total = torch.logaddexp(lse_Th, lse_part)
    o_ThK.mul_((lse_Th - total).exp_()[..., None]).addcmul_(
        o_part.to(o_ThK.dtype), (lse_part - total).exp_()[..., None]
    )
    lse_Th.copy_(total)


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _has_varlen_kernel(q_ThK: torch.Tensor) -> bool:
    channels = q_ThK.shape[-1]
    in_half = q_ThK.dtype in (torch.bfloat16, torch.float16)
    return q_ThK.is_cuda and in_half and channels % 8 == 0 and channels <= 256


def _varlen(
    q_ThK: torch.Tensor, k_SgK: torch.Tensor, borders: Borders | None
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """The kernel's cu_seqlens of queries and keys, and the longest of each; the host waits for nothing."""
    if borders is None:
        lengths = q_ThK.shape[0], k_SgK.shape[0]
        starts_q, starts_k = (
            torch.arange(0, 2 * length, length, dtype=torch.int32, device=q_ThK.device) for length in lengths
        )
        return starts_q, starts_k, *lengths
    starts = _borders_on(borders, q_ThK.device)
    longest = max(b - a for a, b in pairwise(borders))
    return starts, starts, longest, longest


@functools.lru_cache(maxsize=8)
def _borders_on(borders: Borders, device: torch.device) -> torch.Tensor:
    return torch.tensor(borders, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Documents attended to in one call: one alone, or short ones padded to one length."""

    span: tuple[int, int]
    """First and last + 1 token of the only document, where there are no rows."""
    groups: int
    length: int
    """L: tokens of the longest document."""
    rows: torch.Tensor | None = None
    """Of every place [N L], its row among the (token, group) pairs; padding repeats a document's last token."""
    real: torch.Tensor | None = None
    """The places that are not padding."""
    padding: torch.Tensor | None = None
    """The places that are."""

    def take(self, x_TxK: torch.Tensor, *, zero_padding: bool = False) -> torch.Tensor:
        """[T, h or g, K] -> [N, m or 1, L, K]: a view for one document, one gather for several."""
        x_TgmK = x_TxK.unflatten(1, (self.groups, -1))
        if self.rows is None:
            return x_TgmK[slice(*self.span)].permute(1, 2, 0, 3)
        places = x_TgmK.flatten(0, 1).index_select(0, self.rows)
        if zero_padding:
            places.index_fill_(0, self.padding, 0)
        return places.unflatten(0, (-1, self.length)).transpose(1, 2)

    def put(self, x_NmLK: torch.Tensor, out_TxK: torch.Tensor) -> None:
        """[N, m or 1, L, K] -> its places in [T, h or g, K]; padding goes nowhere."""
        out_TgmK = out_TxK.unflatten(1, (self.groups, -1))
        if self.rows is None or self.real is None:
            out_TgmK[slice(*self.span)] = x_NmLK.permute(2, 0, 1, 3)
            return
        places = x_NmLK.transpose(1, 2).flatten(0, 1)
        out_TgmK.flatten(0, 1).index_copy_(0, self.rows[self.real], places.index_select(0, self.real))


def _calls(
    q_ThK: torch.Tensor, k_SgK: torch.Tensor, borders: Borders | None
) -> tuple[tuple[_Batch, _Batch], ...]:
    """Batches of queries, each with the batch of its keys."""
    tokens, keys, groups = q_ThK.shape[0], k_SgK.shape[0], k_SgK.shape[1]
    if borders is None:
        return ((_Batch((0, tokens), groups, tokens), _Batch((0, keys), groups, keys)),)
    assert borders[-1] == tokens == keys, (borders[-1], q_ThK.shape, k_SgK.shape)
    return tuple((batch, batch) for batch in _batches_of_documents(borders, groups, q_ThK.device))


@functools.lru_cache(maxsize=8)
def _batches_of_documents(borders: Borders, groups: int, device: torch.device) -> tuple[_Batch, ...]:
    spans = [(a, b) for a, b in pairwise(borders) if b > a]
    alone = [span for span in spans if len(spans) == 1 or span[1] - span[0] >= _BATCHED_BELOW_TOKENS]
    short = sorted(set(spans) - set(alone), key=lambda span: (span[0] - span[1], span))
    return (
        *(_Batch(span, groups, span[1] - span[0]) for span in alone),
        *(_padded_batch(group, groups, device) for group in _of_like_length(short)),
    )


def _of_like_length(spans: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Split spans, longest first, into groups that waste little padding."""
    group: list[tuple[int, int]] = []
    for span in spans:
        if group and span[1] - span[0] < _SHORTEST_IN_BATCH * (group[0][1] - group[0][0]):
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _padded_batch(spans: list[tuple[int, int]], groups: int, device: torch.device) -> _Batch:
    starts_B, stops_B = torch.tensor(spans, dtype=torch.int64, device=device).unbind(1)
    length = spans[0][1] - spans[0][0]
    tokens_BL = starts_B[:, None] + torch.arange(length, device=device)
    is_real_BL = tokens_BL < stops_B[:, None]
    tokens_BL = torch.minimum(tokens_BL, stops_B[:, None] - 1)
    rows_BgL = tokens_BL[:, None] * groups + torch.arange(groups, device=device)[:, None]
    is_real = is_real_BL[:, None].expand(-1, groups, -1).flatten()
    return _Batch(
        (0, 0), groups, length, rows_BgL.flatten(), is_real.nonzero()[:, 0], (~is_real).nonzero()[:, 0]
    )


def _dense(
    q_NmLK: torch.Tensor, k_N1SK: torch.Tensor, v_N1SK: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [N, m, L, K] and lse [N, m, L]; the m query heads of a group read the same keys in memory."""
    k, v = (x.expand(-1, q_NmLK.shape[1], -1, -1) for x in (k_N1SK, v_N1SK))
    if q_NmLK.is_cpu:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_NmLK, k, v, 0.0, causal)
    return forward_in_blocks(q_NmLK, k, v, causal=causal)


def _dense_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq [N, m, L, K], and dk, dv [N, 1, S, K] summed over the query heads of their group."""
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    inputs = (do, q, k, v, o, lse[..., 0])
    if q.is_cpu:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = kernel(*inputs, 0.0, causal)
    else:
        dq, dk, dv = backward_in_blocks(*inputs, causal=causal)
    return dq, dk.sum(1, keepdim=True), dv.sum(1, keepdim=True)


def forward_in_blocks(
    q_NmLK: torch.Tensor, k_NmSK: torch.Tensor, v_NmSK: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [N, m, L, K] and lse [N, m, L] by online softmax over blocks of keys, on any device and dtype."""
    o = torch.empty_like(q_NmLK)
    lse = q_NmLK.new_empty(q_NmLK.shape[:-1], dtype=_sum_dtype(q_NmLK))
    for rows, q in _query_blocks(q_NmLK):
        total = torch.full_like(lse[..., rows], -math.inf)
        mean = torch.zeros_like(q, dtype=total.dtype)
        for columns in _key_blocks(rows, k_NmSK.shape[2], causal):
            scores = _scores(q, k_NmSK[..., columns, :], rows, columns, causal)
            new_total = torch.logaddexp(total, scores.logsumexp(-1))
            part = (scores - new_total[..., None]).exp_().to(v_NmSK.dtype) @ v_NmSK[..., columns, :]
            mean = mean * (total - new_total).exp()[..., None] + part
            total = new_total
        o[..., rows, :], lse[..., rows] = mean.to(o.dtype), total
    return o, lse


def backward_in_blocks(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq [N, m, L, K], dk and dv [N, m, S, K] of `forward_in_blocks`, summed in fp32 at least.

    ds = p * (do v^T - rowsum(do * o)) / sqrt(K)
    """
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    for rows, q_rows in _query_blocks(q):
        do_rows = do[..., rows, :]
        shared = (do_rows * o[..., rows, :]).sum(-1, dtype=lse.dtype)[..., None]
        for columns in _key_blocks(rows, k.shape[2], causal):
            k_part, v_part = k[..., columns, :], v[..., columns, :]
            p = (_scores(q_rows, k_part, rows, columns, causal) - lse[..., rows, None]).exp_()
            dv[..., columns, :] += p.to(v.dtype).transpose(-1, -2) @ do_rows
            ds = p * ((do_rows @ v_part.transpose(-1, -2)) - shared) / math.sqrt(q.shape[-1])
            ds = ds.to(q.dtype)
            dq[..., rows, :] += ds @ k_part
            dk[..., columns, :] += ds.transpose(-1, -2) @ q_rows
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _query_blocks(q: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    for start in range(0, q.shape[2], _BLOCK_QUERIES):
        rows = slice(start, min(start + _BLOCK_QUERIES, q.shape[2]))
        yield rows, q[..., rows, :]


def _key_blocks(rows: slice, num_keys: int, causal: bool) -> Iterator[slice]:
    seen = rows.stop if causal else num_keys
    for start in range(0, seen, _BLOCK_KEYS):
        yield slice(start, min(start + _BLOCK_KEYS, seen))


def _scores(q: torch.Tensor, k: torch.Tensor, rows: slice, columns: slice, causal: bool) -> torch.Tensor:
    """Scaled scores of a block in fp32 at least, -inf where the key is later than the query."""
    scores = (q @ k.transpose(-1, -2)).to(_sum_dtype(q)) / math.sqrt(q.shape[-1])
    if causal and columns.stop > rows.start:
        queries = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        keys = torch.arange(columns.start, columns.stop, device=q.device)
        scores.masked_fill_(keys > queries, -math.inf)
    return scores
