"""Documents to rows of a fixed number of tokens: `dataset[i]` is a pure function of shard, key and i.

Rule. The epochs of a shard are one endless stream: epoch 0's documents in its order, then epoch 1's, and
so on. Row r is tokens [r S, (r + 1) S) of the stream, so nothing is padded, dropped or read twice; the row
at the end of an epoch goes on into the next. Sample i is a row of the epoch that contains token i S; inside
an epoch the rows are permuted by a key.

Each token but the first of its document is the target of exactly one position per epoch: a document cut at
a row border has its true next token as the label of the last position (S + 1 tokens are read), and the
last token of a document predicts nothing (label 0, loss mask 0). What goes on in the next row counts as a
document of its own there: positions start at 0 and attention does not reach back.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_pipeline.index import TokenShard
from data_pipeline.order import MAX_BLOCKS, Blocks, EpochOrder
from data_pipeline.permute import KeyedPermutation, derive_key

NUM_EPOCHS_CACHED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSample:
    """One row of S tokens cut from whole and continued documents."""

    tokens_S: np.ndarray
    """int32 [S], the input ids."""
    labels_S: np.ndarray
    """int32 [S], the id that follows in the same document; 0 where `loss_mask_S` is 0."""
    loss_mask_S: np.ndarray
    """float32 [S], 1 where the label counts, 0 at the last token of a document."""
    document_lengths: np.ndarray
    """int32 [n], tokens per document in this row, in order; they sum to S."""
    sample_id: int
    """Global number of the sample, from 0, over all epochs."""


class PackedShard:
    """The endless sequence of samples of one shard."""

    def __init__(
        self, shard: TokenShard, sequence_length: int, key: int, max_blocks: int = MAX_BLOCKS
    ) -> None:
        """`key` (64 bits) chooses the order; `max_blocks` is the table size of `order.py`.

        Raises:
            ValueError: the sequence length is not positive, or the shard holds no tokens.
            ShardError: the index is damaged.
        """
        if sequence_length < 1:
            raise ValueError(
                f"sequence_length={sequence_length} is not a row length: it is at least 1 token; "
                "set training.sequence_length"
            )
        if not shard.num_tokens:
            raise ValueError(
                f"shard '{shard.prefix}' has {shard.num_documents} documents and 0 tokens: a source needs at "
                "least 1 token; prepare it from files that hold text"
            )
        self.shard = shard
        self.sequence_length = sequence_length
        self._blocks = Blocks(shard, max_blocks)
        self._key, self._max_blocks = key, max_blocks
        self._order = lru_cache(maxsize=NUM_EPOCHS_CACHED)(self._build_order)

    def __reduce__(self) -> tuple:
        return PackedShard, (self.shard, self.sequence_length, self._key, self._max_blocks)

    def _build_order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self._blocks, self._key, epoch)

    @property
    def num_rows_per_epoch(self) -> int:
        """Rows that read every token of the shard at least once, counted from sample 0."""
        return -(-self.shard.num_tokens // self.sequence_length)

    def __getitem__(self, sample: int) -> PackedSample:
        """Sample number `sample` >= 0, in any order, from any thread.

        Raises:
            ShardError: the shard is damaged where this sample lies.
        """
        if sample < 0:
            raise IndexError(f"sample {sample}: samples are numbered from 0")
        sequence_length = self.sequence_length
        tokens_S = np.empty(sequence_length, np.int32)
        labels_S = np.zeros(sequence_length, np.int32)
        loss_mask_S = np.ones(sequence_length, np.float32)
        lengths: list[int] = []
        epoch, position = self._stream_position(sample)
        filled = 0
        while filled < sequence_length:
            place = self._order(epoch).locate(position)
            left_in_document = place.document_length - place.offset
            count = min(left_in_document, sequence_length - filled)
            assert count > 0, (sample, epoch, position, place)
            # One token more than the row takes, where the document has one: the last label.
            piece = self.shard.tokens(place.document_start + place.offset, min(count + 1, left_in_document))
            tokens_S[filled : filled + count] = piece[:count]
            labels_S[filled : filled + len(piece) - 1] = piece[1:]
            filled += count
            if count == left_in_document:
                loss_mask_S[filled - 1] = 0.0
            lengths.append(count)
            epoch, position = self._advance(epoch, position + count)
        return PackedSample(
            tokens_S=tokens_S,
            labels_S=labels_S,
            loss_mask_S=loss_mask_S,
            document_lengths=np.asarray(lengths, np.int32),
            sample_id=sample,
        )

    def _advance(self, epoch: int, position: int) -> tuple[int, int]:
        """The same stream position with the position inside its epoch."""
        return (epoch + 1, 0) if position == self.shard.num_tokens else (epoch, position)

    def _stream_position(self, sample: int) -> tuple[int, int]:
        """Epoch and token position inside it where a sample's row begins."""
        num_tokens, sequence_length = self.shard.num_tokens, self.sequence_length
        epoch = sample * sequence_length // num_tokens
        first = -(-epoch * num_tokens // sequence_length)
        num_rows = -(-(epoch + 1) * num_tokens // sequence_length) - first
        rows = KeyedPermutation(num_rows, derive_key(self._key, "rows", epoch))
        row = first + rows(sample - first)
        return epoch, row * sequence_length - epoch * num_tokens
