"""The adapter: what it replaces raises without it, gives CPU answers with it, and is seen by megatron-core alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from parallel import cpu
from tests.spawn import ROOT

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the adapter is inactive on a machine with CUDA"
)


REPLACED = {
    "norm": "from megatron.core.utils import local_multi_tensor_l2_norm as f; f(1, None, [[torch.ones(2)]], False)",
    "get random state": "from megatron.core.tensor_parallel.random import _get_cuda_rng_state as f; f()",
    "clip": "from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32 as f\n"
    "p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2); f([p], 1.0, 2.0)",
    "to host": "from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu as f\n"
    "f(torch.ones(2), as_numpy=True).tobytes()",
    "device": "from megatron.core.pipeline_parallel.schedules import torch as t; t.cuda.current_device()",
    "stream": "from megatron.core.pipeline_parallel.schedules import torch as t; t.cuda.current_stream()",
    "literal": "from megatron.core.pipeline_parallel.schedules import torch as t; t.zeros([], device='cuda')",
}

_PROGRAM = """
import json, sys, torch
from parallel import cpu
cases, adapter = json.loads(sys.argv[1]), sys.argv[2] == "with"
if adapter:
    cpu.install()
failed = []
for name, code in cases.items():
    try:
        exec(code, {"torch": torch})
    except Exception:
        failed.append(name)
print(json.dumps(failed))
"""


@pytest.mark.parametrize(("adapter", "failing"), [("without", set(REPLACED)), ("with", set())])
def test_everything_it_replaces_fails_without_it_and_works_with_it(adapter: str, failing: set[str]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, json.dumps(REPLACED), adapter]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout.splitlines()[-1])) == failing


def test_torch_itself_is_left_alone() -> None:
    cpu.install()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.current_device()
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_megatron_core_reads_cuda_as_the_cpu() -> None:
    cpu.install()
    from megatron.core.pipeline_parallel import schedules

    view = schedules.torch
    assert view.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
    assert view.empty(2, device=view.cuda.current_device()).device.type == "cpu"
    assert view.cuda.current_stream() == view.cuda.Stream()
    assert view.Tensor is torch.Tensor


def test_random_state_round_trips_through_the_replaced_functions() -> None:
    cpu.install()
    from megatron.core.tensor_parallel import random

    state = random._get_cuda_rng_state()
    drawn = torch.rand(3)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)


def test_installing_twice_changes_nothing() -> None:
    assert cpu.install() is True
    from megatron.core.pipeline_parallel import schedules

    view = schedules.torch
    assert cpu.install() is True
    assert schedules.torch is view
