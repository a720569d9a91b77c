"""The fault campaign: `python -m tests.faults --runs 20 --seed 1` (a night: `--runs 200`).

Every run gets one fault at a random moment and is started again until it is finished. Then it must be the undisturbed
run, bit for bit: no sample lost, no number wrong, no step repeated from before the newest complete save. Prints the
table of BENCHMARKS.md; exits 1 where something was lost, wrong or not noticed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.config import DataConfig
from megatron_m1.training.spool import read_steps
from tests.faults.kinds import KINDS, SAVE_EVERY, STEPS, Trial, can_run
from tests.faults.life import Life
from tests.training.lives import assert_same_run, steps_by_life
from tests.training.tiny_run import SMALLEST, data_in, write_run_file, write_shards

MOST_LIVES = 6
NUMBERS = ("loss_nats", "grad_norm", "learning_rate", "auxiliary_loss")


@dataclass(slots=True)
class Row:
    """What is known of one kind of fault."""

    runs: int = 0
    detected: int = 0
    most_repeated: int = 0
    lost: int = 0
    wrong: int = 0
    unfinished: int = 0

    @property
    def clean(self) -> bool:
        """Nothing lost, nothing wrong, everything noticed."""
        return self.detected == self.runs and not (self.lost or self.wrong or self.unfinished)


def campaign(runs: int, seed: int, directory: Path, kinds: list[str]) -> dict[str, Row]:
    """Run the campaign in a directory; what became of each kind."""
    write_shards(directory)
    data = data_in(directory)
    whole = directory / "undisturbed" / "run"
    codes = Life(_run_file(whole, data), directory / "undisturbed" / "logs").wait()
    assert codes == [0] * len(codes), (directory / "undisturbed" / "logs" / "rank0.log").read_text()
    rows = {name: Row() for name in kinds}
    for number in range(runs):
        name = kinds[number % len(kinds)]
        place = directory / f"run{number}"
        try:
            _one(name, random.Random(f"{seed}.{number}"), place, data, whole, rows[name])
        except Exception as error:
            print(f"run {number}, {name}, seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
            rows[name].unfinished += 1
            continue
        if rows[name].clean:
            shutil.rmtree(place)
    return rows


def _one(name: str, chance: random.Random, place: Path, data: DataConfig, whole: Path, row: Row) -> None:
    row.runs += 1
    place.mkdir()
    shard = place / "train"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data.sources[0].prefix}{suffix}", f"{shard}{suffix}")
    trial = Trial(
        run_file=_run_file(place / "run", data, shard), run_dir=place / "run", shard=shard, random=chance
    )
    KINDS[name](trial)
    outcome = trial.run_dir / "outcome.txt"
    while not (outcome.exists() and outcome.read_text().startswith("finished")):
        assert trial.lives < MOST_LIVES, f"not finished after {trial.lives} lives"
        trial.start().wait()
    row.detected += trial.detected
    if not trial.detected:
        print(f"{name}: not noticed; see {place}", file=sys.stderr)
    lives = steps_by_life(trial.run_dir)
    for before, after in zip(lives, lives[1:], strict=False):
        if before[1]:
            row.most_repeated = max(row.most_repeated, before[1][-1] - after[0])
    row.lost += _lost(trial, whole)
    row.wrong += _wrong(trial, whole)


def _lost(trial: Trial, whole: Path) -> int:
    """Steps that did not read the samples they should have."""
    ours, theirs = read_steps(trial.run_dir / "metrics.jsonl"), read_steps(whole / "metrics.jsonl")
    return sum(
        ours.get(step, {}).get("sample_ids_hash") != values["sample_ids_hash"]
        for step, values in theirs.items()
    )


def _wrong(trial: Trial, whole: Path) -> int:
    """1 where the run is not the undisturbed one, bit for bit; after a refused step it may only be so before it."""
    if not trial.refused:
        try:
            assert_same_run(trial.run_dir, whole, steps=STEPS)
        except AssertionError as error:
            print(f"wrong: {error}", file=sys.stderr)
            return 1
        return 0
    ours, theirs = read_steps(trial.run_dir / "metrics.jsonl"), read_steps(whole / "metrics.jsonl")
    before = [step for step in theirs if step < min(trial.refused)]
    finite = all(
        isinstance(ours[step]["loss_nats"], float) and ours[step]["loss_nats"] < 100 for step in ours
    )
    return int(
        not finite or any(ours[step][name] != theirs[step][name] for step in before for name in NUMBERS)
    )


def _run_file(run_dir: Path, data: DataConfig, shard: Path | None = None) -> Path:
    """The smallest run, on shards of its own."""
    if shard is not None:
        data = replace(data, sources=(replace(data.sources[0], prefix=str(shard)),))
    return write_run_file(run_dir, data, steps=STEPS, checkpoint={"every_steps": SAVE_EVERY}, **SMALLEST)


def is_good(name: str, row: Row) -> bool:
    """Whether a kind lost nothing, changed nothing, was noticed, and repeated no more than it must."""
    # the newest save may still be in flight; a damaged checkpoint costs one more
    # and steps that follow a broken one are taken again from before it
    allowed = (3 if name in ("bit_flip", "corrupted_manifest", "broken_weights") else 2) * SAVE_EVERY
    return row.clean and row.most_repeated <= allowed


def table(rows: dict[str, Row]) -> str:
    """The rows of BENCHMARKS.md."""
    lines = [
        "| fault | runs | detected | most steps repeated | data lost | wrong results |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        fault = name.replace("_", " ")
        lines.append(
            f"| {fault} | {row.runs} | {row.detected} | {row.most_repeated} | {row.lost} | {row.wrong} |"
        )
    return "\n".join(lines)


def main() -> int:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--runs", type=int, default=20)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--only", choices=[name for name in KINDS if can_run(name)], action="append")
    chosen = options.parse_args()
    kinds = chosen.only or [name for name in KINDS if can_run(name)]
    directory = Path(tempfile.mkdtemp(prefix="m1faults"))
    rows = campaign(chosen.runs, chosen.seed, directory, kinds)
    print(table(rows))
    all_good = all(is_good(name, row) for name, row in rows.items())
    if all_good:
        shutil.rmtree(directory)
    else:
        print(f"what is not as it should be lies in {directory}", file=sys.stderr)
    for name in KINDS:
        if not can_run(name):
            print(f"{name} was left out: it needs root", file=sys.stderr)
    return 0 if all_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
