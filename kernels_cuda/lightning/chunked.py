"""Lightning attention in blocks of time, on any device: the CPU path and the mirror of the CUDA kernel.

For a tile of L tokens with the state S that enters it (i, j local, exponents never negative):
    O = scale * (((Q K^T) * M) V + diag(lambda^(i+1)) Q S),   M_ij = lambda^(i-j) for i >= j
    S <- lambda^L S + K^T diag(lambda^(L-1-j)) V
Reversed time mirrors M and both weights. Tiles and rounding points are the kernel's: operands in the dtype of q, states
in fp32 (fp64 for fp64 inputs). Two more come with 16-bit operands on a CPU: its products return rounded, and M and the
weights of entering states are rounded like the operands. All but the walk of the states is done for a block of tiles
at once.
Legend: T packed tokens, N documents, H heads, K key dim, V value dim, D any of the two, L tokens of a tile, C tokens of
a full one, M tiles of a block, A = M * H the batch of its matmuls.
Source: Lightning Attention-2 (arXiv 2401.04658), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from math import prod
from typing import NamedTuple

import torch

from kernels_cuda.lightning.blocks import CHUNK_TOKENS, Block, Span, blocks_for, spans_of

STATE_TOKENS = {"cpu": 512}
STATE_TOKENS_ELSEWHERE = 16384
"""Tokens of one product where only a state is asked for: a few heads in a core's cache; on a GPU, few launches."""

LaterState = Callable[[], torch.Tensor | None]
"""Gives the states that enter a backward walk, once the walk before it is done: they may still be on their way."""


