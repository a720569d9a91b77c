"""The stages of a run: what each is made of, and where in the run it begins and ends.

A run without `stages` is one stage. Otherwise every stage is the run file with its own sections laid over it: longer
rows, another rotary base, another layout, its own schedule. Steps, samples and tokens count through the whole run, so
its data is one sequence in which each document comes as often as it should; batch ramp and learning rate begin anew
with each stage. A stage of kind `rl` reads no rows: samples and tokens of the data stand still in it. Everything here
is a function of the run file alone, so that a killed run finds its place again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data_pipeline.config import DataConfig, StageConfig
from megatron_m1.config import RunConfig
from megatron_m1.model.config import ModelConfig
from megatron_m1.training.position import Position
from megatron_m1.training.schedule import global_batch_samples, tokens_after_steps

FREE_TO_CHANGE = ("rotary_base", "auxiliary_coefficient", "capacity_factor", "experts")
"""Fields of the model that a stage may set: the others decide the shape or the meaning of its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of a run, resolved."""

    index: int
    name: str
    config: RunConfig
    """The run as this stage sees it."""
    data: DataConfig
    """The data of the WHOLE run, with the mix of every stage."""
    sequence_lengths: tuple[int, ...]
    """Tokens per row, by mix of the data."""
    num_mixes: int
    """Mixes of the data that have begun when this stage ends."""
    first: Position
    """Where it begins."""
    last: Position
    """Where it ends."""
    kind: Literal["train", "rl"] = "train"
    """Whether it learns from rows of the data or from its own samples."""


def stages_of(config: RunConfig) -> list[Stage]:
    """All stages of a run, in order.

    Raises:
        ValueError: stages that do not follow from each other, with what to change.
    """
    if not config.stages:
        length = config.training.sequence_length
        lengths = (length,) * max(1, len(config.data.stages))
        return [
            Stage(
                index=0,
                name="train",
                config=config,
                data=config.data,
                sequence_lengths=lengths,
                num_mixes=len(lengths),
                first=Position(),
                last=_length(config),
            )
        ]
    configs = [config.of_stage(index) for index in range(len(config.stages))]
    _check_order(config, configs)
    if config.data.stages:
        raise ValueError(
            f"data.stages has {len(config.data.stages)} entries and the run has {len(config.stages)} stages: only one "
            "of the two says how the mix changes; move each mix into its stage as stages.N.mix"
        )
    data, lengths = _data_of_run(config, configs)
    found: list[Stage] = []
    for index, (stage, part) in enumerate(zip(config.stages, configs, strict=True)):
        first = found[-1].last if found else Position()
        own = Position(step=part.training.steps) if stage.kind == "rl" else _length(part)
        found.append(
            Stage(
                index=index,
                name=stage.name,
                config=part,
                data=data,
                sequence_lengths=lengths,
                # a stage of kind rl is the last one: all mixes have begun before it
                num_mixes=min(index + 1, len(lengths)),
                first=first,
                last=Position(
                    first.step + own.step,
                    first.consumed_samples + own.consumed_samples,
                    first.consumed_tokens + own.consumed_tokens,
                ),
                kind=stage.kind,
            )
        )
    return found


def _data_of_run(config: RunConfig, configs: Sequence[RunConfig]) -> tuple[DataConfig, tuple[int, ...]]:
    """The data with the mix of every stage that reads rows, and their tokens per row."""
    readers = [
        (stage, part) for stage, part in zip(config.stages, configs, strict=True) if stage.kind == "train"
    ]
    sections = []
    for stage, part in readers:
        # the last one too has its end, which decides which rows are read before it: so another may follow it, even
        # when the run was thought to be over
        mix = stage.mix or StageConfig()
        sections.append(dataclasses.replace(mix, tokens=_length(part).consumed_tokens))
    data = dataclasses.replace(config.data, stages=tuple(sections))
    return data, tuple(part.training.sequence_length for _, part in readers)


def _length(config: RunConfig) -> Position:
    """Steps, samples and tokens of one stage."""
    samples = 0
    length = config.training.sequence_length
    for _ in range(config.training.steps):
        samples += global_batch_samples(config.schedule, samples * length, length, 1)
    return Position(config.training.steps, samples, samples * length)


def _check_order(config: RunConfig, configs: Sequence[RunConfig]) -> None:
    """What must hold from one stage to the next."""
    names = [stage.name for stage in config.stages]
    if len(set(names)) < len(names):
        raise ValueError(f"stages are named {names}: every name stands once; rename one of them")
    kinds = [stage.kind for stage in config.stages]
    if "rl" in kinds[:-1] or kinds == ["rl"]:
        raise ValueError(
            f"stages {names} are of kinds {kinds}: only the last of two or more may be of kind 'rl', since it goes on "
            "from trained weights; move it to the end, behind a stage of kind 'train'"
        )
    for stage in config.stages:
        if stage.kind == "rl" and stage.mix is not None:
            raise ValueError(
                f"stage {stage.name!r} is of kind 'rl' and has a mix: it reads no rows; remove mix, and weigh its "
                "prompts by rl.curriculum"
            )
    for before, after, name in zip(configs, configs[1:], names[1:], strict=False):
        for field in dataclasses.fields(ModelConfig):
            old, new = getattr(before.model, field.name), getattr(after.model, field.name)
            if old != new and field.name not in FREE_TO_CHANGE:
                raise ValueError(
                    f"stage {name!r} has model.{field.name}={new} after {old}: the weights go on from the stage "
                    f"before; a stage may change {', '.join(FREE_TO_CHANGE)} of the model; set it for all stages"
                )
        if after.model.rotary_base < before.model.rotary_base:
            raise ValueError(
                f"stage {name!r} has model.rotary_base={after.model.rotary_base:g} after {before.model.rotary_base:g}: "
                "positions would turn faster than what the model has learned; keep "
                f"{before.model.rotary_base:g} or raise it"
            )
        if before.training.precision != after.training.precision:
            raise ValueError(
                f"stage {name!r} has training.precision={after.training.precision} after "
                f"{before.training.precision}: weights are stored as they are trained; set one precision for all stages"
            )
    for part, name in zip(configs, names, strict=True):
        _check_warmup(part, name)


def _check_warmup(config: RunConfig, name: str) -> None:
    """Raises: ValueError for a stage that ends before its warm-up does."""
    steps, schedule = config.training.steps, config.schedule
    if steps <= schedule.warmup_steps:
        raise ValueError(
            f"stage {name!r} has training.steps={steps} and schedule.warmup_steps={schedule.warmup_steps}: a stage is "
            f"longer than its warm-up; take at least {schedule.warmup_steps + 1} steps, or a warm-up of at most "
            f"{steps - 1}"
        )
    tokens = tokens_after_steps(schedule, steps)
    if schedule.warmup_tokens and tokens <= schedule.warmup_tokens:
        raise ValueError(
            f"stage {name!r} has {tokens} tokens and schedule.warmup_tokens={schedule.warmup_tokens}: a stage is "
            f"longer than its warm-up; take more training.steps, or a warm-up of at most {tokens - 1} tokens"
        )
