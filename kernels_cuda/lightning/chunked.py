"""Lightning attention in blocks of time, on any device: the CPU path and the mirror of the CUDA kernel.

For a block of L tokens with the state S that enters it (i, j local, exponents never negative):
    O = scale * (((Q K^T) * M) V + diag(lambda^(i+1)) Q S),   M_ij = lambda^(i-j) for i >= j
    S <- lambda^L S + K^T diag(lambda^(L-1-j)) V
Reversed time mirrors M and both weights. Rounding points are the kernel's: operands in the dtype of q,
states and their sums in fp32 (fp64 for fp64 inputs).
Legend: T packed tokens, N documents, H heads, K key dim, V value dim, C tokens of a tile.
Source: Lightning Attention-2 (arXiv 2401.04658), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """Tokens [start, stop) that share one set of matmuls: a part of one document, or several whole ones."""

    start: int
    stop: int
    first_document: int
    documents: tuple[tuple[int, int, int], ...]
    opens: bool
    closes: bool


@lru_cache(maxsize=256)
def plan_tiles(borders: tuple[int, ...], chunk_tokens: int) -> tuple[Tile, ...]:
    """Cut the documents into tiles of at most chunk_tokens, in the order of time.

    Long documents are cut from their own start. Neighbouring documents that fit into one tile together
    share it, so that a pack of short documents costs as many matmuls as one long one.
    """
    tiles: list[Tile] = []
    shared: list[tuple[int, int, int]] = []

    def flush() -> None:
        if shared:
            tiles.append(Tile(shared[0][1], shared[-1][2], shared[0][0], tuple(shared), True, True))
            shared.clear()

    for document, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        if shared and stop - shared[0][1] > chunk_tokens:
            flush()
        if stop - start <= chunk_tokens:
            shared.append((document, start, stop))
            continue
        for cut in range(start, stop, chunk_tokens):
            end = min(cut + chunk_tokens, stop)
            piece = ((document, cut, end),)
            tiles.append(Tile(cut, end, document, piece, cut == start, end == stop))
    flush()
    return tuple(tiles)


def chunk_tokens_for(dtype: torch.dtype) -> int:
    """Tokens per tile: measured best on one core, 64 in fp32 and fp64, 128 in bf16 and fp16."""
    return 64 if dtype in (torch.float32, torch.float64) else 128


def state_dtype_for(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states and of their sums: fp64 for fp64 operands, fp32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class DecayTables:
    """Powers of lambda = exp(-slope) that every tile of one call shares; no exp inside the loop.

    mask_HCC: scale * lambda^|i-j| on the seen side of the diagonal. enter(L) and leave(L), [H, L, 1]: weight of
    the entering state on each token (scale included), and of each token in the leaving state.
    """

    def __init__(
        self, slopes_H: torch.Tensor, chunk_tokens: int, reverse: bool, scale: float, dtype: torch.dtype
    ):
        steps = torch.arange(chunk_tokens + 1, device=slopes_H.device)
        exponents_HC = -slopes_H.double()[:, None] * steps
        self.powers_HC1 = exponents_HC.exp().to(dtype)[:, :, None]
        self.falling_HC1 = self.powers_HC1.flip(1)
        distance_CC = (steps[:-1, None] - steps[None, :-1]) * (-1 if reverse else 1)
        decayed_HCC = (-slopes_H.double()[:, None, None] * distance_CC.clamp(min=0)).exp()
        self.mask_HCC = (scale * decayed_HCC * (distance_CC >= 0)).to(dtype)
        self.chunk_tokens, self.reverse, self.scale = chunk_tokens, reverse, scale
        rising_HC1, falling_HC1 = self.powers_HC1[:, 1:], self.falling_HC1
        self.enter_HC1 = scale * (falling_HC1[:, :-1] if reverse else rising_HC1)
        self.leave_HC1 = self.powers_HC1[:, :-1] if reverse else falling_HC1[:, 1:]

    def enter(self, tokens: int) -> torch.Tensor:
        return self.enter_HC1[:, self.chunk_tokens - tokens :] if self.reverse else self.enter_HC1[:, :tokens]

    def leave(self, tokens: int) -> torch.Tensor:
        return self.leave_HC1[:, :tokens] if self.reverse else self.leave_HC1[:, self.chunk_tokens - tokens :]

    def total(self, tokens: int) -> torch.Tensor:
        """Decay of a state over a whole tile, [H, 1, 1]."""
        return self.powers_HC1[:, tokens : tokens + 1]


def own_document_mask(tile: Tile, device: torch.device) -> torch.Tensor:
    """True where two tokens of a shared tile belong to one document, [L, L]."""
    lengths = torch.tensor([stop - start for _, start, stop in tile.documents])
    owner_L = torch.repeat_interleave(lengths).to(device)
    return owner_L[:, None] == owner_L[None, :]


def intra_tile(
    q_HLK: torch.Tensor, k_HLK: torch.Tensor, v_HLV: torch.Tensor, mask_HLL: torch.Tensor
) -> torch.Tensor:
    """((Q K^T) * M) V in the operands' dtype, the decayed scores rounded to it as the kernel does."""
    scores_HLL = torch.bmm(q_HLK, k_HLK.transpose(1, 2))
    if scores_HLL.dtype == mask_HLL.dtype:
        return torch.bmm(scores_HLL.mul_(mask_HLL), v_HLV)
    return torch.bmm((scores_HLL * mask_HLL).to(v_HLV.dtype), v_HLV)


