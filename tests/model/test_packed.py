"""A microbatch's documents: where they begin, where tokens stand in them, and what cannot be packed."""

from __future__ import annotations

import pytest
import torch

from megatron_m1.model.packed import Packed


def pack(lengths: list[int], row_tokens: int) -> Packed:
    return Packed.from_lengths(
        lengths, row_tokens=row_tokens, auxiliary_weight=0.5, device=torch.device("cpu")
    )


def test_positions_start_again_with_every_document():
    packed = pack([3, 1, 4], row_tokens=4)
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert (packed.cu_seqlens.dtype, packed.positions_T.dtype) == (torch.int32, torch.int64)
    assert packed.document_lengths == (3, 1, 4)


@pytest.mark.parametrize("lengths", [[5, 3], [3, 2, 3], [8]])
def test_documents_over_a_row_border_are_refused(lengths):
    with pytest.raises(ValueError, match=r"cross a row border of 4 tokens.*split the document at the border"):
        pack(lengths, row_tokens=4)


def test_empty_documents_are_refused():
    with pytest.raises(ValueError, match=r"\[4, 0, 4\] hold an empty document.*drop empty documents"):
        pack([4, 0, 4], row_tokens=4)
