"""Layouts over two GPUs, through NCCL, equal one GPU: losses, every gradient, routing, weights after two steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.equivalence.matrix import Case, case
from tests.equivalence.test_equivalence import assert_equal, run_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here"),
]

ON_TWO = [
    case(tp=2),
    case(tp=2, sequence_parallel=False),
    case(pp=2),
    case(dp=2),
    case(dp=2, ep=2),
    case(cp=2),
    case(cp=2, cp_exchange="ring"),
    case(cp=2, cp_attention="all_gather"),
]


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    """Case name -> what each rank brought back; "one" ran on one GPU."""
    return run_all(ON_TWO)


@pytest.mark.parametrize("layout", ON_TWO, ids=lambda one: one.name)
def test_two_gpus_equal_one(layout: Case, results: dict[str, list[dict[str, Any]]]) -> None:
    assert_equal(layout, results)
