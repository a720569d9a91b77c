"""What the ranks of the tests of node-local copies do: four ranks, two of them on each of the nodes n0 and n1."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel import manifest, parcels
from parallel.checkpoint_config import LocalConfig
from parallel.groups import Groups, destroy_groups
from parallel.layout import Layout
from parallel.local_copies import LocalCopies
from parallel.local_shard import directory_of
from parallel.manifest import step_path
from tests.parallel.checkpoint_ranks import Trainer, start, whole_state

LAYOUT = Layout(tp=2, dp=2, ep=2)
SAVED_STEPS, LAST_STEP = (1, 3, 5), 8
Damage = Callable[[Callable[[str, int, int], Path]], None]
"""Changes copies on disk; is given the path of a shard by node, rank and step."""


def delete(shard: Path) -> None:
    shutil.rmtree(shard)


def flip_a_bit(shard: Path) -> None:
    content = bytearray((shard / "state.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (shard / "state.bin").write_bytes(content)


def lose_node(of: Callable[[str, int, int], Path]) -> None:
    shutil.rmtree(of("n1", 2, 5).parent.parent)


def lose_peer_copies(of: Callable[[str, int, int], Path]) -> None:
    for rank in (0, 1):
        shutil.rmtree(of("n1", rank, 5).parent)


def lose_both(of: Callable[[str, int, int], Path]) -> None:
    for node in ("n0", "n1"):
        shutil.rmtree(of(node, 3, 5).parent)


def lose_newest_on_both(of: Callable[[str, int, int], Path]) -> None:
    for node in ("n0", "n1"):
        delete(of(node, 3, 5))


def corrupt_own(of: Callable[[str, int, int], Path]) -> None:
    flip_a_bit(of("n1", 2, 5))


def corrupt_both(of: Callable[[str, int, int], Path]) -> None:
    for node in ("n0", "n1"):
        flip_a_bit(of(node, 2, 5))


def tear(of: Callable[[str, int, int], Path]) -> None:
    """As a crash in the middle of a write leaves them, if renames were not atomic."""
    (of("n1", 2, 5) / "manifest.json").unlink()
    with (of("n0", 0, 5) / "state.bin").open("rb+") as stream:
        stream.truncate(100)


def leave_unfinished(of: Callable[[str, int, int], Path]) -> None:
    """Node n1 died before it had written step 5, and n0 before it had what n1 sent."""
    for node in ("n0", "n1"):
        for rank in (2, 3):
            shard = of(node, rank, 5)
            shard.rename(shard.with_name(f"{shard.name}.partial-abcd"))


def mix_lives(of: Callable[[str, int, int], Path]) -> None:
    """Half of step 5 is of another life."""
    for node in ("n0", "n1"):
        for rank in (2, 3):
            shard = of(node, rank, 5)
            found = manifest.read_manifest(shard)
            found.extra["life"] = "another"
            manifest.write_manifest(shard, found)


DAMAGES: dict[str, Damage] = {
    action.__name__: action
    for action in (
        lose_node, lose_peer_copies, lose_both, lose_newest_on_both, corrupt_own, corrupt_both, tear, leave_unfinished,
        mix_lives,
    )
} | {"nothing": lambda _: None}  # fmt: skip


class Heard(logging.Handler):
    """What this rank has been warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("parallel.local_copies").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def open_copies(
    directory: str, groups: Groups, run_dir: str, *, asynchronous: bool = False, **options: Any
) -> LocalCopies:
    config = LocalConfig(directory=directory, **options)
    # as the store of the shared checkpoints has made it
    (Path(run_dir) / "checkpoints").mkdir(parents=True, exist_ok=True)
    return LocalCopies(config, Path(run_dir), groups, asynchronous=asynchronous)


def place_on_node() -> None:
    os.environ["SLURMD_NODENAME"] = f"n{dist.get_rank() // 2}"


def on_first_rank(action: Callable[[], Any]) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def save_in_background(copies: LocalCopies, step: int, trainer: Trainer) -> None:
    copies.save(step, trainer.state(), {"position": step})
    while copies.writing:
        time.sleep(0.01)
    dist.barrier()


def damaged_and_resumed(directory: str) -> dict[str, Any]:
    """Steps 1, 3 and 5 are saved and five more taken; then each damage, a start, and the same steps again."""
    place_on_node()
    # so that every shard is sent in many pieces
    parcels._PIECE_BYTES = 4096
    trainer, run_dir = start(LAYOUT, torch.bfloat16), f"{directory}/run"
    copies = open_copies(f"{directory}/local", trainer.groups, run_dir, asynchronous=True)
    found: dict[str, Any] = {}
    for step in range(1, LAST_STEP + 1):
        trainer.train(step, step)
        if step in SAVED_STEPS:
            found[step] = whole_state(trainer)
            save_in_background(copies, step, trainer)
    found["straight"] = whole_state(trainer)
    found["kept"] = [str(path.relative_to(f"{directory}/local")) for path in _shards(f"{directory}/local")]
    found["after"] = {name: _after(directory, name, trainer, run_dir) for name in DAMAGES}
    destroy_groups()
    return found