def leave_state(
    state_HKV: torch.Tensor | None, k_HLK: torch.Tensor, v_HLV: torch.Tensor, tables: DecayTables
) -> torch.Tensor:
    """lambda^L S + K^T diag(w) V; a fresh tensor, in the dtype of the states."""
    tokens = k_HLK.shape[1]
    weighted_HLV = (v_HLV * tables.leave(tokens)).to(v_HLV.dtype)
    update_HKV = torch.bmm(k_HLK.transpose(1, 2), weighted_HLV).to(tables.mask_HCC.dtype)
    return update_HKV if state_HKV is None else update_HKV.addcmul_(state_HKV, tables.total(tokens))


def lightning_scan(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    v_THV: torch.Tensor,
    slopes_H: torch.Tensor,
    state_in_NHKV: torch.Tensor | None,
    borders: tuple[int, ...],
    reverse: bool = False,
    scale: float = 1.0,
    output_state: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lightning attention over packed documents; arguments already checked.

    q, k [T, H, K], v [T, H, V] with any strides; slopes [H]; state_in [N, H, K, V] in the state dtype; borders:
    N + 1 ascending token positions from 0 to T. Returns o [T, H, V] in the dtype of q and the states
    [N, H, K, V] after the last token (first, if reversed) of each document; [0, H, K, V] without output_state.
    """
    num_tokens, num_heads, key_dim = q_THK.shape
    value_dim, num_documents = v_THV.shape[-1], len(borders) - 1
    state_dtype = state_dtype_for(q_THK.dtype)
    chunk_tokens = chunk_tokens_for(q_THK.dtype)
    tables = DecayTables(slopes_H, chunk_tokens, reverse, scale, state_dtype)
    o_THV = q_THK.new_empty(num_tokens, num_heads, value_dim)
    state_out = q_THK.new_empty(
        num_documents if output_state else 0, num_heads, key_dim, value_dim, dtype=state_dtype
    )
    operands = tuple(x.transpose(0, 1) for x in (q_THK, k_THK, v_THV, o_THV))
    tiles = plan_tiles(borders, chunk_tokens)
    carried: torch.Tensor | None = None
    for tile in reversed(tiles) if reverse else tiles:
        enters, leaves = (tile.closes, tile.opens) if reverse else (tile.opens, tile.closes)
        states: list[torch.Tensor | None] = [carried]
        if enters:
            states = [None if state_in_NHKV is None else state_in_NHKV[i] for i, _, _ in tile.documents]
        keep = output_state or not leaves
        states = run_tile(operands, tile, states, tables, keep)
        carried = states[-1]
        if leaves and output_state:
            for (document, _, _), state in zip(tile.documents, states, strict=True):
                state_out[document] = state
    return o_THV, state_out


def run_tile(
    operands: tuple[torch.Tensor, ...],
    tile: Tile,
    states: list[torch.Tensor | None],
    tables: DecayTables,
    keep_states: bool,
) -> list[torch.Tensor | None]:
    """Write one tile of o; take and return the state of each of its documents."""
    tokens = tile.stop - tile.start
    q_HLK, k_HLK, v_HLV, o_HLV = (x[:, tile.start : tile.stop] for x in operands)
    mask_HLL = tables.mask_HCC[:, :tokens, :tokens]
    if len(tile.documents) > 1:
        mask_HLL = mask_HLL * own_document_mask(tile, mask_HLL.device)
    sum_HLV = intra_tile(q_HLK, k_HLK, v_HLV, mask_HLL)
    if states[0] is not None:
        sum_HLV = sum_HLV.to(mask_HLL.dtype)
    left: list[torch.Tensor | None] = [None]
    for (_, start, stop), state_HKV in zip(tile.documents, states, strict=True):
        own = slice(start - tile.start, stop - tile.start)
        if state_HKV is not None:
            inter_HLV = torch.bmm(q_HLK[:, own], state_HKV.to(q_HLK.dtype))
            sum_HLV[:, own].addcmul_(inter_HLV, tables.enter(stop - start))
        if keep_states:
            left.append(leave_state(state_HKV, k_HLK[:, own], v_HLV[:, own], tables))
    o_HLV.copy_(sum_HLV)
    return left[1:] if keep_states else left
