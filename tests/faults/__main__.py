"""The fault campaign: `python -m tests.faults --runs 20 --seed 1` (a night: `--runs 200`).

Every run gets one fault at a random moment and is started again until it is finished. Then it must be the undisturbed
run, bit for bit: no sample lost, no number wrong, no step repeated from before the newest complete save. Prints the
table of BENCHMARKS.md; exits 1 where something was lost, wrong or not noticed.

A night can be had in slices: with `--record FILE` each run's outcome is kept there, and the same command goes on after
the last one; `--minutes M` begins no run after so long, and exits 3 while there are runs left.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_pipeline.config import DataConfig
from megatron_m1.training.spool import read_steps
from tests.faults.kinds import KINDS, SAVE_EVERY, STEPS, Trial, can_run
from tests.faults.life import Life
from tests.training.lives import assert_same_run, steps_by_life
from tests.training.tiny_run import SMALLEST, data_in, write_run_file, write_shards

MOST_LIVES = 6
NUMBERS = ("loss_nats", "grad_norm", "learning_rate", "auxiliary_loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one run."""

    number: int
    seed: int
    kind: str
    finished: bool
    """Whether it came to its end within MOST_LIVES."""
    detected: bool = False
    repeated: int = 0
    """Most steps that one of its lives took again."""
    lost: int = 0
    wrong: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is known of one kind of fault."""

    kind: str
    outcomes: tuple[Outcome, ...]

    def count(self, name: str) -> int:
        """The sum of a number over all runs."""
        return sum(getattr(outcome, name) for outcome in self.outcomes)

    @property
    def most_repeated(self) -> int:
        """Most steps that any life took again."""
        return max((outcome.repeated for outcome in self.outcomes), default=0)

    @property
    def good(self) -> bool:
        """Nothing lost, nothing changed, everything noticed, and no more repeated than must be."""
        # the newest save may still be in flight; a damaged checkpoint costs one more
        # and steps that follow a broken one are taken again from before it
        saves = 3 if self.kind in ("bit_flip", "corrupted_manifest", "broken_weights") else 2
        noticed = all(outcome.finished and outcome.detected for outcome in self.outcomes)
        return (
            noticed
            and not (self.count("lost") or self.count("wrong"))
            and self.most_repeated <= saves * SAVE_EVERY
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """Which runs there are and where they are kept."""

    runs: int
    seed: int
    kinds: Sequence[str]
    directory: Path
    """For the runs; those of which something is not as it should be stay there."""
    record: Path | None = None
    """One JSON line per outcome; runs that are on record are not made again."""
    begin_until_s: float = float("inf")
    """Monotonic time after which no run begins."""

    def run(self) -> tuple[list[Row], int]:
        """Make the runs that are still to be made; the rows by kind, and how many runs are left."""
        outcomes = self._recorded()
        left = [number for number in range(self.runs) if number not in outcomes]
        if left:
            data, whole = self._prepare()
        while left and time.monotonic() < self.begin_until_s:
            number = left.pop(0)
            outcomes[number] = self._outcome(number, data, whole)
            if self.record is not None:
                with self.record.open("a") as lines:
                    lines.write(json.dumps(asdict(outcomes[number])) + "\n")
        rows = [
            Row(kind=kind, outcomes=tuple(one for one in outcomes.values() if one.kind == kind))
            for kind in self.kinds
        ]
        return rows, len(left)

    def _kind(self, number: int) -> str:
        return self.kinds[number % len(self.kinds)]

    def _recorded(self) -> dict[int, Outcome]:
        if self.record is None or not self.record.exists():
            return {}
        found = {}
        for line in self.record.read_text().splitlines():
            outcome = Outcome(**json.loads(line))
            if (outcome.seed, outcome.kind) != (self.seed, self._kind(outcome.number)):
                raise ValueError(
                    f"{self.record} holds run {outcome.number} of seed {outcome.seed} with {outcome.kind}: it must be "
                    f"the record of seed {self.seed} with the same kinds; give it those, or use another file"
                )
            found[outcome.number] = outcome
        return found

    def _prepare(self) -> tuple[DataConfig, Path]:
        """The data of all runs, and the directory of the undisturbed one."""
        write_shards(self.directory)
        data = data_in(self.directory)
        whole, logs = self.directory / "undisturbed" / "run", self.directory / "undisturbed" / "logs"
        codes = Life(_run_file(whole, data), logs).wait()
        assert codes == [0] * len(codes), (logs / "rank0.log").read_text()
        return data, whole

    def _outcome(self, number: int, data: DataConfig, whole: Path) -> Outcome:
        kind, place = self._kind(number), self.directory / f"run{number}"
        key = {"number": number, "seed": self.seed, "kind": kind}
        chance = random.Random(f"{self.seed}.{number}")
        try:
            outcome = Outcome(**key, finished=True, **_disturbed(kind, chance, place, data, whole))
        except Exception as error:  # one run that ends so must not end the night
            print(f"run {number}, {kind}: {type(error).__name__}: {error}; see {place}", file=sys.stderr)
            return Outcome(**key, finished=False)
        if not outcome.detected:
            print(f"run {number}, {kind}: not noticed; see {place}", file=sys.stderr)
        if outcome.detected and not (outcome.lost or outcome.wrong):
            shutil.rmtree(place)
        return outcome


def _disturbed(
    kind: str, chance: random.Random, place: Path, data: DataConfig, whole: Path
) -> dict[str, int]:
    """Make one run with its fault and compare it with the undisturbed one."""
    place.mkdir()
    shard = place / "train"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data.sources[0].prefix}{suffix}", f"{shard}{suffix}")
    trial = Trial(
        run_file=_run_file(place / "run", data, shard), run_dir=place / "run", shard=shard, random=chance
    )
    KINDS[kind](trial)
    outcome = trial.run_dir / "outcome.txt"
    while not (outcome.exists() and outcome.read_text().startswith("finished")):
        assert trial.lives < MOST_LIVES, f"not finished after {trial.lives} lives"
        trial.start().wait()
    lives = steps_by_life(trial.run_dir)
    repeated = [taken[-1] - begun for (_, taken), (begun, _) in zip(lives, lives[1:], strict=False) if taken]
    return {
        "detected": trial.detected,
        "repeated": max(repeated, default=0),
        "lost": _lost(trial, whole),
        "wrong": _wrong(trial, whole),
    }


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


def table(rows: Sequence[Row]) -> str:
    """The rows of BENCHMARKS.md."""
    lines = [
        "| fault | runs | detected | most steps repeated | data lost | wrong results |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row.kind.replace("_", " "), len(row.outcomes), row.count("detected"), row.most_repeated, row.count("lost"),
            row.count("wrong"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    possible = [kind for kind in KINDS if can_run(kind)]
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--runs", type=int, default=20)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--only", choices=possible, action="append")
    options.add_argument("--record", type=Path)
    options.add_argument("--minutes", type=float, default=float("inf"))
    chosen = options.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="m1faults"))
    rows, num_left = Campaign(
        runs=chosen.runs,
        seed=chosen.seed,
        kinds=chosen.only or possible,
        directory=directory,
        record=chosen.record,
        begin_until_s=time.monotonic() + 60 * chosen.minutes,
    ).run()
    print(table(rows))
    for kind in KINDS.keys() - set(possible):
        print(f"{kind} was left out: it needs root", file=sys.stderr)
    if not all(row.good for row in rows):
        print(f"what is not as it should be lies in {directory}", file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    if num_left:
        print(f"{num_left} runs are left: the same command goes on", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
