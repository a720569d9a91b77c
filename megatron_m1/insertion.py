"""What a run does when gradients explode behind a length jump: back to the start of the stage, then on another way.

The run file stays as the user wrote it. Every answer is one entry of `length_jumps.json` in the run directory, with
all values of the stage it inserts, so that the stages of a run are a function of run file and this file alone, and a
killed run finds its place. An entry is written before anything is undone and marked as done after it: a run killed in
between undoes the rest when it starts again. A checkpoint also holds the run file with the inserted stages in it.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.config import StageConfig
from megatron_m1.config import RunConfig
from megatron_m1.longcontext.jump import Explosion
from megatron_m1.stages import Stage
from megatron_m1.training.health import forget_refused
from parallel import manifest

ANSWERS_NAME = "length_jumps.json"


class JumpFailed(RuntimeError):
    """Gradients exploded behind a length jump, and the run has no answer left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One explosion and what the run does about it."""

    stage: str
    """Name of the stage in which it happened."""
    step: int
    """Step that showed it."""
    back_to: int
    """Step of the checkpoint that the run goes back to: the last one before the stage."""
    why: list[str]
    growth: dict[str, float]
    """Growth of the gradient norm by part of the model; infinite ones as 1e308, which JSON can hold."""
    inserted: dict[str, Any] | None
    """The stage to take first, all its values; None where only the rate is lowered."""
    schedule: dict[str, Any]
    """Schedule of the exploded stage from now on."""
    is_done: bool = False
    """Whether what the stage left has been removed."""


def read_answers(run_dir: Path) -> list[Answer]:
    """Every answer of a run, in the order they were given."""
    path = run_dir / ANSWERS_NAME
    if not path.is_file():
        return []
    return [Answer(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def with_answers(config: RunConfig, answers: Sequence[Answer]) -> RunConfig:
    """The run with its answers: stages inserted, rates lowered.

    Raises:
        ValueError: the result is not a legal run, or has not the stages that the answers speak of.
    """
    if not answers:
        return config
    values = config.model_dump(mode="json")
    stages = values["stages"]
    for answer in answers:
        names = [stage["name"] for stage in stages]
        if answer.stage not in names:
            raise ValueError(
                f"{config.run_dir / ANSWERS_NAME} speaks of stage {answer.stage!r}, the run file has {names}: answers "
                "belong to the stages they were given in; give the stage its name back, or start anew with --fresh"
            )
        place = names.index(answer.stage)
        stages[place] = stages[place] | {"schedule": answer.schedule}
        if answer.inserted is not None:
            stages.insert(place, answer.inserted)
    return RunConfig.model_validate_json(json.dumps(values), strict=True)


def plan_answer(config: RunConfig, stage: Stage, explosion: Explosion, *, num_before: int) -> Answer:
    """What to do about an explosion: a function of its arguments, so that all ranks plan the same.

    Args:
        config: the run with its answers so far.
        stage: in which it happened; not the first one.
        explosion: what was seen.
        num_before: answers given so far.

    Raises:
        JumpFailed: the policy or the lengths allow no answer.
    """
    policy = config.length_jump
    told = " | ".join(explosion.sentences())
    if policy.answer == "stop" or num_before >= policy.most_answers:
        reason = (
            "length_jump.answer=stop"
            if policy.answer == "stop"
            else f"{num_before} answers were given already"
        )
        raise JumpFailed(
            f"stage {stage.name!r}: {told} | {reason}: lower its learning rate or put a stage before it"
        )
    lowered = _lowered(stage, policy.rate_factor)
    inserted = _stage_before(config, stage, lowered) if policy.answer == "insert" else None
    if inserted is None and policy.rate_factor == 1:
        raise JumpFailed(
            f"stage {stage.name!r}: {told} | no length lies between it and the stage before, and "
            "length_jump.rate_factor=1: set it below 1"
        )
    return Answer(
        stage=stage.name,
        step=explosion.step,
        back_to=stage.first.step,
        why=explosion.sentences(),
        growth={name: min(value, 1e308) for name, value in explosion.growth.items()},
        inserted=inserted,
        schedule=config.stages[stage.index].schedule | lowered,
    )


def _lowered(stage: Stage, factor: float) -> dict[str, Any]:
    """Every rate of the stage's schedule, times a factor."""
    schedule = stage.config.schedule
    return {
        "peak_learning_rate": schedule.peak_learning_rate * factor,
        "min_learning_rate": schedule.min_learning_rate * factor,
        "plateaus": [
            asdict(plateau) | {"learning_rate": plateau.learning_rate * factor}
            for plateau in schedule.plateaus
        ],
    }