def _shards(directory: str) -> list[Path]:
    return sorted(Path(directory).glob("*/*/*/rank_*/step_*"))


def _after(directory: str, name: str, trainer: Trainer, run_dir: str) -> dict[str, Any]:
    local = f"{directory}/{name}"
    timeline = manifest.timeline(Path(run_dir) / "checkpoints")

    def of(node: str, rank: int, step: int) -> Path:
        root = directory_of(Path(local), node, Path(run_dir)) / timeline
        return step_path(root / f"rank_{rank:05d}", step)

    on_first_rank(lambda: (shutil.copytree(f"{directory}/local", local), DAMAGES[name](of)))
    heard = Heard()
    copies = open_copies(local, trainer.groups, run_dir)
    step = copies.bring(0)
    found: dict[str, Any] = {"step": step, "left": [str(path.relative_to(local)) for path in _shards(local)]}
    if step is not None:
        found["extra"] = trainer.load(copies, step)
        found["loaded"] = whole_state(trainer)
        trainer.train(step + 1, LAST_STEP)
        found["trained on"] = whole_state(trainer)
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, heard.texts)
    logging.getLogger("parallel.local_copies").removeHandler(heard)
    return found | {"heard": by_rank}


def small_cases(directory: str) -> dict[str, Any]:
    """What can be seen without training."""
    place_on_node()
    trainer, run_dir = start(LAYOUT, torch.float32), f"{directory}/run"
    groups = trainer.groups
    found: dict[str, Any] = {}
    copies = open_copies(f"{directory}/local", groups, run_dir)
    for step in (1, 2):
        copies.save(step, trainer.state(), {})
    found["below the shared one"] = copies.bring(3)
    copies.save(4, trainer.state(), {})
    found["as new as the shared one"] = open_copies(f"{directory}/local", groups, run_dir).bring(4)
    found["of another run"] = open_copies(f"{directory}/local", groups, f"{directory}/other").bring(0)

    heard = Heard()
    full = open_copies(f"{directory}/local", groups, run_dir)
    # no file of this rank may be larger: as on a full disk, the write fails
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    full.save(6, trainer.state(), {})
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    found["partial"] = [path.name for path in Path(f"{directory}/local").glob("*/*/*/*/*.partial-*")]
    full.save(8, trainer.state(), {})
    found["after a full disk"] = heard.texts
    logging.getLogger("parallel.local_copies").removeHandler(heard)
    found["newest"] = open_copies(f"{directory}/local", groups, run_dir).bring(0)

    on_first_rank(lambda: manifest.end_timeline(Path(run_dir) / "checkpoints"))
    found["on another way"] = open_copies(f"{directory}/local", groups, run_dir).bring(0)
    found["left of the way before"] = len(_shards(f"{directory}/local"))
    found |= _broken_disks(directory, run_dir, trainer)
    alone = open_copies(f"{directory}/alone", groups, run_dir, peer=False)
    alone.save(1, trainer.state(), {})
    dist.barrier()
    found["without a peer"] = [
        str(path.relative_to(f"{directory}/alone")) for path in _shards(f"{directory}/alone")
    ]
    destroy_groups()
    other = start(Layout(tp=4), torch.float32)
    found["of another layout"] = open_copies(f"{directory}/alone", other.groups, run_dir).bring(0)
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, found["after a full disk"])
    destroy_groups()
    return found | {"after a full disk": by_rank}


def _broken_disks(directory: str, run_dir: str, trainer: Trainer) -> dict[str, Any]:
    """A file where node n1's directory should be; then one where everybody's should be."""
    place, heard, refused = Path(f"{directory}/broken"), Heard(), ""
    on_first_rank(lambda: (place.mkdir(), (place / "n1").touch()))
    copies = open_copies(str(place), trainer.groups, run_dir)
    copies.save(1, trainer.state(), {})
    copies.save(2, trainer.state(), {})
    dist.barrier()
    found = {"on n0 alone": sorted(path.parent.name for path in _shards(str(place)))}
    found["with one broken disk"] = copies.bring(0)
    try:
        open_copies(str(place / "n1"), trainer.groups, run_dir)
    except manifest.CheckpointError as error:
        refused = str(error)
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, [text.partition(":")[0] for text in heard.texts])
    logging.getLogger("parallel.local_copies").removeHandler(heard)
    return found | {"told of broken disks": by_rank, "refused": refused}
