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


def decayed_scores(q_HLK: torch.Tensor, k_HLK: torch.Tensor, mask_HLL: torch.Tensor) -> torch.Tensor:
    """(Q K^T) * M, rounded to the operands' dtype as the kernel does."""
    scores_HLL = torch.bmm(q_HLK, k_HLK.transpose(1, 2))
    if scores_HLL.dtype == mask_HLL.dtype:
        return scores_HLL.mul_(mask_HLL)
    return (scores_HLL * mask_HLL).to(q_HLK.dtype)


def tile_mask(tile: Tile, tables: DecayTables) -> torch.Tensor:
    """M for the tokens of a tile, zero between documents, [H, L, L]."""
    tokens = tile.stop - tile.start
    mask_HLL = tables.mask_HCC[:, :tokens, :tokens]
    return mask_HLL if len(tile.documents) == 1 else mask_HLL * own_document_mask(tile, mask_HLL.device)


def tile_operands(tile: Tile, *operands_THD: torch.Tensor) -> list[torch.Tensor]:
    """The tile's part of each operand as [H, L, D], contiguous: far faster to multiply than rows a token apart."""
    return [x[tile.start : tile.stop].transpose(0, 1).contiguous() for x in operands_THD]


States = list[torch.Tensor | None]


def add_entering(
    sum_HLV: torch.Tensor, q_HLK: torch.Tensor, states: States, tile: Tile, tables: DecayTables
) -> torch.Tensor:
    """sum + decayed Q S for each document of the tile, in the dtype of the states where there is a state."""
    if states[0] is None:
        return sum_HLV
    sum_HLV = sum_HLV.to(tables.mask_HCC.dtype)
    for (_, start, stop), state_HKV in zip(tile.documents, states, strict=True):
        assert state_HKV is not None, tile
        own = slice(start - tile.start, stop - tile.start)
        inter_HLV = torch.bmm(q_HLK[:, own], state_HKV.to(q_HLK.dtype))
        sum_HLV[:, own].addcmul_(inter_HLV, tables.enter(stop - start))
    return sum_HLV


def leave_states(
    k_HLK: torch.Tensor, v_HLV: torch.Tensor, states: States, tile: Tile, tables: DecayTables
) -> States:
    """lambda^L S + K^T diag(w) V for each document of the tile; fresh tensors in the dtype of the states."""
    left: States = []
    for (_, start, stop), state_HKV in zip(tile.documents, states, strict=True):
        own = slice(start - tile.start, stop - tile.start)
        weighted_HLV = (v_HLV[:, own] * tables.leave(stop - start)).to(v_HLV.dtype)
        update_HKV = torch.bmm(k_HLK[:, own].transpose(1, 2), weighted_HLV).to(tables.mask_HCC.dtype)
        left.append(
            update_HKV if state_HKV is None else update_HKV.addcmul_(state_HKV, tables.total(stop - start))
        )
    return left


class StateWalk:
    """Walks the tiles in (reversed) time and hands each tile the states of its documents."""

    def __init__(
        self,
        tiles: tuple[Tile, ...],
        reverse: bool,
        state_in_NHKV: torch.Tensor | None,
        state_out_NHKV: torch.Tensor | None,
    ):
        self.tiles = tiles[::-1] if reverse else tiles
        self.reverse, self.state_in_NHKV, self.state_out_NHKV = reverse, state_in_NHKV, state_out_NHKV
        self.carried: States = [None]

    def entering(self, tile: Tile) -> States:
        if not (tile.closes if self.reverse else tile.opens):
            return self.carried
        if self.state_in_NHKV is None:
            return [None] * len(tile.documents)
        return [self.state_in_NHKV[document] for document, _, _ in tile.documents]

    def leave(
        self, tile: Tile, k_HLK: torch.Tensor, v_HLV: torch.Tensor, states: States, tables: DecayTables
    ) -> None:
        """Carry the states to the next tile, or write them out where the documents end and somebody asked."""
        ends = tile.opens if self.reverse else tile.closes
        if ends and self.state_out_NHKV is None:
            return
        self.carried = leave_states(k_HLK, v_HLV, states, tile, tables)
        if ends and self.state_out_NHKV is not None:
            for (document, _, _), state in zip(tile.documents, self.carried, strict=True):
                self.state_out_NHKV[document] = state


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
    value_dim, num_states = v_THV.shape[-1], len(borders) - 1 if output_state else 0
    state_dtype, chunk_tokens = state_dtype_for(q_THK.dtype), chunk_tokens_for(q_THK.dtype)
    tables = DecayTables(slopes_H, chunk_tokens, reverse, scale, state_dtype)
    o_THV = q_THK.new_empty(num_tokens, num_heads, value_dim)
    state_out = q_THK.new_empty(num_states, num_heads, key_dim, value_dim, dtype=state_dtype)
    walk = StateWalk(
        plan_tiles(borders, chunk_tokens), reverse, state_in_NHKV, state_out if output_state else None
    )
    for tile in walk.tiles:
        q_HLK, k_HLK, v_HLV = tile_operands(tile, q_THK, k_THK, v_THV)
        states = walk.entering(tile)
        sum_HLV = torch.bmm(decayed_scores(q_HLK, k_HLK, tile_mask(tile, tables)), v_HLV)
        o_THV[tile.start : tile.stop] = add_entering(sum_HLV, q_HLK, states, tile, tables).transpose(0, 1)
        walk.leave(tile, k_HLK, v_HLV, states, tables)
    return o_THV, state_out


