"""One life of a run: put the parts together, resume, train, report. Called by `m1 train`, on every rank.

Where more than one rank is needed and no launcher started this process, it starts the local ranks itself.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from rich.console import Console

from data_pipeline.config import DataConfig, build_dataset
from data_pipeline.loader import open_loader, sample_ids_hash
from megatron_m1.config import RunConfig, check_across_sections, check_rl, dump_run
from megatron_m1.learner import LearnerParts
from megatron_m1.measures import Measures
from megatron_m1.model.hybrid import HybridModel, build_model
from megatron_m1.reinforcement import open_prompts, train_policy
from megatron_m1.rl.loop import PolicyTrainer
from megatron_m1.rl.prompts import PromptBook
from megatron_m1.saves import SavedParts, Saves, data_of
from megatron_m1.stages import Stage, stages_of
from megatron_m1.training.batch import Row
from megatron_m1.training.loop import Trainer
from megatron_m1.training.metrics import StepMetrics
from megatron_m1.training.optimizer import Optimizer, build_optimizer
from megatron_m1.training.progress import Progress
from megatron_m1.training.sample import continue_text
from megatron_m1.training.state import Position, load_state
from megatron_m1.training.step import wrap_for_gradients
from megatron_m1.training.tracking import RunDescription, Tracking, open_command, provenance_tags
from megatron_m1.vitals import Vitals
from parallel import cpu
from parallel.checkpoint import CheckpointStore
from parallel.groups import Groups, create_groups, destroy_groups
from parallel.launch import connect, read_environment, run_local_ranks

_LOG = logging.getLogger(__name__)
_RUN_FILE = "run.yaml"
# One line for whoever started the ranks: "finished at step N", "stopped after step N: why"; no file after a crash.
_OUTCOME_FILE = "outcome.txt"


def train(config: RunConfig, resume: bool = True) -> None:
    """Train a run to its end, from its newest complete checkpoint or from the start.

    Raises:
        ValueError: the run cannot start as it stands; says what to change.
        SystemExit: a local rank failed; its own output says why.
    """
    launch = read_environment()
    if launch.rank == 0:
        _prepare_directory(config, resume)
    stages = stages_of(config)
    world_size = max(stage.config.layout.world_size for stage in stages)
    if launch.launcher == "single" and world_size > 1:
        run_file = config.run_dir / _RUN_FILE
        code = run_local_ranks(world_size, ["train", str(run_file)])
        if code:
            raise SystemExit(code)
        return
    cpu.install()
    logging.basicConfig(
        level=logging.INFO if launch.rank == 0 else logging.WARNING, format=f"[r{launch.rank}] %(message)s"
    )
    # its description of buffers and buckets is of no use to a user
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    connect(launch)
    try:
        with _Report(config, stages) as report:
            for stage in [_fitted(stage, launch.world_size) for stage in stages]:
                groups = create_groups(stage.config.layout, launch.device)
                if not _train_stage(config, stage, groups, report, is_last=stage.index == len(stages) - 1):
                    break
                destroy_groups()
    finally:
        dist.destroy_process_group()


def _fitted(stage: Stage, world_size: int) -> Stage:
    """The stage with dp grown to fill the job."""
    layout = stage.config.layout.fit_to_world(world_size)
    config = stage.config.model_copy(update={"layout": layout})
    check_across_sections(config)
    if stage.kind == "rl":
        check_rl(config, stage.name)
    return replace(stage, config=config)


def _prepare_directory(config: RunConfig, resume: bool) -> None:
    """Write the resolved run file; a fresh start moves an earlier run's directory aside, never deletes it."""
    directory = config.run_dir
    if not resume and directory.exists():
        aside = directory.with_name(f"{directory.name}.before-{time.strftime('%Y%m%dT%H%M%S')}")
        directory.rename(aside)
        print(f"moved the earlier run to {aside}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _RUN_FILE).write_text(dump_run(config), encoding="utf-8")
        (directory / _OUTCOME_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"run_dir={directory} cannot be written ({error}): it must be a directory this user may write; "
            "choose another with run_dir=PATH"
        ) from error


def _train_stage(config: RunConfig, stage: Stage, groups: Groups, report: _Report, *, is_last: bool) -> bool:
    """Train a stage of the run, fitted to this job, from where the run is to its end; whether the run goes on."""
    store = CheckpointStore(config.run_dir / "checkpoints", stage.config.checkpoint, groups)
    store.clean()
    newest = store.newest_complete()
    if newest is not None and newest >= stage.last.step and not is_last:
        return True
    # first, because a shard that is missing should be known before a large model is built
    reader = open_prompts(stage) if stage.kind == "rl" else _Rows(stage)
    chunks, wrapped, optimizer = _build(stage, groups)
    position, extra = _load(stage, store, newest, chunks, optimizer)
    report.begin(stage, groups, newest, extra.get("mlflow_run_id"))
    if newest is not None and not report.has_trained:
        report.say(f"resumed from step {newest} in {store.directory}")
    vitals = Vitals(config, groups, report, extra.get("losses", []))
    parts = SavedParts(
        store=store,
        chunks=chunks,
        optimizer=optimizer,
        before_save=(report.sync, vitals.saved),
        mlflow_run_id=lambda: report.run_id,
        losses=lambda: vitals.judge.losses,
        watchdog=vitals.watchdog,
    )
    saves = Saves(stage, dump_run(config), groups, parts)
    learner_parts = LearnerParts(
        groups=groups,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=optimizer,
        vitals=vitals,
        saves=saves,
        position=position,
        stored=extra,
    )
    if isinstance(reader, PromptBook):
        policy_trainer = train_policy(stage, reader, learner_parts, report.say)
        return _end_stage(config, stage, policy_trainer, report, None, is_last=is_last)
    reader.say_what_ends(report)
    trainer, held_out = _train_on_rows(stage, reader, learner_parts)
    return _end_stage(config, stage, trainer, report, held_out, is_last=is_last)


def _train_on_rows(stage: Stage, reader: _Rows, parts: LearnerParts) -> tuple[Trainer, float | None]:
    """Train a stage of kind `train`; its trainer, and the last held-out loss in nats."""
    with reader as rows, parts.vitals as vitals:
        measures = Measures(stage, parts.groups, parts.wrapped, rows.held_out, vitals.evaluation)

        def after_step(place: Position) -> str | None:
            # before the save: a stage that has been saved to its end is not measured again
            measures.after_step(place.step)
            return parts.saves.after_step(place)

        trainer = Trainer(
            config=stage.config.training,
            schedule=stage.config.schedule,
            groups=parts.groups,
            chunks=parts.chunks,
            wrapped=parts.wrapped,
            optimizer=parts.optimizer,
            rows=rows,
            reporter=vitals,
            accepts=vitals.judge.accepts,
            after_step=after_step,
            position=parts.position,
            first=stage.first,
        )
        held_out = trainer.run()
        if held_out is None and trainer.ended_early is None:
            held_out = trainer.evaluate()
    return trainer, held_out


def _build(stage: Stage, groups: Groups) -> tuple[list[HybridModel], list[Any], Optimizer]:
    """Model chunks, the same with gradient buffers around them, and their optimizer; initial weights."""
    model_parallel_cuda_manual_seed(stage.config.seed, force_reset_rng=True)
    training = stage.config.training
    chunks = build_model(
        stage.config.model,
        groups,
        precision=training.precision,
        recompute=training.recompute,
        offload=training.offload_activations,
        logits_mib=training.logits_mib,
        seed=stage.config.seed,
    )
    wrapped = wrap_for_gradients(chunks, groups, overlap=training.overlap_communication)
    return chunks, wrapped, build_optimizer(wrapped, stage.config.optimizer, groups)


def _load(
    stage: Stage, store: CheckpointStore, step: int | None, chunks: list[HybridModel], optimizer: Optimizer
) -> tuple[Position, dict[str, Any]]:
    """Place of the checkpoint of a step and what it holds beside the state; the beginning where there is none."""
    if step is None:
        return Position(), {}
    position, extra = load_state(store, step, chunks, optimizer)
    _refuse_other_data(stage, extra)
    return position, extra


def _end_stage(
    config: RunConfig,
    stage: Stage,
    trainer: Trainer | PolicyTrainer,
    report: _Report,
    held_out: float | None,
    *,
    is_last: bool,
) -> bool:
    """Say how a stage ended; whether the run goes on to the next one."""
    if trainer.position.step < stage.last.step:
        report.say(f"stopped after step {trainer.position.step}, saved: {trainer.ended_early}")
    elif is_last:
        _say_result(stage.config, trainer.groups, trainer, report, held_out)
    # a signal at the last step of a stage ends the life there; the next one begins with the next stage
    goes_on = trainer.ended_early is None and not is_last
    if not goes_on:
        _write_outcome(config, trainer, finished=is_last and trainer.position.step >= stage.last.step)
    return goes_on


def _write_outcome(config: RunConfig, trainer: Trainer | PolicyTrainer, *, finished: bool) -> None:
    """Leave one line for the batch script, which cannot tell an early end from the end by an exit code."""
    step = trainer.position.step
    text = f"finished at step {step}" if finished else f"stopped after step {step}: {trainer.ended_early}"
    if dist.get_rank() == 0:
        (config.run_dir / _OUTCOME_FILE).write_text(text + "\n", encoding="utf-8")


def _refuse_other_data(stage: Stage, extra: dict[str, Any]) -> None:
    """Raises: ValueError when the checkpoint's position means something else in this run's data."""
    saved = extra["data"]
    # a checkpoint at the end of a stage knows nothing of the next one
    given = data_of(stage, len(saved["sequence_length"]))
    for name, value in given.items():
        if saved[name] != value:
            raise ValueError(
                f"the data's {name} is {value} but the checkpoint in {stage.config.run_dir} was trained with "
                f"{saved[name]}: its position in the data means nothing then; set {name} back, or start anew with "
                "--fresh or another run_dir"
            )


def _refuse_other_vocabulary(config: RunConfig) -> None:
    path = Path(config.data.tokenizer_path)
    entries = config.data.open_tokenizer().vocab_size if path.is_file() else 0
    if entries > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} but the tokenizer {path} has {entries} entries: every entry "
            f"needs a row of the embedding; set model.vocab_size={entries} or more (a multiple of layout.tp)"
        )


