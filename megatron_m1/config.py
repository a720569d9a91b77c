"""The typed run file: which sections a run has, how presets, file and overrides become one `RunConfig`,
cross-checks.

Each section is a frozen dataclass beside the code it configures and checks itself; whatever needs two
sections is checked here, in `check_across_sections`. How YAML is read is megatron_m1/runfile.py.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_pipeline.config import DataConfig, StageConfig
from megatron_m1 import runfile
from megatron_m1.longcontext.config import LongContextConfig
from megatron_m1.longcontext.jump import LengthJumpConfig
from megatron_m1.model.config import ModelConfig
from megatron_m1.rl.config import RLConfig
from megatron_m1.training.config import OptimizerConfig, TrainingConfig
from megatron_m1.training.health import HealthConfig
from megatron_m1.training.schedule import ScheduleConfig, check_batch_ramp
from megatron_m1.training.tracking import TrackingConfig
from parallel.checkpoint_config import CheckpointConfig
from parallel.layout import Layout, divisors

PRESETS = Path(__file__).parent / "presets"
RUN_FILE = "run.yaml"
"""Name of the resolved run file in the run directory."""
STAGE_SECTIONS = ("model", "layout", "training", "optimizer", "schedule", "checkpoint", "long_context", "rl")
"""Sections of which a stage may set single values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOverrides:
    """One stage of a run: what differs from the rest of the run file. Its meaning is megatron_m1/stages.py."""

    name: str
    """Name in logs and errors."""
    kind: Literal["train", "rl"] = "train"
    """`train`: next-token loss on rows of `data`. `rl`: the section `rl` on its prompts; only the last stage."""
    mix: StageConfig | None = None
    """Weights of the data sources in this stage; its tokens follow from the steps. None: the sources' own weights."""
    model: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    long_context: dict[str, Any] = field(default_factory=dict)
    rl: dict[str, Any] = field(default_factory=dict)


class RunConfig(BaseModel):
    """Everything a run is made of. Built by `load_run`; immutable, and legal as a whole once it exists."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run in logs, MLflow and the default run directory."""
    seed: int = Field(default=1234, ge=0)
    """Seed of initial weights, data order and every other random choice."""
    run_dir: Path = Path("runs/run")
    """Where checkpoints, metrics and the resolved run file go; `runs/<name>` unless it is given."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """Shape of the model."""
    layout: Layout = Field(default_factory=Layout)
    """Sizes of the parallel axes."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Where samples come from and how they are mixed."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """Steps, sequence length, microbatch, precision, recompute, evaluation."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW and gradient clipping."""
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """Learning rate and global batch over tokens."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """When checkpoints are saved and which are kept."""
    health: HealthConfig = Field(default_factory=HealthConfig)
    """Which steps may change the weights, when a hang ends the job, where the numbers can be read."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """Where metrics are sent besides the run directory."""
    long_context: LongContextConfig = Field(default_factory=LongContextConfig)
    """What is measured of how the model uses its context."""
    rl: RLConfig = Field(default_factory=RLConfig)
    """What stages of kind `rl` do."""
    length_jump: LengthJumpConfig = Field(default_factory=LengthJumpConfig)
    """When gradients count as exploded behind a jump to longer rows, and what the run does then."""
    stages: tuple[StageOverrides, ...] = ()
    """Parts of the run, one after the other, each with its own values in some sections; none: one stage."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if not self.stages:
            check_across_sections(self)
        for index in range(len(self.stages)):
            self.of_stage(index)
        return self

    def of_stage(self, index: int) -> RunConfig:
        """The run as one stage sees it: without stages, its sections laid over the run's.

        Raises:
            ValueError: the stage is not a legal run.
        """
        stage = self.stages[index]
        values = self.model_dump(mode="json", exclude={"stages"})
        for section in STAGE_SECTIONS:
            values[section] = runfile.merge(values[section], getattr(stage, section))
        try:
            config = RunConfig.model_validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            sentences = "\n".join(runfile.sentence_of(detail) for detail in error.errors())
            raise ValueError(f"stage {stage.name!r}: {sentences}") from error
        if stage.kind == "rl":
            check_rl(config, stage.name)
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedValue:
    """One value of a resolved run file and where it comes from."""

    path: str
    """Dotted path, `section.field`."""
    value: Any
    """The value, as YAML holds it."""
    origin: str
    """`default`, `preset NAME`, `file PATH` or `override`."""


def check_across_sections(config: RunConfig) -> None:
    """Every rule that needs more than one section.

    Raises:
        ValueError: the first rule that does not hold, with the legal values.
    """
    model, layout, training, schedule = config.model, config.layout, config.training, config.schedule
    layout.check_model(
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        num_experts=model.num_experts,
    )
    if model.vocab_size % layout.tp:
        raise ValueError(
            f"layout.tp={layout.tp} does not divide model.vocab_size={model.vocab_size}: embedding and head "
            f"are split over tp; make vocab_size a multiple of {layout.tp}, or choose another layout.tp"
        )
    if model.ffn_size % layout.etp:
        raise ValueError(
            f"layout.etp={layout.etp} does not divide model.ffn_size={model.ffn_size}: the channels of an "
            f"expert are split over etp; choose etp from {divisors(model.ffn_size)}"
        )
    # Here for the dp of the file; a launcher with more ranks grows dp, and the run checks again.
    check_batch_ramp(schedule, training.sequence_length, training.micro_batch_size * layout.dp)
    for stage in schedule.batch_ramp:
        layout.check_batch(
            global_batch=stage.global_batch_tokens // training.sequence_length,
            micro_batch=training.micro_batch_size,
            sequence_length=training.sequence_length,
        )
    passes = training.micro_batch_size * layout.dp * (layout.pp if layout.vpp > 1 else 1)
    if training.evaluation_rows % passes:
        raise ValueError(
            f"training.evaluation_rows={training.evaluation_rows} is not a multiple of {passes} (micro_batch_size * dp"
            f"{' * pp' if layout.vpp > 1 else ''}): every rank evaluates the same number of microbatches; choose "
            f"a multiple of {passes}, or 0 to evaluate nothing"
        )


