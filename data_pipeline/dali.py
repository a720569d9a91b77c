"""The loader on NVIDIA DALI: the steps of `thread.py`, passed through a DALI pipeline's queue.

The reading thread stays the reader. DALI's own worker processes are not used: when one dies while it is
idle, DALI 2.4 waits for it for ever. DALI's shuffling, sharding and checkpoints are not used either: which
samples a step needs is the caller's plan. Runs without a GPU; needs the extra `dali`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from nvidia.dali import Pipeline, fn, types

from data_pipeline.loader import CLOSED, Dataset, Loader
from data_pipeline.pack import PackedSample
from data_pipeline.thread import ThreadLoader

ROWS_PER_BATCH = 64
QUEUE_BATCHES = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """What DALI carries at once: a step, or a piece of a long one."""

    rows: list[np.ndarray]
    """1 to `ROWS_PER_BATCH` rows, from `_joined`; DALI reads them where they are, so they are kept until it is done."""
    sample_ids: list[int]
    """Of the rows."""
    ends_step: bool
    """Whether the step is complete with it."""


class DaliLoader(Loader):
    """Passes the steps of a reading thread through DALI's queue."""

    def __init__(self, dataset: Dataset, plan: Iterator[Sequence[int]], depth: int) -> None:
        """`plan` gives the global sample numbers of each step; `depth` >= 1 bounds the steps held ready."""
        self._reader = ThreadLoader(dataset, plan, depth)
        self._waiting: deque[Batch] = deque()
        self._in_pipeline: deque[Batch] = deque()
        self._error: Exception | None = None
        self._pipeline: Pipeline | None = _pipeline(self)

    def next_batch(self) -> list[np.ndarray]:
        """For DALI: the rows of the next batch.

        Raises:
            StopIteration: the plan has ended, or a step failed. DALI then delivers what it holds before it
                stops; any other exception would be raised too early, and lose the steps between.
        """
        if not self._waiting:
            try:
                self._waiting += _batches(next(self._reader))
            except (ValueError, RuntimeError) as error:
                self._error = error
                raise StopIteration from error
        batch = self._waiting.popleft()
        self._in_pipeline.append(batch)
        return batch.rows

    def __next__(self) -> list[PackedSample]:
        """The samples of the next step; see `Loader`."""
        samples: list[PackedSample] = []
        while True:
            if self._pipeline is None:
                raise RuntimeError(CLOSED)
            try:
                (rows,) = self._pipeline.run()
            except StopIteration:
                if self._error is not None:
                    raise self._error from self._error.__cause__
                raise
            batch = self._in_pipeline.popleft()
            # `at` copies, so a sample that is kept keeps no batch of DALI's alive
            samples += [_taken_apart(rows.at(row), number) for row, number in enumerate(batch.sample_ids)]
            if batch.ends_step:
                return samples

    def close(self) -> None:
        """Stop the reading thread and drop the pipeline."""
        self._reader.close()
        self._pipeline = None


def _batches(samples: Sequence[PackedSample]) -> Iterator[Batch]:
    """One step in pieces of at most `ROWS_PER_BATCH` rows."""
    assert samples, "a step without samples"
    for start in range(0, len(samples), ROWS_PER_BATCH):
        end = start + ROWS_PER_BATCH
        piece = samples[start:end]
        rows = [_joined(sample) for sample in piece]
        yield Batch(rows, [sample.sample_id for sample in piece], ends_step=end >= len(samples))


def _joined(sample: PackedSample) -> np.ndarray:
    """int32 [1 + 3 S + n]: S, tokens, labels, the bits of the loss mask, document lengths; DALI's cost is per array."""
    length = np.array([len(sample.tokens_S)], np.int32)
    mask_S = sample.loss_mask_S.view(np.int32)
    return np.concatenate((length, sample.tokens_S, sample.labels_S, mask_S, sample.document_lengths))


def _taken_apart(row: np.ndarray, sample_id: int) -> PackedSample:
    """The transpose of `_joined`."""
    length = int(row[0])
    tokens_S, labels_S, mask_S, document_lengths = np.split(row[1:], [length, 2 * length, 3 * length])
    return PackedSample(
        tokens_S=tokens_S,
        labels_S=labels_S,
        loss_mask_S=mask_S.view(np.float32),
        document_lengths=document_lengths,
        sample_id=sample_id,
    )


def _pipeline(loader: DaliLoader) -> Pipeline:
    """A CPU pipeline that asks the loader for its batches."""
    pipeline = Pipeline(
        batch_size=ROWS_PER_BATCH, num_threads=1, device_id=None, prefetch_queue_depth=QUEUE_BATCHES
    )
    with pipeline:
        rows = fn.external_source(
            source=loader.next_batch, batch=True, dtype=types.DALIDataType.INT32, no_copy=True
        )
        pipeline.set_outputs(rows)
    pipeline.build()
    return pipeline
