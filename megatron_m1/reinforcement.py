"""A stage of kind `rl` put together: prompts with their tokens, rewards, the rollout queue, the policy's trainer.

The parts are megatron_m1/rl/; here they meet data_pipeline's tokenizer and problems, and the run's checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch.distributed as dist

from data_pipeline.permute import KeyedPermutation, derive_key
from data_pipeline.synthetic import TASKS, make_problem
from megatron_m1.learner import LearnerParts
from megatron_m1.report import Report
from megatron_m1.rl.batch_metrics import write_table
from megatron_m1.rl.engine import OwnEngine, drawing_of
from megatron_m1.rl.http_engine import HttpEngine
from megatron_m1.rl.loop import PolicyTrainer
from megatron_m1.rl.prompts import PromptBook, PromptSource, Question, puzzles, read_questions
from megatron_m1.rl.queue import Queue
from megatron_m1.rl.rewards.interface import check_prompts
from megatron_m1.rl.rollout import Engine, Rollouts, Seen
from megatron_m1.rl.sample import Prompt
from megatron_m1.rl.scoring import Scoring
from megatron_m1.rl.update import Policy
from megatron_m1.stages import Stage
from megatron_m1.training.weights import WeightsExport


def open_prompts(stage: Stage) -> PromptBook:
    """All prompts of the stage, encoded and checked.

    Raises:
        ValueError: a source that cannot be read, a prompt that leaves no room for an answer, or one whose answer its
            reward cannot use.
    """
    rl, seed = stage.config.rl, stage.config.seed
    encoder = stage.data.open_tokenizer()
    by_task: dict[str, list[Prompt]] = {}
    count = 0
    for source in rl.sources:
        own: list[Prompt] = []
        for question in _questions(source, derive_key(seed, "prompts", source.name)):
            tokens_S = encoder.encode_one(question.text)[:-1].astype(np.int64)
            own.append(
                Prompt(
                    prompt_id=count + len(own),
                    tokens_S=tokens_S,
                    text=question.text,
                    task=source.name,
                    answer=question.answer,
                )
            )
        by_task[source.name] = own
        count += len(own)

    def order(task: str, number: int, size: int) -> Callable[[int], int]:
        return KeyedPermutation(size, derive_key(seed, "prompt order", task, number))

    book = PromptBook(by_task, order)
    check_prompts(book.all(), {source.name: source.build_reward() for source in rl.sources})
    _check_lengths(book, rl.window.stages_tokens[0])
    return book


def train_policy(stage: Stage, book: PromptBook, parts: LearnerParts, report: Report) -> PolicyTrainer:
    """Train the stage from where it is to its end; its trainer, for what is said at the end.

    Raises:
        ValueError: a reward that is not ready, or a checkpoint with other prompts.
        RuntimeError: too many rewards failed, or generation and training disagree.
    """
    config = stage.config
    encoder = stage.data.open_tokenizer()

    def text_of(tokens_S: np.ndarray) -> str:
        return encoder.decode(tokens_S[tokens_S != encoder.end_id])

    queue = _stored_queue(book, parts.stored, text_of)
    rewards = {source.name: source.build_reward() for source in config.rl.sources}
    policy = Policy(
        wrapped=parts.wrapped,
        groups=parts.groups,
        row_tokens=config.training.sequence_length,
        micro_batch=config.training.micro_batch_size,
    )
    engine = _engine(stage, parts, text_of, encoder.end_id)
    report.say(config.rl.loss.describe())
    with parts.vitals, Scoring(rewards, config.rl.pool, config.rl.scoring, queue.scores) as scoring:

        def state() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            scoring.keep_done()
            about, arrays = queue.dump(book.taken, book.identity())
            return {"rl": about}, arrays

        parts.saves.also = state
        trainer = PolicyTrainer(
            config=config.rl,
            training=config.training,
            schedule=config.schedule,
            grad_clip=config.optimizer.grad_clip,
            groups=parts.groups,
            chunks=parts.chunks,
            optimizer=parts.optimizer,
            policy=policy,
            queue=queue,
            rollouts=Rollouts(config.rl, book, queue, engine, scoring, policy.log_probs),
            reporter=parts.vitals,
            after_step=parts.saves.after_step,
            position=parts.position,
            first=stage.first,
            accepts=parts.vitals.judge.accepts,
            write_table=lambda step, seen: _write_table(stage, report, step, seen),
        )
        trainer.run()
    return trainer


def _engine(
    stage: Stage, parts: LearnerParts, text_of: Callable[[np.ndarray], str], end_token: int
) -> Engine:
    """The trainer's own model, or the server of `rl.engine`, which reads weights from the run directory."""
    config = stage.config
    if config.rl.engine is None:
        return OwnEngine(
            chunks=parts.wrapped,
            groups=parts.groups,
            config=config.rl,
            seed=config.seed,
            end_token=end_token,
            text_of=text_of,
        )
    window = config.rl.window.stages_tokens[-1]
    return HttpEngine(
        config.rl.engine,
        drawing_of(config.rl, window=window, end_token=end_token, seed=config.seed),
        text_of=text_of,
        publish=WeightsExport(config.run_dir / "engine_weights", parts.chunks, parts.groups),
    )


def _stored_queue(book: PromptBook, stored: dict[str, Any], text_of: Callable[[np.ndarray], str]) -> Queue:
    """The queue of the checkpoint, and the book at its place; a new one at the beginning of the stage."""
    about = stored.get("rl")
    if about is None:
        return Queue()
    if about["identity"] != book.identity():
        raise ValueError(
            f"the prompts of rl.sources hash to {book.identity()[:16]} and those of the checkpoint to "
            f"{about['identity'][:16]}: its ledger of used prompts means nothing with others; set sources, seed and "
            "tokenizer back, or start anew with --fresh or another run_dir"
        )
    book.taken = dict(about["taken"])
    return Queue.load(about, stored["arrays"], book.by_id, text_of)


def _questions(source: PromptSource, seed: int) -> Iterator[Question]:
    if source.kind == "file":
        yield from read_questions(source)
    elif source.kind == "logic":
        yield from puzzles(source, seed)
    elif source.task in TASKS:
        for number in range(source.count):
            problem = make_problem(source.task, seed, number, source.length_words)
            yield Question(problem.prompt, list(problem.answer))
    else:
        raise ValueError(
            f"rl source {source.name!r} has task={source.task!r}: the synthetic tasks are {', '.join(TASKS)}; choose "
            "one of them"
        )


def _check_lengths(book: PromptBook, window: int) -> None:
    for prompt in book.all():
        if len(prompt.tokens_S) >= window:
            raise ValueError(
                f"prompt {prompt.prompt_id} of rl source {prompt.task!r} has {len(prompt.tokens_S)} tokens: a window "
                f"of {window} tokens (rl.window.stages_tokens) leaves no room for an answer; drop the prompt, or raise "
                "the window"
            )


def _write_table(stage: Stage, report: Report, step: int, seen: Seen) -> None:
    if dist.get_rank() == 0:
        path = stage.config.run_dir / "samples" / f"step_{step:08d}.json"
        write_table(path, seen.groups)
        report.keep(step, path)
