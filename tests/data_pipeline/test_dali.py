"""The DALI front: bit for bit the thread loader's steps. What both fronts promise is test_loader.py."""

import numpy as np
import pytest

from data_pipeline.config import DataConfig, SourceConfig, build_dataset
from data_pipeline.index import ShardWriter
from data_pipeline.thread import ThreadLoader

pytest.importorskip("nvidia.dali", reason="extra 'dali' is not installed")
dali = pytest.importorskip("data_pipeline.dali")

FIELDS = ("tokens_S", "labels_S", "loss_mask_S", "document_lengths")


@pytest.fixture
def dataset(tmp_path):
    numbers = np.random.default_rng(0)
    for name in ("one", "two"):
        with ShardWriter(tmp_path / name, 100_000) as writer:
            for _ in range(200):
                writer.add_document(numbers.integers(0, 100_000, numbers.integers(1, 60)))
    sources = (
        SourceConfig(prefix=str(tmp_path / "one"), weight=0.9),
        SourceConfig(prefix=str(tmp_path / "two"), weight=0.1),
    )
    return build_dataset(DataConfig(sources=sources), 32, seed=5, split="train")


def plan(num_steps):
    """Steps that grow, the last ones beyond one batch of DALI's."""
    start = 0
    for step in range(num_steps):
        count = (1, 3, 8, 64, 65, 150)[min(step, 5)]
        yield range(start, start + count)
        start += count


def bytes_kept_by(array):
    """Of the memory that lives as long as the array does."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    assert array.base is None, type(array.base)
    return array.nbytes


def assert_same_steps(one, other):
    num_steps = 0
    for left, right in zip(one, other, strict=True):
        assert [sample.sample_id for sample in left] == [sample.sample_id for sample in right]
        for a, b in zip(left, right, strict=True):
            for field in FIELDS:
                x, y = getattr(a, field), getattr(b, field)
                assert x.dtype == y.dtype
                assert x.tobytes() == y.tobytes()
                # a row that is kept must not keep the whole batch of DALI's
                assert bytes_kept_by(x) <= 4 * (1 + 3 * 32 + len(a.document_lengths))
        num_steps += 1
    return num_steps


@pytest.mark.parametrize("depth", [1, 4])
def test_both_fronts_give_the_same_bytes(dataset, depth):
    with (
        dali.DaliLoader(dataset, plan(9), depth) as one,
        ThreadLoader(dataset, plan(9), depth) as other,
    ):
        assert assert_same_steps(one, other) == 9
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(one)


@pytest.mark.parametrize("num_before", [1, 3, 5])
def test_a_run_that_changes_its_front_sees_the_same_samples(dataset, num_before):
    steps = [list(step) for step in plan(8)]
    with ThreadLoader(dataset, iter(steps), 2) as loader:
        uninterrupted = list(loader)
    with dali.DaliLoader(dataset, iter(steps), 2) as before:
        resumed = [next(before) for _ in range(num_before)]
    with ThreadLoader(dataset, iter(steps[num_before:]), 3) as after:
        resumed += list(after)
    assert assert_same_steps(resumed, uninterrupted) == 8
