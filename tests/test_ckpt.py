"""`m1 ckpt` tells the truth about real checkpoints: what is there, what is damaged, what differs, what may go."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megatron_m1 import cli
from parallel.checkpoint_config import LocalConfig
from parallel.local_copies import LocalCopies
from tests.parallel.checkpoint_failures import groups_of_all, open_store, state_of
from tests.spawn import run_ranks

pytestmark = pytest.mark.multiprocess


def save(directory: str, values: dict[int, float], rows: int) -> None:
    """One checkpoint per step; `rows` of the table per rank."""
    store = open_store(directory, groups_of_all(), asynchronous=False, keep=0)
    for step, value in values.items():
        store.save(step, state_of(value, rows), {"position": {"consumed_samples": 1000 * step}})


def save_copies(directory: str, run_dir: str) -> None:
    """Steps 8 and 9 on two nodes of one rank each."""
    os.environ["SLURMD_NODENAME"] = f"n{os.environ['RANK']}"
    config = LocalConfig(directory=directory)
    copies = LocalCopies(config, Path(run_dir), groups_of_all(), asynchronous=False)
    for step in (8, 9):
        copies.save(step, state_of(1.0, 8), {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2 alike, step 3 other values, from two ranks; step 4 from one rank."""
    run_dir = tmp_path_factory.mktemp("run")
    run_ranks(2, save, str(run_dir / "checkpoints"), {1: 1.0, 2: 1.0, 3: 2.0}, 64)
    run_ranks(1, save, str(run_dir / "checkpoints"), {4: 1.0}, 128)
    return run_dir


@pytest.fixture
def run_dir(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def m1(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["ckpt", *map(str, arguments)])


def step(run_dir: Path, number: int) -> Path:
    return run_dir / "checkpoints" / f"step_{number:08d}"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cells(result: Result) -> list[list[str]]:
    return [line.split() for line in result.stdout.splitlines()]


def test_ls_shows_complete_and_torn_ones(run_dir: Path) -> None:
    (step(run_dir, 2) / "manifest.json").unlink()
    lines = m1("ls", run_dir).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:5] if line.strip()][:2] == ["1", "2"]
    assert "1,000" in lines[1] and "dp2" in lines[1] and lines[1].rstrip().endswith("complete")
    assert "has no manifest.json" in lines[2]
    assert "1 rank" in m1("ls", step(run_dir, 4)).stdout


def test_ls_shows_the_node_local_copies_that_this_machine_sees(run_dir: Path, tmp_path: Path) -> None:
    assert "node-local" not in m1("ls", run_dir).stdout
    local = tmp_path / "local"
    run_ranks(2, save_copies, str(local), str(run_dir))
    (run_dir / "run.yaml").write_text(f"checkpoint: {{local: {{directory: '{local}'}}}}\n")
    shard = next(local.glob("n1/*/*/rank_00000/step_00000009"))
    (shard / "state.bin").write_bytes(b"")
    lines = cells(m1("ls", run_dir))
    begin = next(number for number, line in enumerate(lines) if line[:1] == ["node-local"])
    assert [line[:1] + line[2:] for line in lines[begin + 2 :]] == [
        ["8", "n0", "0", "1", "complete"],
        ["9", "n0", "0", "1", "complete"],
        ["8", "n1", "0", "1", "complete"],
        ["9", "n1", "0", "1", "torn:", "0"],
    ]


def test_verify_reads_everything_and_names_what_is_damaged(run_dir: Path) -> None:
    assert m1("verify", run_dir).exit_code == 0
    flip_a_bit(step(run_dir, 3) / "__1_0.distcp")
    # a file that no load reads
    flip_a_bit(step(run_dir, 3) / ".metadata")
    result = m1("verify", run_dir / "checkpoints")
    assert result.exit_code == 1
    said = result.stdout.replace("\n", "").replace(" ", "")
    assert "__1_0.distcphassha256" in said and ".metadatahassha256" in said
    assert [line[-1] for line in cells(result)[1:3]] == ["whole", "whole"]
    assert m1("verify", step(run_dir, 1)).exit_code == 0


def test_diff_finds_nothing_between_equal_ones_and_measures_what_differs(run_dir: Path) -> None:
    same = m1("diff", step(run_dir, 1), step(run_dir, 2))
    assert (same.exit_code, same.stdout.split()[0]) == (0, "0")
    other = m1("diff", step(run_dir, 1), step(run_dir, 3))
    assert other.exit_code == 1
    # bias: three times 1 against 2. table: halves of 1 and 2 against 2 and 3, so the RMS is 1 over sqrt(2.5)
    assert cells(other)[1:3] == [["bias", "1.000e+00", "1.000e+00"], ["table", "6.325e-01", "1.000e+00"]]
    # under another layout the second half of the table is 1 instead of 2: sqrt(0.5) over sqrt(2.5)
    (table,) = [line for line in cells(m1("diff", step(run_dir, 1), run_dir)) if line[0] == "table"]
    assert table == ["table", "4.472e-01", "1.000e+00"]


def test_diff_refuses_what_is_damaged(run_dir: Path) -> None:
    flip_a_bit(step(run_dir, 2) / "__0_0.distcp")
    result = m1("diff", step(run_dir, 1), step(run_dir, 2))
    assert "__0_0.distcp has checksum" in str(result.exception)


def test_prune_keeps_the_newest_complete_ones_and_always_a_whole_one(run_dir: Path) -> None:
    (step(run_dir, 3) / "manifest.json").unlink()
    flip_a_bit(step(run_dir, 4) / "__0_0.distcp")
    refused = m1("prune", run_dir, "--keep", 1)
    assert "are all damaged" in str(refused.exception)
    assert m1("prune", run_dir, "--keep", 2, "--dry-run").exit_code == 0
    assert step(run_dir, 1).exists()
    assert [line[-1] for line in cells(m1("prune", run_dir, "--keep", 2))[1:4]] == ["gone", "stays", "stays"]
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    # the torn one is evidence
    assert left == ["step_00000002", "step_00000003", "step_00000004"]
    assert "must be 1 or more" in str(m1("prune", run_dir, "--keep", 0).exception)


def test_a_place_without_checkpoints_is_refused(tmp_path: Path) -> None:
    assert "holds no checkpoint" in str(m1("ls", tmp_path).exception)
    assert "is no directory" in str(m1("ls", tmp_path / "none").exception)