def check_rl(config: RunConfig, name: str) -> None:
    """Every rule of a stage of kind `rl` that needs more than one section.

    Raises:
        ValueError: the first rule that does not hold, with the stage's name.
    """
    rl, layout, training = config.rl, config.layout, config.training
    if not rl.sources:
        raise ValueError(
            f"stage {name!r} is of kind 'rl' and rl.sources is empty: it needs 1 source of prompts or more; add one "
            "(name, kind, path or task, reward)"
        )
    if rl.rollout.slots % layout.pp:
        raise ValueError(
            f"stage {name!r}: rl.rollout.slots={rl.rollout.slots} is not a multiple of layout.pp={layout.pp}: pipeline "
            f"stages work on equal parts of the slots; choose a multiple of {layout.pp}"
        )
    longest = rl.window.stages_tokens[-1]
    if longest > training.sequence_length:
        raise ValueError(
            f"stage {name!r}: rl.window.stages_tokens ends with {longest} and training.sequence_length="
            f"{training.sequence_length}: a prompt with its answer is learnt as one document of a row; raise the row "
            f"to {longest} or lower the window"
        )
    layout.check_batch(
        global_batch=training.micro_batch_size * layout.dp,
        micro_batch=training.micro_batch_size,
        sequence_length=training.sequence_length,
    )


def load_run(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a preset name or a YAML file describes, with `section.field=value` overrides on top.

    Raises:
        ValueError: no such preset or file, an unknown key, a value of the wrong type, or a broken rule.
    """
    return _resolve(_layers(name_or_path, overrides))


def explain(name_or_path: str | Path, overrides: Sequence[str] = ()) -> list[ExplainedValue]:
    """Every value of the resolved run with its origin, in the order of the run file.

    Raises:
        ValueError: as `load_run`.
    """
    layers = _layers(name_or_path, overrides)
    config = _resolve(layers)
    given = [(origin, [path for path, _ in runfile.leaves(values)]) for origin, values in layers]

    def origin_of(path: str) -> str:
        for origin, paths in reversed(given):
            if any(path == given_path or path.startswith(f"{given_path}.") for given_path in paths):
                return origin
        return "default"

    return [
        ExplainedValue(path=path, value=value, origin=origin_of(path))
        for path, value in runfile.leaves(config.model_dump(mode="json"))
    ]


def dump_run(config: RunConfig) -> str:
    """The resolved run file: YAML with every value written out; `load_run` of it gives the same config."""
    return runfile.dump(config.model_dump(mode="json"))


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _layers(name_or_path: str | Path, overrides: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """(origin, values) from the lowest layer to the highest, every key known."""
    layers = list(_file_layers(name_or_path))
    for text in overrides:
        path, value = runfile.parse_override(text)
        layers.append(("override", runfile.nest(path, value)))
    for origin, values in layers:
        runfile.refuse_unknown_keys(RunConfig, values, source=origin)
        for number, stage in enumerate(values.get("stages") or []):
            for section in STAGE_SECTIONS if isinstance(stage, dict) else ():
                fields: Any = RunConfig.model_fields[section].annotation
                place = f"stages.{number}.{section}"
                runfile.refuse_unknown_keys(fields, stage.get(section, {}), source=origin, place=place)
    return layers


def _file_layers(
    name_or_path: str | Path, seen: tuple[Path, ...] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The layers of one run file: first those of the preset it names, then its own."""
    path, origin = _locate(name_or_path)
    if path in seen:
        chain = " -> ".join(step.name for step in (*seen, path))
        raise ValueError(
            f"{origin} builds on itself ({chain}): a preset must end somewhere; remove one 'preset' key"
        )
    values = runfile.parse(path.read_text(encoding="utf-8"), source=origin)
    if values is None:
        # all defaults would be another run, with another layout
        raise ValueError(
            f"{origin} holds nothing: a run file has at least one 'section: {{field: value}}'; write it again, or "
            f"name a preset ({', '.join(preset_names())})"
        )
    if isinstance(values, dict) and "preset" in values:
        yield from _file_layers(str(values.pop("preset")), (*seen, path))
    yield origin, values


def _locate(name_or_path: str | Path) -> tuple[Path, str]:
    """Path and origin text of a preset name or a run file."""
    text = str(name_or_path)
    if text in preset_names():
        return PRESETS / f"{text}.yaml", f"preset {text}"
    path = Path(text)
    if path.is_file():
        return path.resolve(), f"file {text}"
    near = difflib.get_close_matches(text, preset_names(), n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ValueError(
        f"run '{text}' is neither a preset nor a file: {hint}Presets are {', '.join(preset_names())}; "
        "name one of them or the path of a YAML run file"
    )


def _resolve(layers: Sequence[tuple[str, dict[str, Any]]]) -> RunConfig:
    """One config out of all layers; types are strict, so that a string never passes as a number."""
    values: dict[str, Any] = {}
    for _, upper in layers:
        values = runfile.merge(values, upper)
    values.setdefault("run_dir", f"runs/{values.get('name', 'run')}")
    try:
        # JSON mode, because there strict types still let a list fill a tuple and a string fill a path.
        return RunConfig.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ValueError("\n".join(runfile.sentence_of(detail) for detail in error.errors())) from error