def lightning_scan_backward(
    grad_o_THV: torch.Tensor,
    later_state_NHKV: torch.Tensor | None,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slopes_H: torch.Tensor,
    state_in_NHKV: torch.Tensor | None,
    borders: tuple[int, ...],
    reverse: bool,
    scale: float,
    output_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three backward scans of op.py in two walks: dq with time, then dk and dv against it.

    The second walk keeps one state R for both (dk reads its transpose) and reuses the decayed dO V^T of the first.
    later_state: what enters the second walk, [N, H, K, V] or None. Returns dq, dk, dv and R at its end.
    """
    q_THK, k_THK, v_THV = operands
    num_states = len(borders) - 1 if output_state else 0
    state_dtype, chunk_tokens = state_dtype_for(q_THK.dtype), chunk_tokens_for(q_THK.dtype)
    grads = [x.new_empty(x.shape) for x in operands]
    tiles = plan_tiles(borders, chunk_tokens)
    tables = DecayTables(slopes_H, chunk_tokens, reverse, scale, state_dtype)
    earlier_NHVK = None if state_in_NHKV is None else state_in_NHKV.transpose(2, 3)
    walk = StateWalk(tiles, reverse, earlier_NHVK, None)
    grad_scores: list[torch.Tensor] = []
    for tile in walk.tiles:
        k_HLK, v_HLV, grad_HLV = tile_operands(tile, k_THK, v_THV, grad_o_THV)
        states = walk.entering(tile)
        grad_scores.append(decayed_scores(grad_HLV, v_HLV, tile_mask(tile, tables)))
        sum_HLK = torch.bmm(grad_scores[-1], k_HLK)
        grads[0][tile.start : tile.stop] = add_entering(sum_HLK, grad_HLV, states, tile, tables).transpose(
            0, 1
        )
        walk.leave(tile, v_HLV, k_HLK, states, tables)
    against = DecayTables(slopes_H, chunk_tokens, not reverse, scale, state_dtype)
    last_state = q_THK.new_empty(num_states, *q_THK.shape[1:], v_THV.shape[2], dtype=state_dtype)
    walk = StateWalk(tiles, not reverse, later_state_NHKV, last_state if output_state else None)
    for tile in walk.tiles:
        q_HLK, k_HLK, v_HLV, grad_HLV = tile_operands(tile, q_THK, k_THK, v_THV, grad_o_THV)
        states = walk.entering(tile)
        transposed: States = [None if state is None else state.transpose(1, 2) for state in states]
        sum_HLK = torch.bmm(grad_scores.pop().transpose(1, 2), q_HLK)
        sum_HLV = torch.bmm(decayed_scores(k_HLK, q_HLK, tile_mask(tile, against)), grad_HLV)
        grads[1][tile.start : tile.stop] = add_entering(sum_HLK, v_HLV, transposed, tile, against).transpose(
            0, 1
        )
        grads[2][tile.start : tile.stop] = add_entering(sum_HLV, k_HLK, states, tile, against).transpose(0, 1)
        walk.leave(tile, q_HLK, grad_HLV, states, against)
    return grads[0], grads[1], grads[2], last_state