def _stage_before(config: RunConfig, stage: Stage, lowered: dict[str, Any]) -> dict[str, Any] | None:
    """A stage of intermediate length that prepares another one; None where no length lies between."""
    shorter = config.of_stage(stage.index - 1)
    own = stage.config
    length = intermediate_length(
        shorter.training.sequence_length,
        own.training.sequence_length,
        math.lcm(own.layout.token_shares, config.data.document_multiple),
    )
    if length is None:
        return None
    rows = own.training.micro_batch_size * own.layout.dp
    batch_tokens = (
        max(1, round(own.schedule.batch_ramp[0].global_batch_tokens / (length * rows))) * length * rows
    )
    tokens = (stage.last.consumed_tokens - stage.first.consumed_tokens) * config.length_jump.token_share
    steps = max(1, math.ceil(tokens / batch_tokens))
    schedule = lowered | {
        "warmup_steps": min(own.schedule.warmup_steps, steps - 1),
        "warmup_tokens": 0,
        "constant_tokens": 0,
        "constant_steps": 0,
        "plateaus": [],
        "decay": "none",
        "decay_tokens": 0,
        "decay_steps": 0,
        "batch_ramp": [{"from_tokens": 0, "global_batch_tokens": batch_tokens}],
    }
    overrides = config.stages[stage.index]
    base = math.sqrt(shorter.model.rotary_base * own.model.rotary_base)
    # the late part of a mix belongs to the whole length alone
    mix = None if overrides.mix is None else asdict(StageConfig(weights=overrides.mix.weights))
    return {
        **asdict(overrides),
        "name": f"{length} before {stage.name}",
        "mix": mix,
        "model": overrides.model | {"rotary_base": base},
        "training": overrides.training | {"sequence_length": length, "steps": steps},
        "schedule": schedule,
    }


def intermediate_length(shorter: int, longer: int, multiple: int) -> int | None:
    """The multiple strictly between two row lengths whose ratios to both are the most alike, None without one."""
    middle = math.sqrt(shorter * longer)
    near = {math.floor(middle / multiple) * multiple, math.ceil(middle / multiple) * multiple}
    between = [length for length in near if shorter < length < longer]
    return min(between, key=lambda length: abs(math.log(length / middle)), default=None)


class Answers:
    """The answers of a run on all ranks; every method is collective."""

    def __init__(self, run_dir: Path) -> None:
        """Read them, as rank 0 sees them, and undo what a killed life had still to undo."""
        self._run_dir = run_dir
        shared = [read_answers(run_dir) if dist.get_rank() == 0 else []]
        dist.broadcast_object_list(shared, src=0)
        self.given: list[Answer] = shared[0]
        if self.given and not self.given[-1].is_done:
            self._undo()

    def give(self, answer: Answer) -> None:
        """Write an answer down and go back to where its stage began; no save may be in flight."""
        self.given.append(answer)
        self._write()
        self._undo()

    def _undo(self) -> None:
        if dist.get_rank() == 0:
            undo(self._run_dir, self.given[-1].back_to)
        self.given[-1] = replace(self.given[-1], is_done=True)
        self._write()
        dist.barrier()

    def _write(self) -> None:
        if dist.get_rank() == 0:
            write_answers(self._run_dir, self.given)


def write_answers(run_dir: Path, answers: Sequence[Answer]) -> None:
    """Replace the file of answers as one action."""
    content = json.dumps([asdict(answer) for answer in answers], indent=1, allow_nan=False)
    manifest.write_durably(run_dir / ANSWERS_NAME, content.encode())


def undo(run_dir: Path, back_to: int) -> None:
    """Remove what a stage left behind its start: checkpoints, and the list of its refused steps. May be repeated."""
    checkpoints = run_dir / "checkpoints"
    manifest.end_timeline(checkpoints)
    for entry in reversed(manifest.list_checkpoints(checkpoints)):
        # the newest first: a life that starts half-way must not find one of the branch that was given up
        if entry.step > back_to:
            manifest.remove(checkpoints, entry.step, secrets.token_hex(4))
    forget_refused(run_dir, back_to)
