"""What every test shares: gpu tests are skipped, with the reason, where no CUDA device is usable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from parallel.groups import Groups

# Runs that tests start add up in the order of the ranks that they fork (tests/spawn.py): with more threads a sum of one
# differs in its last bits from that of the other.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no usable CUDA device"))


@pytest.fixture(scope="module")
def alone() -> Iterator[Groups]:
    """One process as a group of its own, for tests that need a model but no second rank."""
    import torch

    from parallel import cpu
    from parallel.groups import create_groups, destroy_groups
    from parallel.launch import connect, read_environment
    from parallel.layout import Layout

    torch.set_num_threads(1)
    cpu.install()
    connect(read_environment({}))
    yield create_groups(Layout(), torch.device("cpu"))
    destroy_groups()
    torch.distributed.destroy_process_group()
