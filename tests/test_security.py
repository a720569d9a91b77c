"""What comes from outside is never unpickled, and no secret is written where others read."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from data_pipeline.clean.decontaminate import read_index
from data_pipeline.index import TokenShard
from megatron_m1 import cli
from megatron_m1.config import load_run
from megatron_m1.launch.site import Site
from parallel import manifest, pieces, stored_tensors
from parallel.checksum import Checksum
from tests.parallel.checkpoint_failures import groups_of_all, open_store, state_of
from tests.spawn import run_ranks
from tests.training.tiny_run import data_in, write_run_file, write_shards

SECRET = "correct-horse-battery"


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def plant(path: Path, mark: Path) -> None:
    """A bomb in the head of every record of a checkpoint, and in upstream's pickles; all hashes made to fit again."""
    table = stored_tensors.read_table(path)
    bomb = pickle.dumps(Bomb(mark))
    for entry in table.values():
        for row in entry["pieces"]:
            piece = pieces.Piece.of(row)
            shard = path / piece.file
            content = bytearray(shard.read_bytes())
            assert piece.data_start - piece.start >= len(bomb)
            content[piece.start : piece.start + len(bomb)] = bomb
            shard.write_bytes(content)
            row[-1] = _checksum(content, piece, entry["dtype"])
    (path / stored_tensors.TABLE_NAME).write_text(json.dumps(table))
    for name in (".metadata", "common.pt"):
        (path / name).write_bytes(bomb)
    old = manifest.read_manifest(path)
    files = tuple(
        manifest.FileRecord(
            record.name, (path / record.name).stat().st_size, manifest.sha256_of(path / record.name)
        )
        for record in old.files
    )
    about = {name: getattr(old, name) for name in ("step", "tensors_sha256", "layout", "versions", "extra")}
    manifest.write_manifest(path, manifest.Manifest(files=files, **about))


def _checksum(content: bytearray, piece: pieces.Piece, dtype: str) -> str:
    size = int(np.prod(piece.sizes)) * np.dtype(dtype).itemsize
    data_end = piece.data_start + size
    checksum = Checksum()
    checksum.add_short(bytes(content[piece.start : piece.data_start]))
    checksum.add_blocks(memoryview(bytes(content[piece.data_start : data_end])))
    checksum.add_short(bytes(content[data_end : piece.start + piece.length]))
    return checksum.hexdigest()


def load_what_an_attacker_left(directory: str) -> dict[str, Any]:
    """This rank's part."""
    store = open_store(directory, groups_of_all(), asynchronous=False)
    store.save(1, state_of(1.0, rows=64), {})
    mark = Path(directory) / "exploded"
    if dist.get_rank() == 0:
        plant(Path(directory) / "step_00000001", mark)
    dist.barrier()
    state, _ = store.load(1, state_of(-1.0, rows=64))
    return {"value": float(state["bias"][0]), "exploded": mark.exists()}


@pytest.mark.multiprocess
def test_pickles_inside_a_checkpoint_are_never_opened(tmp_path: Path) -> None:
    for found in run_ranks(2, load_what_an_attacker_left, str(tmp_path)):
        assert found == {"value": 1.0, "exploded": False}


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def test_data_readers_refuse_pickles(tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    array = np.empty(1, dtype=object)
    array[0] = Bomb(mark)
    np.save(tmp_path / "grams.npy", array, allow_pickle=True)
    (tmp_path / "grams.json").write_text('{"lengths": [8], "num_texts": 1, "num_too_short": 0}')
    with pytest.raises(ValueError):
        read_index(tmp_path / "grams")
    write_shards(tmp_path)
    for suffix in (".idx", ".bin"):
        (tmp_path / f"train{suffix}").write_bytes(pickle.dumps(Bomb(mark)) * 100)
    with pytest.raises(ValueError):
        TokenShard(tmp_path / "train")
    assert not mark.exists()


def test_a_password_in_the_tracking_uri_is_refused_and_not_shown(tmp_path: Path) -> None:
    write_shards(tmp_path)
    run_file = write_run_file(
        tmp_path / "run", data_in(tmp_path), steps=1, tracking={"uri": f"https://me:{SECRET}@host/x"}
    )
    result = CliRunner().invoke(cli.app, ["train", str(run_file)])
    assert isinstance(result.exception, ValueError)
    assert "tracking.uri holds a password" in str(result.exception)
    assert SECRET not in str(result.exception) + result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY"]
)
def test_a_secret_does_not_get_into_a_batch_script(name: str) -> None:
    with pytest.raises(ValueError, match="looks like a secret") as caught:
        Site(environment={name: SECRET})
    assert SECRET not in str(caught.value)


def test_an_ordinary_variable_is_no_secret() -> None:
    assert Site(environment={"TOKENIZERS_PARALLELISM": "false", "NCCL_DEBUG": "WARN"}).environment


@pytest.mark.parametrize("name", ["$(touch pwned)", "`touch pwned`", 'a "run"', "it's", "../up", "-x", ""])
def test_a_run_name_that_a_shell_or_a_path_could_read_otherwise_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^name="):
        load_run("tiny", [f"name={json.dumps(name)}"])