def state_dtype_for(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states and of their sums: fp64 for fp64 operands, fp32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Workspace:
    """Memory that all blocks of a call use one after the other, so that it stays in the core's cache.

    A tensor lent under a name holds its values until that name is lent again.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._memory: dict[str, torch.Tensor] = {}
        self._lent: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def lend(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of a shape with whatever was in it; a name has one dtype."""
        lent = self._lent.get((name, shape))
        if lent is None:
            count = prod(shape)
            if name not in self._memory or len(self._memory[name]) < count:
                self._memory[name] = torch.empty(count, dtype=dtype, device=self._device)
                # what was lent of the smaller memory would keep it
                self._lent = {key: tensor for key, tensor in self._lent.items() if key[0] != name}
            lent = self._lent[name, shape] = self._memory[name][:count].view(shape)
        return lent


class TileDecays(NamedTuple):
    """Powers of lambda = exp(-slope) for tiles of L tokens: the first two in the dtype of the operands, the others in
    that of the states, whose errors stay."""

    mask_HLL: torch.Tensor
    """scale * lambda^|i-j| on the seen side of the diagonal."""
    enter_HL1: torch.Tensor
    """Weight of the entering state on each token, scale included."""
    leave_HL1: torch.Tensor
    """Weight of each token in the leaving state."""
    total_H11: torch.Tensor
    """Decay of a state over the tile."""


class DecayTables:
    """The decays that all tiles of one call share, whatever their length; no exp inside the loop."""

    def __init__(self, slopes_H: torch.Tensor, reverse: bool, scale: float, dtype: torch.dtype):
        state_dtype = state_dtype_for(dtype)
        steps = torch.arange(CHUNK_TOKENS + 1, device=slopes_H.device)
        powers_HC = (-slopes_H.double()[:, None] * steps).exp()
        # M depends on i - j alone: its rows are windows of one line of powers, zero where j is not seen
        line = torch.nn.functional.pad(scale * powers_HC[:, :-1], (CHUNK_TOKENS - 1, 0)).to(dtype)
        mask_HCC = line.unfold(1, CHUNK_TOKENS, 1).flip(2)
        self.reverse = reverse
        self._mask_HCC = mask_HCC.mT.contiguous() if reverse else mask_HCC
        self._powers_HC1 = powers_HC[:, :, None].to(state_dtype)
        self._scaled_powers_HC1 = (scale * powers_HC[:, :, None]).to(dtype)
        self._tiles: dict[int, TileDecays] = {}

    def tile(self, tokens: int) -> TileDecays:
        """The decays of tiles of so many tokens."""
        if tokens not in self._tiles:
            # both weights rise or fall along the tile: with time the entering state has decayed once on its first token
            enter_HL1 = self._scaled_powers_HC1[:, 1 : tokens + 1]
            leave_HL1 = self._powers_HC1[:, :tokens]
            self._tiles[tokens] = TileDecays(
                mask_HLL=self._mask_HCC[:, :tokens, :tokens],
                enter_HL1=enter_HL1.flip(1) if self.reverse else enter_HL1,
                leave_HL1=leave_HL1 if self.reverse else leave_HL1.flip(1),
                total_H11=self._powers_HC1[:, tokens : tokens + 1],
            )
        return self._tiles[tokens]

    def mask(self, block: Block) -> torch.Tensor:
        """The mask of the block's tiles, in which the documents of a shared tile do not see each other."""
        mask_HLL = self.tile(block.tile_tokens).mask_HLL
        if len(block.lengths) == 1:
            return mask_HLL
        owner_L = torch.repeat_interleave(torch.tensor(block.lengths)).to(mask_HLL.device)
        return mask_HLL * (owner_L[:, None] == owner_L[None, :])


def tiles_of(x_THD: torch.Tensor, block: Block) -> torch.Tensor:
    """The block's tokens as a view [M, H, L, D]; of one tile [H, L, D]."""
    x_LHD = x_THD[block.start : block.stop]
    if block.num_tiles == 1:
        return x_LHD.transpose(0, 1)
    return x_LHD.view(block.num_tiles, block.tile_tokens, *x_THD.shape[1:]).transpose(1, 2)


def by_tile(x_A: torch.Tensor, num_tiles: int) -> torch.Tensor:
    """[A, ...] -> [M, H, ...], over which the decays of the heads broadcast; of one tile [H, ...]."""
    return x_A if num_tiles == 1 else x_A.view(num_tiles, -1, *x_A.shape[1:])


def load(block: Block, x_THD: torch.Tensor, name: str, workspace: Workspace) -> torch.Tensor:
    """The block's part of an operand, [A, L, D], copied: far faster to multiply than rows a token apart."""
    _, num_heads, dim = x_THD.shape
    x_ALD = workspace.lend(name, (block.num_tiles * num_heads, block.tile_tokens, dim), x_THD.dtype)
    by_tile(x_ALD, block.num_tiles).copy_(tiles_of(x_THD, block))
    return x_ALD


def product(a_AIJ: torch.Tensor, b_AJK: torch.Tensor, name: str, workspace: Workspace) -> torch.Tensor:
    """a b in the workspace, under a name."""
    shape = (*a_AIJ.shape[:2], b_AJK.shape[2])
    return torch.bmm(a_AIJ, b_AJK, out=workspace.lend(name, shape, a_AIJ.dtype))


def decayed_scores(
    q_ALK: torch.Tensor, k_ALK: torch.Tensor, block: Block, tables: DecayTables, scores_ALL: torch.Tensor
) -> torch.Tensor:
    """(Q K^T) * M in the dtype of the operands, written over scores."""
    torch.bmm(q_ALK, k_ALK.mT, out=scores_ALL)
    by_tile(scores_ALL, block.num_tiles).mul_(tables.mask(block))
    return scores_ALL


def store_sum(
    o_THV: torch.Tensor,
    intra_ALV: torch.Tensor,
    q_ALK: torch.Tensor,
    states: torch.Tensor | None,
    block: Block,
    tables: DecayTables,
    workspace: Workspace,
) -> None:
    """Write intra + decayed Q S to the block's rows; states as StateWalk.step gives them."""
    o_MHLV, intra_MHLV = tiles_of(o_THV, block), by_tile(intra_ALV, block.num_tiles)
    if states is None:
        o_MHLV.copy_(intra_MHLV)
    elif len(block.lengths) == 1:
        inter_MHLV = by_tile(product(q_ALK, states, "inter", workspace), block.num_tiles)
        torch.addcmul(intra_MHLV, inter_MHLV, tables.tile(block.tile_tokens).enter_HL1, out=o_MHLV)
    else:
        parts = (x.split(block.lengths, dim=1) for x in (o_MHLV, intra_ALV, q_ALK))
        by_document = states.view(len(block.lengths), -1, *states.shape[1:])
        for o_HlV, intra_HlV, q_HlK, state_HKV in zip(*parts, by_document, strict=True):
            inter_HlV = product(q_HlK, state_HKV, "inter", workspace)
            torch.addcmul(intra_HlV, inter_HlV, tables.tile(q_HlK.shape[1]).enter_HL1, out=o_HlV)


def kept_scores(scores_THC: torch.Tensor, block: Block) -> torch.Tensor:
    """The place of the block's decayed scores in memory for those of all tokens, as [A, L, L]; shorter tiles leave
    some of theirs free."""
    num_heads, tokens = scores_THC.shape[1], block.tile_tokens
    shape = (block.num_tiles * num_heads, tokens, tokens)
    return scores_THC[block.start : block.stop].view(-1)[: prod(shape)].view(shape)


class StateWalk:
    """Walks the blocks in (reversed) time: takes their tokens into the states, and tells which states enter them."""

    def __init__(
        self,
        blocks: tuple[Block, ...],
        tables: DecayTables,
        workspace: Workspace,
        state_in_NHKV: torch.Tensor | None,
        state_out_NHKV: torch.Tensor | None,
    ):
        self.blocks = blocks[::-1] if tables.reverse else blocks
        self.tables, self.workspace = tables, workspace
        self.state_in_NHKV, self.state_out_NHKV = state_in_NHKV, state_out_NHKV
        self.carried_HKV: torch.Tensor | None = None
        self._num_carried = self._num_updates = 0

    def step(self, block: Block, k_ALK: torch.Tensor, v_ALV: torch.Tensor) -> torch.Tensor | None:
        """Take a block's tokens in. Returns the states that enter its tiles, [A, K, V] in the operands' dtype (of a
        shared tile: those of its documents, [its N * H, K, V]), or None where nothing enters. They hold until the
        next step."""
        begins, ends = (block.opens, block.closes)[:: -1 if self.tables.reverse else 1]
        entering_NHKV = None if self.state_in_NHKV is None else self.state_in_NHKV[block.documents]
        state_out_NHKV = self.state_out_NHKV if ends else None
        leaving_NHKV = None if state_out_NHKV is None else state_out_NHKV[block.documents]
        if len(block.lengths) > 1:
            if leaving_NHKV is not None:
                self._close_documents(block.lengths, k_ALK, v_ALV, entering_NHKV, leaving_NHKV)
            return None if entering_NHKV is None else entering_NHKV.flatten(0, 1).to(k_ALK.dtype)
        if begins:
            self.carried_HKV = None if entering_NHKV is None else entering_NHKV[0]
        states_AKV = self._pass_tiles(
            block.num_tiles, k_ALK, v_ALV, last_counts=leaving_NHKV is not None or not ends
        )
        if leaving_NHKV is not None:
            leaving_NHKV[0] = self.carried_HKV
        return states_AKV

    def _pass_tiles(
        self, num_tiles: int, k_ALK: torch.Tensor, v_ALV: torch.Tensor, last_counts: bool
    ) -> torch.Tensor | None:
        """The state through the tiles of one document; last_counts: the state after the last of them is needed."""
        total_H11 = self.tables.tile(k_ALK.shape[1]).total_H11
        if num_tiles == 1:
            entering_HKV = self.carried_HKV
            if last_counts:
                self._carry(self._updates(1, k_ALK, v_ALV), total_H11)
            return entering_HKV if entering_HKV is None else entering_HKV.to(k_ALK.dtype)
        num_heads = len(total_H11)
        states_AKV = self.workspace.lend("states", (len(k_ALK), k_ALK.shape[2], v_ALV.shape[2]), k_ALK.dtype)
        if not last_counts:
            counted = slice(num_heads, None) if self.tables.reverse else slice(-num_heads)
            k_ALK, v_ALV, num_tiles = k_ALK[counted], v_ALV[counted], num_tiles - 1
        updates = self._updates(num_tiles, k_ALK, v_ALV).split(num_heads)
        in_time = slice(None, None, -1 if self.tables.reverse else 1)
        for entered_HKV, update_HKV in zip_longest(states_AKV.split(num_heads)[in_time], updates[in_time]):
            if self.carried_HKV is None:
                entered_HKV.zero_()
            else:
                entered_HKV.copy_(self.carried_HKV)
            if update_HKV is not None:
                self._carry(update_HKV, total_H11)
        return states_AKV

    def _carry(self, update_HKV: torch.Tensor, total_H11: torch.Tensor) -> None:
        """Take one tile's update into the carried state, in the update's own memory where that is precise enough."""
        next_HKV = update_HKV
        if update_HKV.dtype != total_H11.dtype:
            self._num_carried += 1
            name = f"carried {self._num_carried % 2}"
            next_HKV = self.workspace.lend(name, update_HKV.shape, total_H11.dtype).copy_(update_HKV)
        if self.carried_HKV is not None:
            next_HKV.addcmul_(self.carried_HKV, total_H11)
        self.carried_HKV = next_HKV

    def _updates(self, num_tiles: int, k_ALK: torch.Tensor, v_ALV: torch.Tensor) -> torch.Tensor:
        """K^T diag(w) V of each tile, [A, K, V]; the weighted V is rounded once."""
        # its memory is free again when Q S is computed
        weighted_ALV = self.workspace.lend("inter", v_ALV.shape, v_ALV.dtype)
        leave_HL1 = self.tables.tile(k_ALK.shape[1]).leave_HL1
        torch.mul(by_tile(v_ALV, num_tiles), leave_HL1, out=by_tile(weighted_ALV, num_tiles))
        # the state of the block before may lie in that block's updates
        self._num_updates += 1
        return product(k_ALK.mT, weighted_ALV, f"updates {self._num_updates % 2}", self.workspace)

    def _close_documents(
        self,
        lengths: tuple[int, ...],
        k_HLK: torch.Tensor,
        v_HLV: torch.Tensor,
        entering_NHKV: torch.Tensor | None,
        leaving_NHKV: torch.Tensor,
    ) -> None:
        """Write the final state of each document of a shared tile."""
        parts = zip(k_HLK.split(lengths, dim=1), v_HLV.split(lengths, dim=1), strict=True)
        for document, (k_HlK, v_HlV) in enumerate(parts):
            leaving_NHKV[document] = self._updates(1, k_HlK, v_HlV)
            if entering_NHKV is not None:
                total_H11 = self.tables.tile(k_HlK.shape[1]).total_H11
                leaving_NHKV[document].addcmul_(entering_NHKV[document], total_H11)


def scan_into(
    o_THV: torch.Tensor,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slopes_H: torch.Tensor,
    state_in_NHKV: torch.Tensor | None,
    spans: tuple[Span, ...],
    reverse: bool,
    scale: float,
    state_out_NHKV: torch.Tensor | None,
    scores_THC: torch.Tensor | None = None,
) -> None:
    """Lightning attention of the N documents that are spans of a pack; arguments already checked.

    q, k [T, H, K], v [T, H, V] with any strides; slopes [H]; states [N, H, K, V] in the state dtype; spans ascend but
    need not touch. Written: the rows of o [T, H, V] in the spans, the states after each document's last token (first,
    if reversed), and (Q K^T) * M of each tile into scores, [T, H, CHUNK_TOKENS] in the dtype of q, for the backward.
    """
    q_THK, k_THK, v_THV = operands
    tables = DecayTables(slopes_H, reverse, scale, q_THK.dtype)
    workspace = Workspace(q_THK.device)
    walk = StateWalk(blocks_for(q_THK, spans), tables, workspace, state_in_NHKV, state_out_NHKV)
    for block in walk.blocks:
        q, k, v = (load(block, x, name, workspace) for x, name in ((q_THK, "q"), (k_THK, "k"), (v_THV, "v")))
        if scores_THC is None:
            scores = workspace.lend("scores", (*q.shape[:2], k.shape[1]), q.dtype)
        else:
            if block.tile_tokens < CHUNK_TOKENS:
                scores_THC[block.start : block.stop].zero_()
            scores = kept_scores(scores_THC, block)
        intra = product(decayed_scores(q, k, block, tables, scores), v, "intra", workspace)
        store_sum(o_THV, intra, q, walk.step(block, k, v), block, tables, workspace)


def scan_backward_into(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grad_o_THV: torch.Tensor,
    later_state: LaterState,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slopes_H: torch.Tensor,
    state_in_NHKV: torch.Tensor | None,
    spans: tuple[Span, ...],
    reverse: bool,
    scale: float,
    last_state_NHKV: torch.Tensor | None,
    scores_THC: torch.Tensor | None = None,
) -> None:
    """The three backward scans of op.py in two walks: dq with time, then dk and dv against it.

    The second walk keeps one state R for both (dk reads its transpose) and reuses the decayed dO V^T of the first.
    later_state: what enters the second walk. scores: what scan_into kept; without it they are computed again.
    Written: the spans' rows of dq, dk and dv, and R at its end.
    """
    q_THK, k_THK, v_THV = operands
    grad_q, grad_k, grad_v = gradients
    blocks, workspace = blocks_for(q_THK, spans), Workspace(q_THK.device)
    tables = DecayTables(slopes_H, reverse, scale, q_THK.dtype)
    walk = StateWalk(blocks, tables, workspace, None if state_in_NHKV is None else state_in_NHKV.mT, None)
    kept: list[torch.Tensor] = []
    for block in walk.blocks:
        k, v = load(block, k_THK, "k", workspace), load(block, v_THV, "v", workspace)
        grad = load(block, grad_o_THV, "grad", workspace)
        kept.append(decayed_scores(grad, v, block, tables, grad.new_empty(*grad.shape[:2], v.shape[1])))
        intra_q = product(kept[-1], k, "intra", workspace)
        store_sum(grad_q, intra_q, grad, walk.step(block, v, k), block, tables, workspace)
    against = DecayTables(slopes_H, not reverse, scale, q_THK.dtype)
    walk = StateWalk(blocks, against, workspace, later_state(), last_state_NHKV)
    for block in walk.blocks:
        q, grad = load(block, q_THK, "q", workspace), load(block, grad_o_THV, "grad", workspace)
        states = walk.step(block, q, grad)
        intra_k = product(kept.pop().mT, q, "intra", workspace)
        states_t = None if states is None else states.mT
        # v and k one after the other in the same memory
        v = load(block, v_THV, "v", workspace)
        store_sum(grad_k, intra_k, v, states_t, block, against, workspace)
        k = load(block, k_THK, "v", workspace)
        if scores_THC is None:
            scores_t = workspace.lend("scores", (*k.shape[:2], q.shape[1]), k.dtype)
            decayed_scores(k, q, block, against, scores_t)
        else:
            scores_t = kept_scores(scores_THC, block).mT
        intra_v = product(scores_t, grad, "intra", workspace)
        store_sum(grad_v, intra_v, k, states, block, against, workspace)


def leaving_states(
    k_THK: torch.Tensor, v_THV: torch.Tensor, slopes_H: torch.Tensor, spans: tuple[Span, ...], reverse: bool
) -> torch.Tensor:
    """What each span adds to a state that passes it in (reversed) time, [M, H, K, V]: sum_j lambda^n k_j v_j^T with
    n the tokens from j to its last (first) one. Operands and sums in the dtype of states."""
    dtype = state_dtype_for(k_THK.dtype)
    states_MHKV = k_THK.new_zeros(len(spans), *k_THK.shape[1:], v_THV.shape[2], dtype=dtype)
    block_tokens = STATE_TOKENS.get(k_THK.device.type, STATE_TOKENS_ELSEWHERE)
    for state_HKV, (start, stop) in zip(states_MHKV, spans, strict=True):
        for first in range(start, stop, block_tokens):
            last = min(first + block_tokens, stop)
            places_L = torch.arange(first, last, device=k_THK.device, dtype=torch.float64)
            distances_L = places_L - start if reverse else stop - 1 - places_L
            weights_HL1 = torch.exp(-slopes_H.double()[:, None] * distances_L)[:, :, None].to(dtype)
            k_HLK, v_HLV = (x[first:last].transpose(0, 1).to(dtype) for x in (k_THK, v_THV))
            state_HKV.baddbmm_((k_HLK * weights_HL1).mT, v_HLV)
    return states_MHKV


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
    """`scan_into` of all documents between N + 1 borders from 0 to T, into new tensors: o [T, H, V] in the dtype of q
    and the states [N, H, K, V]; [0, H, K, V] without output_state."""
    o_THV = q_THK.new_empty(v_THV.shape)
    state_shape = (len(borders) - 1 if output_state else 0, *q_THK.shape[1:], v_THV.shape[-1])
    states = q_THK.new_empty(state_shape, dtype=state_dtype_for(q_THK.dtype))
    scan_into(
        o_THV,
        (q_THK, k_THK, v_THV),
        slopes_H,
        state_in_NHKV,
        spans_of(borders),
        reverse,
        scale,
        states if output_state else None,
    )
    return o_THV, states
