"""One microbatch's structure: documents laid end to end in one row of tokens. Travels beside the hidden states.

Under context parallelism a rank holds a part of the tokens, and its "documents" are the fragments of documents that
it holds; the split tells which fragments belong together. megatron-core hands the object through its blocks as
`packed_seq_params`; our layers read it, megatron-core does not.
Legend: T this rank's tokens of the microbatch, N documents or fragments of documents on this rank, L layers, k experts
per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from parallel.split import Piece, Split, cut_over_ranks

if TYPE_CHECKING:
    from megatron_m1.model.cache import Extension
    from megatron_m1.model.routing import RoutingRecord


@dataclass(frozen=True, slots=True)
class Packed:
    """This rank's documents of a microbatch and what a layer must know of the global batch."""

    cu_seqlens: torch.Tensor
    """int32 [N+1]: where this rank's documents begin, from 0 to T."""
    positions_T: torch.Tensor
    """int64 [T]: index of each token within its whole document."""
    document_lengths: tuple[int, ...]
    """The lengths between cu_seqlens on the host, so that no layer waits for the device."""
    row_tokens: int
    """Tokens per row of the global batch: the scope of the auxiliary loss and of expert capacity."""
    auxiliary_weight: float
    """1 / rows of the global batch: makes the auxiliary loss a mean over rows, however they are split."""
    split: Split
    """Who holds which tokens of the microbatch; one rank holds all without context parallelism."""
    rank: int
    """This rank's place in the split: its context-parallel coordinate."""
    extension: Extension | None = None
    """In generation: which cached sequence each document continues."""
    record: RoutingRecord | None = None
    """Where the routers of this pass note what they choose."""
    experts_TLk: torch.Tensor | None = None
    """Integers [T, layers, choices]: the experts that every router is to take instead of its own choice; -1 leaves it
    the token. All layers of the model, on every pipeline stage."""

    @classmethod
    def from_lengths(
        cls,
        lengths: list[int],
        *,
        row_tokens: int,
        auxiliary_weight: float,
        device: torch.device,
        piece: Piece | None = None,
    ) -> Packed:
        """One rank's part of a microbatch with these document lengths in tokens; rows must end where documents end.

        Args:
            lengths: of the documents of the whole microbatch.
            row_tokens: tokens per row.
            auxiliary_weight: 1 / rows of the global batch.
            device: where the model is.
            piece: which tokens this rank holds; None for all of them.

        Raises:
            ValueError: an empty document, a document that crosses a row border, or a last row that is not full.
        """
        borders = _checked_borders(lengths, row_tokens)
        piece = piece or Piece()
        split = cut_over_ranks(borders, piece.num_ranks, piece.kind)
        local = split.local_borders(piece.rank)
        return cls(
            torch.tensor(local, dtype=torch.int32, device=device),
            split.positions(piece.rank).to(device),
            tuple(b - a for a, b in pairwise(local)),
            row_tokens,
            auxiliary_weight,
            split,
            piece.rank,
        )


def _checked_borders(lengths: list[int], row_tokens: int) -> list[int]:
    """Cumulative lengths from 0, of whole documents in whole rows."""
    lengths_N = torch.tensor(lengths, dtype=torch.int64)
    if bool((lengths_N < 1).any()):
        raise ValueError(
            f"document lengths {lengths} hold an empty document: each must be 1 token or more; "
            "drop empty documents before packing"
        )
    ends_N = lengths_N.cumsum(0)
    starts_N = ends_N - lengths_N
    if bool((starts_N // row_tokens != (ends_N - 1) // row_tokens).any()):
        raise ValueError(
            f"document lengths {lengths} cross a row border of {row_tokens} tokens: rows must end where a "
            "document ends; split the document at the border"
        )
    if int(ends_N[-1]) % row_tokens:
        raise ValueError(
            f"document lengths {lengths} hold {int(ends_N[-1])} tokens: whole rows of {row_tokens} tokens are "
            "allowed; fill the last row"
        )
    return [0, *ends_N.tolist()]
