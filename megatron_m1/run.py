"""One rank's life of a run: put the parts together, resume, train, report. Called by start.py, on every rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from data_pipeline.config import DataConfig, build_dataset
from data_pipeline.loader import open_loader, sample_ids_hash
from megatron_m1.config import RunConfig, check_across_sections, check_rl, dump_run
from megatron_m1.guard import JumpGuard
from megatron_m1.insertion import Answers, plan_answer, with_answers
from megatron_m1.learner import LearnerParts
from megatron_m1.longcontext.jump import Explosion
from megatron_m1.measures import Measures
from megatron_m1.model.hybrid import HybridModel, build_model
from megatron_m1.reinforcement import open_prompts, train_policy
from megatron_m1.report import Report, say_result
from megatron_m1.rl.loop import PolicyTrainer
from megatron_m1.rl.prompts import PromptBook
from megatron_m1.saves import SavedParts, Saves, broken_set_aside, data_of
from megatron_m1.stages import Stage, stages_of
from megatron_m1.start import OUTCOME_FILE
from megatron_m1.training.batch import Row
from megatron_m1.training.gradient_parts import GradientParts
from megatron_m1.training.loop import Trainer
from megatron_m1.training.optimizer import Optimizer, build_optimizer
from megatron_m1.training.position import Position
from megatron_m1.training.state import load_state
from megatron_m1.training.step import wrap_for_gradients
from megatron_m1.vitals import Vitals
from parallel import cpu
from parallel.arrival import START_PATIENCE_S
from parallel.checkpoint import CheckpointStore
from parallel.groups import Groups, create_groups, destroy_groups
from parallel.hang import Watchdog
from parallel.launch import Launch, connect
from parallel.local_copies import LocalCopies

StageEnd = Literal["ended", "stops"] | Explosion
"""The stage is over, the life is over, or gradients exploded and the run goes back."""
_LOG = logging.getLogger(__name__)


def live(config: RunConfig, launch: Launch) -> None:
    """One rank's whole life: from the newest complete checkpoint, or from the start, to the end of the run.

    Raises:
        ValueError: the run cannot go on as it stands; says what to change.
    """
    cpu.install()
    logging.basicConfig(
        level=logging.INFO if launch.rank == 0 else logging.WARNING, format=f"[r{launch.rank}] %(message)s"
    )
    # its description of buffers and buckets is of no use to a user
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    with _start_watched(config, launch) as watchdog:
        connect(launch, run=dump_run(config), arrived=watchdog.beat)
    try:
        _train_stages(config, launch)
    finally:
        dist.destroy_process_group()


def _train_stages(given: RunConfig, launch: Launch) -> None:
    """Train the stages one after the other, and those that are put between them on the way."""
    answers = Answers(given.run_dir)
    config = with_answers(given, answers.given)
    stages = stages_of(config)
    index = 0
    with Report(config) as report:
        while index < len(stages):
            stage = _fitted(stages[index], launch.world_size)
            with _start_watched(config, launch) as watchdog:
                watchdog.beat()
                groups = create_groups(stage.config.layout, launch.device)
            end = _train_stage(config, stage, groups, report, stages)
            if isinstance(end, Explosion):
                answer = plan_answer(config, stages[index], end, num_before=len(answers.given))
                answers.give(answer)
                report.go_back(answer.why, answer.back_to)
                # the inserted stage now has this index, or the same one begins again
                config = with_answers(given, answers.given)
                stages = stages_of(config)
            elif end == "stops":
                break
            else:
                index += 1
            destroy_groups()


def _start_watched(config: RunConfig, launch: Launch) -> Watchdog:
    """Ends a start in which ranks wait for each other before there is a step to wait for, and says for whom."""
    return Watchdog(
        config.run_dir / "hang",
        timeout_s=START_PATIENCE_S if config.health.hang_timeout_s else 0.0,
        rank=launch.rank,
        world_size=launch.world_size,
    )


def _fitted(stage: Stage, world_size: int) -> Stage:
    """The stage with dp grown to fill the job."""
    layout = stage.config.layout.fit_to_world(world_size)
    config = stage.config.model_copy(update={"layout": layout})
    check_across_sections(config)
    if stage.kind == "rl":
        check_rl(config, stage.name)
    return replace(stage, config=config)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Saved:
    """Where a stage saves to, and what it goes on from."""

    store: CheckpointStore
    copies: LocalCopies | None
    step: int | None
    """Where the stage begins or goes on; None at the beginning of the run."""
    source: CheckpointStore | LocalCopies
    """Holds that step."""


def _train_stage(
    config: RunConfig, stage: Stage, groups: Groups, report: Report, stages: Sequence[Stage]
) -> StageEnd:
    """Train one of `stages`, fitted to this job, from where the run is to its end; whether the run goes on."""
    is_last = stage.index == len(stages) - 1
    store = CheckpointStore(config.run_dir / "checkpoints", stage.config.checkpoint, groups)
    store.clean()
    newest = store.newest_complete()
    if newest is not None and newest >= stage.last.step and not is_last:
        return "ended"
    local = stage.config.checkpoint.local
    if not local.directory:
        saved = _Saved(store=store, copies=None, step=newest, source=store)
        return _train_from(config, stage, groups, report, stages, saved)
    asynchronous = stage.config.checkpoint.asynchronous
    with closing(LocalCopies(local, config.run_dir, groups, asynchronous=asynchronous)) as copies:
        nearer = copies.bring(newest or 0)
        saved = _Saved(
            store=store,
            copies=copies,
            step=newest if nearer is None else nearer,
            source=store if nearer is None else copies,
        )
        return _train_from(config, stage, groups, report, stages, saved)


def _train_from(
    config: RunConfig,
    stage: Stage,
    groups: Groups,
    report: Report,
    stages: Sequence[Stage],
    saved: _Saved,
) -> StageEnd:
    """Train a stage from what is saved of it, or of what comes before it."""
    is_last, store = stage.index == len(stages) - 1, saved.store
    # first, because a shard that is missing should be known before a large model is built
    reader = open_prompts(stage) if stage.kind == "rl" else _Rows(stage)
    chunks, wrapped, optimizer = _build(stage, groups)
    position, extra = _load(stage, saved, chunks, optimizer)
    report.begin(stage, groups, saved.step, saved.source.directory, extra.get("mlflow_run_id"), stages=stages)
    vitals = Vitals(config, groups, report, extra.get("losses", []))
    guard = JumpGuard(
        stage, GradientParts(stage.config.model, chunks, optimizer), extra.get("gradient_norms")
    )
    store.pinned_step = guard.goes_back_to
    parts = _saved_parts(saved, chunks, optimizer, report, vitals, guard)
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
        with broken_set_aside(store):
            policy_trainer = train_policy(stage, reader, learner_parts, report)
        return _end_stage(config, stage, policy_trainer, report, None, is_last=is_last)
    reader.say_what_ends(report)
    with broken_set_aside(store):
        trainer, held_out = _train_on_rows(stage, reader, learner_parts, guard, report)
    if guard.explosion:
        store.wait()
        return guard.explosion
    return _end_stage(config, stage, trainer, report, held_out, is_last=is_last)


def _saved_parts(
    saved: _Saved,
    chunks: list[HybridModel],
    optimizer: Optimizer,
    report: Report,
    vitals: Vitals,
    guard: JumpGuard,
) -> SavedParts:
    return SavedParts(
        store=saved.store,
        copies=saved.copies,
        chunks=chunks,
        optimizer=optimizer,
        before_save=(report.sync,),
        checkpoint_begins=vitals.saved,
        mlflow_run_id=lambda: report.run_id,
        losses=lambda: vitals.judge.losses,
        gradient_norms=lambda: guard.watch.state,
        watchdog=vitals.watchdog,
    )


def _train_on_rows(
    stage: Stage, reader: _Rows, parts: LearnerParts, guard: JumpGuard, report: Report
) -> tuple[Trainer, float | None]:
    """Train a stage of kind `train`; its trainer, and the last held-out loss in nats."""
    with reader as rows, parts.vitals as vitals:
        measures = Measures(stage, parts.groups, parts.wrapped, rows.held_out, vitals.evaluation, report.keep)

        def accepts(*step_and_numbers: Any) -> bool:
            guard.measure()
            return vitals.judge.accepts(*step_and_numbers)

        def after_step(place: Position) -> str | None:
            # what exploded is neither measured nor saved
            if guard.saw(vitals.newest, report):
                return "gradients exploded behind a length jump"
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
            accepts=accepts,
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
    stage: Stage, saved: _Saved, chunks: list[HybridModel], optimizer: Optimizer
) -> tuple[Position, dict[str, Any]]:
    """Place of what is saved and what it holds beside the state; the beginning where there is nothing."""
    if saved.step is None:
        return Position(), {}
    position, extra = load_state(saved.source, saved.step, chunks, optimizer)
    _refuse_other_data(stage, extra)
    return position, extra


def _end_stage(
    config: RunConfig,
    stage: Stage,
    trainer: Trainer | PolicyTrainer,
    report: Report,
    held_out: float | None,
    *,
    is_last: bool,
) -> StageEnd:
    """Say how a stage ended; whether the run goes on to the next one."""
    if trainer.position.step < stage.last.step:
        report.say(f"stopped after step {trainer.position.step}, saved: {trainer.ended_early}")
    elif is_last:
        say_result(stage.config, trainer.groups, trainer, report, held_out)
    # a signal at the last step of a stage ends the life there; the next one begins with the next stage
    goes_on = trainer.ended_early is None and not is_last
    if not goes_on:
        _write_outcome(config, trainer, finished=is_last and trainer.position.step >= stage.last.step)
    return "ended" if goes_on else "stops"


def _write_outcome(config: RunConfig, trainer: Trainer | PolicyTrainer, *, finished: bool) -> None:
    """Leave one line for the batch script, which cannot tell an early end from the end by an exit code."""
    step = trainer.position.step
    text = f"finished at step {step}" if finished else f"stopped after step {step}: {trainer.ended_early}"
    if dist.get_rank() == 0:
        (config.run_dir / OUTCOME_FILE).write_text(text + "\n", encoding="utf-8")


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

    def say_what_ends(self, report: Report) -> None:
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
