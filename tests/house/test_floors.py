"""Imports only go down, and each guarded name stays in its one file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house.floors import FLOORS, faults_of, source_files

ROOT = Path(__file__).resolve().parents[2]


def test_every_import_goes_down_and_every_guarded_name_is_in_its_place():
    faults = [str(fault) for path, source in source_files(ROOT) for fault in faults_of(path, source)]
    assert not faults, "\n" + "\n".join(faults)


def test_the_walk_sees_all_four_packages():
    tops = {path.split("/")[0] for path, _ in source_files(ROOT)}
    assert tops >= {"kernels_cuda", "parallel", "megatron_m1", "data_pipeline", "setup.py"}


def test_every_folder_of_megatron_m1_has_a_floor():
    folders = {path.parent.name for path in (ROOT / "megatron_m1").glob("*/*.py")}
    assert {f"megatron_m1.{name}" for name in folders} <= FLOORS.keys()


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels_cuda/moe/op.py", "import torch.distributed as dist"),
        ("kernels_cuda/moe/op.py", "from torch import distributed"),
        ("kernels_cuda/moe/op.py", "import numpy as np"),
        ("kernels_cuda/moe/op.py", "from parallel.layout import Layout"),
        ("kernels_cuda/build.py", "def f():\n    import megatron.core"),
        ("parallel/groups.py", "from megatron_m1.model.config import ModelConfig"),
        ("parallel/split.py", "import importlib\nimportlib.import_module('data_pipeline.pack')"),
        ("data_pipeline/pack.py", "import torch"),
        ("data_pipeline/pack.py", "from parallel import layout"),
        ("megatron_m1/model/head.py", "from ..training import loop"),
        ("megatron_m1/model/__init__.py", "from ..training import loop"),
        ("megatron_m1/training/loop.py", "from data_pipeline.pack import PackedSample"),
        ("megatron_m1/training/loop.py", "from megatron_m1.config import RunConfig"),
        ("megatron_m1/rl/loop.py", "import megatron_m1.plan.memory"),
        ("megatron_m1/cli.py", "from tests.spawn import run_ranks"),
        ("setup.py", "import parallel"),
        ("parallel/layout.py", "from megatron.core import parallel_state"),
        ("parallel/layout.py", "import megatron.core.parallel_state as mpu"),
        ("parallel/layout.py", "import megatron\nmegatron.core.parallel_state.get_rank()"),
        ("megatron_m1/model/moe.py", "from megatron.core.transformer import TransformerConfig"),
        ("megatron_m1/run.py", "import os\nrank = os.environ['RANK']"),
        ("megatron_m1/run.py", "import os\nrank = os.getenv('RANK')"),
        ("megatron_m1/run.py", "from os import environ"),
        ("megatron_m1/run.py", "import os\ncopy = {**os.environ}"),
    ],
)
def test_the_walk_catches(path, source):
    assert faults_of(path, source), f"no fault found in {path}: {source!r}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels_cuda/bench/lightning.py", "from fla.ops import simple_gla"),
        ("parallel/lasp.py", "from kernels_cuda.lightning.op import lightning_attention"),
        ("parallel/groups.py", "from megatron.core import parallel_state"),
        ("megatron_m1/model/head.py", "from .config import ModelConfig"),
        ("megatron_m1/model/mcore.py", "from megatron.core.transformer import TransformerConfig"),
        ("megatron_m1/training/loop.py", "from parallel.checkpoint import CheckpointConfig"),
        ("megatron_m1/run.py", "from data_pipeline.config import build_dataset"),
        ("megatron_m1/run.py", "import os\nos.environ['A'] = '1'\nos.environ.setdefault('B', '2')"),
        ("parallel/launch.py", "import os\nos.environ['RANK']"),
    ],
)
def test_the_walk_allows(path, source):
    assert not faults_of(path, source)
