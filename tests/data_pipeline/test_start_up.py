"""Start-up: the first batch of a large index does not wait for a pass over it."""

import time

import numpy as np
import pytest

from data_pipeline.config import DataConfig, SourceConfig, build_dataset
from data_pipeline.index import bin_path, idx_path, write_index


def seconds_to_first_batch(prefix, num_documents):
    """Write an index of documents of 1 to 1,999 tokens over a token file without blocks; time a first batch."""
    lengths = np.random.default_rng(0).integers(1, 2000, num_documents, dtype=np.int32)
    with open(idx_path(prefix), "wb") as stream:
        write_index(stream, lengths, np.dtype("<i4"))
    with open(bin_path(prefix), "wb") as stream:
        stream.truncate(int(lengths.sum(dtype=np.int64)) * 4)
    del lengths
    started = time.perf_counter()
    config = DataConfig(sources=(SourceConfig(prefix=str(prefix)),))
    dataset = build_dataset(config, 4096, seed=1, split="train")
    rows = [dataset[number] for number in range(8)]
    assert all(row.document_lengths.sum() == 4096 for row in rows)
    return time.perf_counter() - started


def test_an_index_of_two_million_documents_starts_in_two_seconds(tmp_path):
    assert seconds_to_first_batch(tmp_path / "s", 2_000_000) < 2


@pytest.mark.slow
def test_an_index_of_a_hundred_million_documents_starts_in_five_seconds(tmp_path):
    assert seconds_to_first_batch(tmp_path / "s", 100_000_000) < 5