class _Rows:
    """Rows of the run's sources, read ahead."""

    def __init__(self, stage: Stage) -> None:
        self._data: DataConfig = stage.data
        length, seed = stage.config.training.sequence_length, stage.config.seed
        _refuse_other_vocabulary(stage.config)
        self._train = build_dataset(stage.data, stage.sequence_lengths, seed, "train")
        self._num_samples = stage.last.consumed_samples
        if self._train.num_samples is not None and self._train.num_samples < self._num_samples:
            raise ValueError(
                f"stage {stage.name!r} ends with sample {self._num_samples}, but the data has "
                f"{self._train.num_samples}: its sources reach their last epoch, or its stages end, before; raise "
                "max_epochs or data.stages.tokens, add a source, or take fewer training.steps"
            )
        self._held_out = build_dataset(stage.data, length, seed, "held_out")
        self._stack = ExitStack()

    def say_what_ends(self, report: _Report) -> None:
        """Name the sources that reach their last epoch in this stage."""
        for name, sample in self._train.exhausted_at.items():
            if sample < self._num_samples:
                report.say(
                    f"data source {name!r} has reached its last epoch by sample {sample}; others take its place"
                )

    def steps(self, plan: Iterator[Sequence[int]]) -> Iterator[Sequence[Row]]:
        loader = open_loader(self._data.front, self._train, plan, self._data.prefetch_steps)
        return self._stack.enter_context(loader)

    def held_out(self, ids: Sequence[int]) -> Sequence[Row]:
        return [self._held_out[number] for number in ids]

    def name_of(self, ids: Sequence[int]) -> str:
        return sample_ids_hash(ids)

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()


