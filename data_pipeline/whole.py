"""Documents to rows in which a document stays whole: greedy and best-fit packing, planned at start-up.

Rule. A document of at most S tokens is never cut. A longer one is cut into rows of S tokens and a rest, each a
document of its own with its true last label, or left out of the stage (`too_long: skip`). Greedy fills a row
with documents in a random order until the next one does not fit. Best-fit takes them longest first, each into
the fullest row that still has room (best-fit decreasing; Ding et al., arXiv 2404.10830). What stays empty is
padding. One plan serves all epochs; each epoch permutes its rows. A stage with another row length plans the
documents that are left of the running epoch anew, so an epoch reads each document once across stages.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from data_pipeline.index import TokenShard
from data_pipeline.order import EVERYTHING, PASS_DOCUMENTS, Selection
from data_pipeline.pack import PackedSample, RowBuilder
from data_pipeline.permute import KeyedPermutation, derive_key

Packing = Literal["split", "greedy", "best_fit"]
TooLong = Literal["split", "skip", "refuse"]
MAX_DOCUMENTS = 2**24


@dataclass(frozen=True, slots=True)
class Pieces:
    """Runs of tokens that go into rows: whole documents, or parts of long ones. N pieces."""

    starts_N: np.ndarray
    """int64 [N], first token in the shard."""
    counts_N: np.ndarray
    """int64 [N], tokens."""
    lefts_N: np.ndarray
    """int64 [N], tokens to the end of the document; more than the count where the document was cut."""

    def __len__(self) -> int:
        return len(self.starts_N)

    def __getitem__(self, chosen: np.ndarray) -> "Pieces":
        """The pieces at the given places, or where a mask is true."""
        return Pieces(self.starts_N[chosen], self.counts_N[chosen], self.lefts_N[chosen])

    def cut(self, sequence_length: int) -> "Pieces":
        """The same tokens in pieces of at most `sequence_length`."""
        parts_N = -(-self.counts_N // sequence_length)
        if np.all(parts_N <= 1):
            return self
        whole_M = np.repeat(np.arange(len(self)), parts_N)
        offsets_M = (
            np.arange(len(whole_M)) - np.repeat(np.cumsum(parts_N) - parts_N, parts_N)
        ) * sequence_length
        return Pieces(
            self.starts_N[whole_M] + offsets_M,
            np.minimum(self.counts_N[whole_M] - offsets_M, sequence_length),
            self.lefts_N[whole_M] - offsets_M,
        )


NOTHING = Pieces(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True)
class Plan:
    """Which pieces share a row."""

    pieces: Pieces
    order_N: np.ndarray
    """int64 [N], the pieces row by row."""
    row_borders: np.ndarray
    """int64 [rows + 1], where rows begin in `order_N`."""

    @property
    def num_rows(self) -> int:
        """Rows of the plan."""
        return len(self.row_borders) - 1

    def of_row(self, row: int) -> np.ndarray:
        """Numbers of the pieces of one row."""
        return self.order_N[self.row_borders[row] : self.row_borders[row + 1]]


def make_plan(pieces: Pieces, sequence_length: int, multiple: int, packing: Packing, key: int) -> Plan:
    """Pack pieces of at most `sequence_length` tokens into rows; the same arguments give the same plan."""
    if not len(pieces):
        return Plan(pieces, np.zeros(0, np.int64), np.zeros(1, np.int64))
    visited_N = KeyedPermutation(len(pieces), key).all()
    positions_N = (-(-pieces.counts_N // multiple) * multiple)[visited_N]
    pack = best_fit if packing == "best_fit" else greedy
    row_of_N = pack(positions_N, sequence_length)
    by_row_N = np.argsort(row_of_N, kind="stable")
    borders = np.searchsorted(row_of_N[by_row_N], np.arange(int(row_of_N.max()) + 2))
    return Plan(pieces, visited_N[by_row_N], borders)


def greedy(positions_N: np.ndarray, sequence_length: int) -> np.ndarray:
    """Row of each piece when a row is filled in order until the next piece does not fit: int64 [N]."""
    ends_N = np.cumsum(positions_N)
    row_of_N = np.empty(len(positions_N), np.int64)
    first, row, before = 0, 0, 0
    while first < len(positions_N):
        last = int(np.searchsorted(ends_N, before + sequence_length, side="right"))
        row_of_N[first:last] = row
        first, row, before = last, row + 1, int(ends_N[last - 1])
    return row_of_N


def best_fit(positions_N: np.ndarray, sequence_length: int) -> np.ndarray:
    """Row of each piece, longest first, each into the fullest row that has room for it: int64 [N]."""
    row_of_N = np.empty(len(positions_N), np.int64)
    num_rows = 0
    rows_with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for piece in np.argsort(-positions_N, kind="stable").tolist():
        positions = int(positions_N[piece])
        place = bisect_left(rooms, positions)
        if place == len(rooms):
            row, room = num_rows, sequence_length
            num_rows += 1
        else:
            room = rooms[place]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[place]
        row_of_N[piece] = row
        if room > positions:
            left = room - positions
            if left not in rows_with_room:
                rows_with_room[left] = []
                insort(rooms, left)
            rows_with_room[left].append(row)
    return row_of_N


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRule:
    """How whole documents are packed."""

    packing: Packing = "best_fit"
    """`greedy` or `best_fit`."""
    too_long: TooLong = "split"
    """What becomes of a document longer than a row."""
    max_epochs: int = 0
    """How often each document is read; 0: endless."""


class WholeDocuments:
    """A source whose documents stay whole; remembers which of them the running epoch has still to read."""

    def __init__(
        self, name: str, shard: TokenShard, key: int, rule: WholeRule, selection: Selection = EVERYTHING
    ) -> None:
        """`key` (64 bits) chooses which documents share a row and the order of rows.

        Raises:
            ValueError: too many documents to plan, or none.
            ShardError: the index is damaged.
        """
        if shard.num_documents > MAX_DOCUMENTS:
            raise ValueError(
                f"shard '{shard.prefix}' has {shard.num_documents} documents: packing '{rule.packing}' plans each at "
                f"start-up and takes at most {MAX_DOCUMENTS}; choose packing: split, or cut the shard into several"
            )
        self.shard, self.key, self.multiple = shard, key, selection.multiple
        self.name = name
        self._rule, self._selection = rule, selection
        self._all = self._documents()
        self._every = lru_cache(maxsize=2)(lambda sequence_length: self._plan(self._all, sequence_length))
        if not len(self._all):
            raise ValueError(
                f"shard '{shard.prefix}' has {shard.num_documents} documents, none of {selection.min_tokens} to "
                f"{selection.max_tokens} tokens: a source needs at least 1; choose another bucket"
            )
        self._left: Pieces | None = None
        self._epochs_begun = 0

    def _documents(self) -> Pieces:
        """Every selected document as one piece."""
        starts, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for first in range(0, self.shard.num_documents, PASS_DOCUMENTS):
            last = min(first + PASS_DOCUMENTS, self.shard.num_documents)
            borders = self.shard.document_starts(first, last)
            lengths = np.diff(borders)
            kept = self._selection.positions(lengths) > 0
            starts.append(borders[:-1][kept])
            counts.append(lengths[kept])
        counts_N = np.concatenate(counts)
        return Pieces(np.concatenate(starts), counts_N, counts_N)

    def _plan(self, pieces: Pieces, sequence_length: int, *names: int | str) -> tuple[Plan, Pieces]:
        """The plan of pieces, and those that the stage leaves out because they are too long."""
        is_longer = pieces.counts_N > sequence_length
        if self._rule.too_long == "refuse" and is_longer.any():
            longest = int(pieces.counts_N.max())
            raise ValueError(
                f"shard '{self.shard.prefix}' has {int(is_longer.sum())} documents of more than {sequence_length} "
                f"tokens, the longest has {longest}, and too_long is 'refuse': a document fits into a row; set "
                f"training.sequence_length={-(-longest // self.multiple) * self.multiple} or more, or choose 'split' "
                "or 'skip'"
            )
        skipped = is_longer if self._rule.too_long == "skip" else np.zeros(len(pieces), bool)
        chosen = pieces[~skipped].cut(sequence_length)
        key = derive_key(self.key, "plan", *names)
        return make_plan(chosen, sequence_length, self.multiple, self._rule.packing, key), pieces[skipped]

    @property
    def epoch_tokens(self) -> int:
        """Tokens of one epoch, padding of documents included."""
        return int(self._selection.positions(self._all.counts_N).sum())

    def rows_left(self, sequence_length: int) -> int | None:
        """Rows of this length until every document has been read as often as it may be; None: endless."""
        if not self._rule.max_epochs:
            return None
        whole_epochs = self._rule.max_epochs - self._epochs_begun
        left = self._plan(self._left, sequence_length, self._epochs_begun)[0].num_rows if self._left else 0
        return left + whole_epochs * self._every(sequence_length)[0].num_rows

    def take(self, sequence_length: int, count: int | None) -> "WholeRows":
        """The next `count` rows (None: all that follow); what they read is not given again in this epoch."""
        first, left_out = self._plan(self._left or NOTHING, sequence_length, self._epochs_begun)
        every, _ = self._every(sequence_length)
        if not every.num_rows and count != 0:
            raise ValueError(
                f"shard '{self.shard.prefix}' has no document of at most {sequence_length} tokens and too_long is "
                "'skip': at least one document must fit into a row; raise the sequence length or choose 'split'"
            )
        rows = WholeRows(self, first, every, sequence_length, self._epochs_begun)
        if count:
            self._advance(rows, count, left_out)
        return rows

    def _advance(self, rows: "WholeRows", count: int, left_out: Pieces) -> None:
        """Note what `count` rows leave of the epoch in which they end."""
        if count <= rows.first.num_rows and self._left is not None:
            plan, taken, epoch = rows.first, count, self._epochs_begun - 1
        else:
            epochs, taken = divmod(count - rows.first.num_rows, rows.every.num_rows)
            self._epochs_begun += epochs + (taken > 0)
            plan, epoch = rows.every, self._epochs_begun - 1
            left_out = self._every(rows.sequence_length)[1]
        unread: Iterable[int] = rows.order_of(plan, epoch)[taken:] if taken else []
        pieces = np.concatenate([np.zeros(0, np.int64), *(plan.of_row(int(row)) for row in unread)])
        self._left = joined(plan.pieces[np.sort(pieces)], left_out)


def joined(one: Pieces, other: Pieces) -> Pieces:
    """The pieces of both."""
    return Pieces(
        np.concatenate([one.starts_N, other.starts_N]),
        np.concatenate([one.counts_N, other.counts_N]),
        np.concatenate([one.lefts_N, other.lefts_N]),
    )


class WholeRows:
    """Rows of S positions with whole documents: what is left of an epoch, then epoch after epoch."""

    def __init__(
        self, documents: WholeDocuments, first: Plan, every: Plan, sequence_length: int, epochs_begun: int
    ) -> None:
        self.first, self.every, self.sequence_length = first, every, sequence_length
        self._shard, self._key = documents.shard, documents.key
        self._multiple = documents.multiple
        self._epochs_begun = epochs_begun

    def order_of(self, plan: Plan, epoch: int) -> np.ndarray:
        """The rows of a plan in the order of an epoch: int64 [rows]."""
        return self._permutation(plan, epoch).all()

    def _permutation(self, plan: Plan, epoch: int) -> KeyedPermutation:
        name = "left" if plan is self.first else "rows"
        return KeyedPermutation(plan.num_rows, derive_key(self._key, name, epoch))

    def __getitem__(self, row: int) -> PackedSample:
        """Row number `row` >= 0, in any order, from any thread.

        Raises:
            ShardError: the shard is damaged where this row lies.
        """
        if row < 0:
            raise IndexError(f"row {row}: rows are numbered from 0")
        plan, epoch, number = self.first, self._epochs_begun - 1, row
        if row >= plan.num_rows:
            epochs, number = divmod(row - plan.num_rows, self.every.num_rows)
            plan, epoch = self.every, self._epochs_begun + epochs
        builder = RowBuilder(self.sequence_length)
        for piece in plan.of_row(self._permutation(plan, epoch)(number)).tolist():
            start, count, left = (
                int(array[piece])
                for array in (plan.pieces.starts_N, plan.pieces.counts_N, plan.pieces.lefts_N)
            )
            positions = -(-count // self._multiple) * self._multiple
            builder.add_from(self._shard, start, count, left, positions)
        return builder.finish(row)
