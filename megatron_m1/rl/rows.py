"""Answers as packed rows of the trainer: one document per answer, the loss on what was generated.

Rows are whole and equal on all ranks; a rank takes its share of them as in pretraining, and its piece of each under
context parallelism. Legend: S tokens per row, T this rank's tokens of a microbatch, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_m1.model.packed import Packed
from megatron_m1.rl.learned import Answer
from megatron_m1.rl.sample import Prompt, Sample
from megatron_m1.training.batch import Microbatch, make_microbatch, sample_ids
from parallel.groups import Groups

COLUMNS = ("old", "advantages", "weights")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the generated tokens of one answer are predicted."""

    row: int
    start: int
    """First position whose label was generated."""
    length: int


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """A row as `make_microbatch` takes it, with what the loss must know of each position."""

    tokens_S: np.ndarray
    labels_S: np.ndarray
    loss_mask_S: np.ndarray
    document_lengths: list[int]
    sample_id: int
    columns: dict[str, np.ndarray]
    """fp32 [S] each of `COLUMNS`; weights are 0 on prompts and padding."""
    experts_SLk: np.ndarray | None = None
    """Experts to take again, -1 for tokens without a record; None: routers choose."""


@dataclass(frozen=True, slots=True)
class PolicyMicrobatch(Microbatch):
    """A microbatch with this rank's piece of the columns."""

    columns: dict[str, torch.Tensor]
    """fp32 [T] each."""
    rows: tuple[int, ...]
    """Numbers of its rows in the update."""


def place_samples(lengths: Sequence[int], row_tokens: int) -> list[tuple[int, int]]:
    """(row, first position) of each length in order, first fit decreasing: the same on every rank.

    Raises:
        ValueError: one is longer than a row.
    """
    longest = max(lengths)
    if longest > row_tokens:
        raise ValueError(
            f"a prompt with its answer has {longest} tokens and a row {row_tokens}: an answer is learnt as one "
            f"document; raise training.sequence_length to {longest} or more, or lower rl.window.stages_tokens"
        )
    filled: list[int] = []
    places: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, used in enumerate(filled) if used + lengths[index] <= row_tokens), len(filled))
        if row == len(filled):
            filled.append(0)
        places[index] = (row, filled[row])
        filled[row] += lengths[index]
    return [places[index] for index in range(len(lengths))]


def pack_answers(
    answers: Sequence[Answer], row_tokens: int, rows_multiple: int
) -> tuple[list[PolicyRow], list[Place]]:
    """Rows of answers, and where each one's generated tokens are; empty rows fill up to the multiple."""
    # the last token is a label only
    lengths = [len(answer.prompt_S) + len(answer.sample.tokens_S) - 1 for answer in answers]
    spots = place_samples(lengths, row_tokens)
    num_rows = max(row for row, _ in spots) + 1
    num_rows += -num_rows % rows_multiple
    ints = np.zeros((2, num_rows, row_tokens), dtype=np.int64)
    floats = {name: np.zeros((num_rows, row_tokens), dtype=np.float32) for name in COLUMNS}
    mask = np.zeros((num_rows, row_tokens), dtype=np.float32)
    documents: list[list[tuple[int, int]]] = [[] for _ in range(num_rows)]
    experts = _recorded_experts(answers, spots, num_rows, row_tokens)
    places = []
    for answer, (row, first), length in zip(answers, spots, lengths, strict=True):
        whole = np.concatenate([answer.prompt_S, answer.sample.tokens_S])
        ints[0, row, first : first + length] = whole[:-1]
        ints[1, row, first : first + length] = whole[1:]
        start = first + len(answer.prompt_S) - 1
        part = slice(start, first + length)
        mask[row, part] = 1.0
        floats["old"][row, part] = answer.old_S
        floats["advantages"][row, part] = answer.advantage
        floats["weights"][row, part] = answer.weights_S
        documents[row].append((first, length))
        places.append(Place(row, start, first + length - start))
    rows = [
        PolicyRow(
            ints[0, row],
            ints[1, row],
            mask[row],
            _lengths(documents[row], row_tokens),
            row,
            {name: values[row] for name, values in floats.items()},
            None if experts is None else experts[row],
        )
        for row in range(num_rows)
    ]
    return rows, places


