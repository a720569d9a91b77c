"""The cluster of the tests of jobs, one per file, and what their runs train on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from data_pipeline.config import DataConfig
from tests.slurm.cluster import Cluster, missing
from tests.training.tiny_run import data_in, write_shards


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Four nodes. Their absence is loud, and in CI a failure."""
    reason = missing()
    if reason and "CI" in os.environ:
        pytest.fail(f"the tests on a real Slurm cannot run: {reason}")
    if reason:
        pytest.skip(f"NO TEST ON A REAL SLURM: {reason}")
    with Cluster(4) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two small shards."""
    directory = tmp_path_factory.mktemp("data")
    write_shards(directory)
    return data_in(directory)
