"""What the trainer takes from any source of data: rows of packed documents, and microbatches made of them.

Legend: S tokens per row, T this rank's tokens of a microbatch (rows * S without context parallelism), B rows, L layers,
k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from megatron_m1.model.packed import Packed
from parallel.split import Piece


class Row(Protocol):
    """One sample of the global batch, as numpy arrays: `data_pipeline.pack.PackedSample` has this form.

    A row of generated text may also have `experts_SLk`, integers [S, L, k]: the experts that the routers took when the
    text was generated, all layers of the model, -1 for tokens without a record. The record of a
    sample (`experts_WLk` there) goes to the positions of its inputs: prompt and answer without the last token.
    """

    @property
    def tokens_S(self) -> Any: ...
    @property
    def labels_S(self) -> Any: ...
    @property
    def loss_mask_S(self) -> Any: ...
    @property
    def document_lengths(self) -> Any: ...
    @property
    def sample_id(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What one rank passes through the model at once: its piece of the tokens under context parallelism."""

    tokens_T: torch.Tensor
    """int64 [T]."""
    labels_T: torch.Tensor
    """int64 [T]: the token after each token."""
    loss_mask_T: torch.Tensor
    """fp32 [T]: 1 where the loss counts."""
    packed: Packed


def make_microbatch(
    rows: Sequence[Row], *, global_rows: int, device: torch.device, piece: Piece | None = None
) -> Microbatch:
    """Lay rows end to end and keep this rank's piece of them; every row ends a document for attention.

    Args:
        rows: of equal length S.
        global_rows: rows in the whole global batch, which weights the auxiliary loss.
        device: where the model is.
        piece: which tokens this rank holds; None for all of them.
    """
    lengths = [int(length) for row in rows for length in row.document_lengths]

    def joined(name: str, dtype: torch.dtype) -> torch.Tensor:
        whole = torch.cat([torch.as_tensor(getattr(row, name)).to(dtype) for row in rows])
        own = packed.split.cut(whole, packed.rank)
        # from pinned memory the copy runs beside what the device is doing; the allocator keeps it until it is done
        return own.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else own.to(device)

    packed = Packed.from_lengths(
        lengths,
        row_tokens=len(rows[0].tokens_S),
        auxiliary_weight=1.0 / global_rows,
        device=device,
        piece=piece,
    )
    recorded = [getattr(row, "experts_SLk", None) for row in rows]
    if any(experts is not None for experts in recorded):
        packed = replace(packed, experts_TLk=_joined_experts(recorded, packed).to(device))
    return Microbatch(
        joined("tokens_S", torch.int64),
        joined("labels_S", torch.int64),
        joined("loss_mask_S", torch.float32),
        packed,
    )


def _joined_experts(recorded: Sequence[Any], packed: Packed) -> torch.Tensor:
    """This rank's piece of the rows' records, [T, L, k]; -1 for the tokens of rows without one."""
    known = next(experts for experts in recorded if experts is not None)
    shape = packed.row_tokens, *known.shape[1:]
    rows = [
        torch.full(shape, -1, dtype=torch.as_tensor(known).dtype)
        if experts is None
        else torch.as_tensor(experts)
        for experts in recorded
    ]
    return packed.split.cut(torch.cat(rows), packed.rank)


def sample_ids(
    *, consumed: int, global_rows: int, micro_batch: int, data_parallel: int, data_rank: int
) -> list[list[int]]:
    """Global sample numbers of this rank's microbatches in one step.

    Row r of microbatch m on data-parallel rank d is sample consumed + (m * dp + d) * micro_batch + r, so the set of a
    step depends on the count of consumed samples alone.
    """
    per_pass = micro_batch * data_parallel
    return [
        [consumed + start + data_rank * micro_batch + row for row in range(micro_batch)]
        for start in range(0, global_rows, per_pass)
    ]
