"""One microbatch's structure: documents laid end to end in one row of T tokens. Travels beside the hidden states.

megatron-core hands the object through its blocks as `packed_seq_params`; our layers read it, megatron-core does not.
Legend: T tokens of the microbatch, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Packed:
    """Documents of a microbatch and what a layer must know of the global batch."""

    cu_seqlens: torch.Tensor
    """int32 [N+1]: where documents begin, from 0 to T."""
    positions_T: torch.Tensor
    """int64 [T]: index of each token within its document."""
    document_lengths: tuple[int, ...]
    """The same lengths on the host, so that no layer waits for the device."""
    row_tokens: int
    """Tokens per row of the global batch: the scope of the auxiliary loss and of expert capacity."""
    auxiliary_weight: float
    """1 / rows of the global batch: makes the auxiliary loss a mean over rows, however they are split."""

    @classmethod
    def from_lengths(
        cls, lengths: list[int], *, row_tokens: int, auxiliary_weight: float, device: torch.device
    ) -> Packed:
        """Build from document lengths in tokens; rows must end where documents end.

        Raises:
            ValueError: an empty document, a document that crosses a row border, or a last row that is not full.
        """
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
        positions_T = torch.arange(int(ends_N[-1])) - starts_N.repeat_interleave(lengths_N)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends_N]).to(torch.int32)
        return cls(
            cu_seqlens.to(device), positions_T.to(device), tuple(lengths), row_tokens, auxiliary_weight
        )
