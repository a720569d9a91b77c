"""One process as a group of its own, for the tests of this folder that need a model but no second rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from parallel import cpu
from parallel.groups import Groups, create_groups, destroy_groups
from parallel.launch import connect, read_environment
from parallel.layout import Layout


@pytest.fixture(scope="module")
def alone() -> Iterator[Groups]:
    torch.set_num_threads(1)
    cpu.install()
    connect(read_environment({}))
    yield create_groups(Layout(), torch.device("cpu"))
    destroy_groups()
    torch.distributed.destroy_process_group()