class _Report:
    """Rank 0's record, MLflow and progress line; silence on every other rank."""

    def __init__(self, config: RunConfig, stages: Sequence[Stage]) -> None:
        self._config, self._stages = config, stages
        self._console = Console(stderr=True) if dist.get_rank() == 0 else None
        self._stack = ExitStack()
        self._tracking: Tracking | None = None
        self.has_trained = False
        """Whether a stage has begun in this life."""

    def begin(self, stage: Stage, groups: Groups, resumed_from: int | None, run_id: str | None) -> None:
        """A stage begins, or goes on in this life; the first one opens the record."""
        if len(self._stages) > 1:
            config = stage.config
            self.say(
                f"stage {stage.name!r}, steps {stage.first.step + 1} to {stage.last.step}: "
                f"{config.training.sequence_length} tokens per row, rotary base {config.model.rotary_base:g}, "
                f"layout tp={groups.layout.tp} pp={groups.layout.pp} cp={groups.layout.cp} dp={groups.layout.dp} "
                f"ep={groups.layout.ep}"
            )
        if self._console is None or self._tracking is not None:
            return
        layout = {f"layout_{axis}": str(size) for axis, size in asdict(groups.layout).items()}
        description = RunDescription(
            name=self._config.name,
            parameters=self._config.model_dump(mode="json"),
            tags=provenance_tags() | layout,
            run_file=self._config.run_dir / _RUN_FILE,
        )
        self._tracking = Tracking(
            self._config.tracking,
            self._config.run_dir,
            description,
            resume_from_step=resumed_from,
            run_id=run_id,
        )
        self._progress = Progress(
            self._stages[-1].last.step, first_step=(resumed_from or 0) + 1, console=self._console
        )
        self._stack.enter_context(self._tracking)
        self._stack.enter_context(self._progress)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None on other ranks, or while the server has not answered."""
        return self._tracking.run_id if self._tracking else None

    def step(self, metrics: StepMetrics) -> None:
        self.has_trained = True
        if self._tracking:
            self._tracking.log_step(metrics)
            self._progress.update(metrics)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        if self._tracking:
            self._tracking.log_evaluation(step, values)
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def say(self, text: str) -> None:
        """Print a line, on rank 0 only."""
        if self._console:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def sync(self) -> None:
        if self._tracking:
            self._tracking.sync()

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _say_result(
    config: RunConfig,
    groups: Groups,
    trainer: Trainer | PolicyTrainer,
    report: _Report,
    held_out: float | None,
) -> None:
    """What a user wants to see at the end: loss against the unigram entropy, a sample, where things are."""
    unigram = _unigram_entropy(config.data)
    if held_out is not None:
        against = f" (unigram entropy of the corpus: {unigram:.3f} nats/token)" if unigram else ""
        report.say(f"held-out loss {held_out:.3f} nats/token{against}")
    tokenizer = Path(config.data.tokenizer_path)
    if tokenizer.is_file():
        encoder = config.data.open_tokenizer()
        prompt = [int(token) for token in next(encoder.encode(["def main("]))[:-1]]
        length = min(64, config.training.sequence_length)
        length += -length % groups.layout.token_shares
        tokens = continue_text(
            trainer.wrapped, groups, prompt, length=length, temperature=0.7, seed=config.seed
        )
        report.say("sample:\n" + encoder.decode(tokens))
    report.say(f"checkpoints {config.run_dir / 'checkpoints'}")
    if config.tracking.enabled:
        report.say(f"MLflow      {open_command(config.tracking, config.run_dir)}")


def _unigram_entropy(data: DataConfig) -> float | None:
    """The entropy that data preparation noted beside the tokenizer, if it did."""
    summary = Path(data.tokenizer_path).with_name("summary.json")
    if not summary.is_file():
        return None
    return json.loads(summary.read_text(encoding="utf-8")).get("unigram_entropy_nats_per_token")