def _recorded_experts(
    answers: Sequence[Answer], spots: Sequence[tuple[int, int]], num_rows: int, row_tokens: int
) -> np.ndarray | None:
    """[rows, S, L, k], -1 where nothing was recorded; None when no answer has a record."""
    known = [answer.sample.experts_WLk for answer in answers]
    first = next((experts for experts in known if experts is not None), None)
    if first is None:
        return None
    found = np.full((num_rows, row_tokens, *first.shape[1:]), -1, dtype=first.dtype)
    for experts, (row, start) in zip(known, spots, strict=True):
        if experts is not None:
            found[row, start : start + len(experts)] = experts
    return found


def unscored(prompt: Prompt, sample: Sample) -> Answer:
    """An answer whose log-probabilities are asked for."""
    zeros = np.zeros(len(sample.tokens_S), dtype=np.float32)
    return Answer(prompt.tokens_S, sample, zeros, 0.0, zeros)


def rows_multiple(groups: Groups, micro_batch: int) -> int:
    """What the number of rows of an update must be a multiple of."""
    layout = groups.layout
    return micro_batch * layout.dp * (layout.pp if layout.vpp > 1 else 1)


def microbatches_of(rows: Sequence[PolicyRow], groups: Groups, micro_batch: int) -> list[PolicyMicrobatch]:
    """This rank's share of the rows."""
    ids = sample_ids(
        consumed=0,
        global_rows=len(rows),
        micro_batch=micro_batch,
        data_parallel=groups.layout.dp,
        data_rank=groups.coordinates["dp"],
    )
    found = []
    for numbers in ids:
        chosen = [rows[number] for number in numbers]
        plain = make_microbatch(chosen, global_rows=len(rows), device=groups.device, piece=groups.piece)
        found.append(
            PolicyMicrobatch(
                plain.tokens_T,
                plain.labels_T,
                plain.loss_mask_T,
                plain.packed,
                {name: _cut(plain.packed, [row.columns[name] for row in chosen], groups) for name in COLUMNS},
                tuple(numbers),
            )
        )
    return found


class LogProbs:
    """An objective that keeps the log-probability of every label; nothing is minimised."""

    def __init__(self, num_rows: int, row_tokens: int, groups: Groups) -> None:
        self._groups, self._row_tokens = groups, row_tokens
        self._found = torch.zeros(num_rows * row_tokens, dtype=torch.float32, device=groups.device)

    def __call__(self, microbatch: PolicyMicrobatch, losses_T: torch.Tensor) -> torch.Tensor:
        if self._groups.counts_its_tokens:
            packed = microbatch.packed
            numbers_T = packed.split.token_numbers(packed.rank)
            first_of_row = torch.tensor(microbatch.rows) * self._row_tokens
            places_T = first_of_row[numbers_T // self._row_tokens] + numbers_T % self._row_tokens
            self._found[places_T.to(self._found.device)] = -losses_T.detach() * microbatch.loss_mask_T
        return losses_T.sum() * 0.0

    def by_answer(self, places: Sequence[Place]) -> list[np.ndarray]:
        """fp32 [S] of each answer, on every rank; collective."""
        dist.all_reduce(self._found)
        rows = self._found.view(-1, self._row_tokens).cpu().numpy()
        return [rows[place.row, place.start : place.start + place.length].copy() for place in places]


def _cut(packed: Packed, parts: Sequence[np.ndarray], groups: Groups) -> torch.Tensor:
    return packed.split.cut(torch.from_numpy(np.concatenate(parts)), packed.rank).to(groups.device)


def _lengths(documents: list[tuple[int, int]], row_tokens: int) -> list[int]:
    """Lengths of a row's documents in their order, padding last."""
    lengths = [length for _, length in sorted(documents)]
    rest = row_tokens - sum(lengths)
    return [*lengths, rest] if rest else lengths
