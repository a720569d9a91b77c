"""What is reported of a generation batch: rewards, pass rates, lengths, entropy, mismatch, truncation, repetition, and
what became of its prompts; and the table of samples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.learned import Learned
from megatron_m1.rl.queue import Queue
from megatron_m1.rl.rollout import Seen
from megatron_m1.rl.sample import Group, Sample, Score, count_failures

TABLE_ROWS = 64
_TEXT_CHARACTERS = 2000


def of_rounds(seen: Seen, queue: Queue, config: RLConfig) -> dict[str, float | int | str]:
    """Metrics of one batch, over all groups that were scored for it, before dynamic sampling dropped any.

    `entropy_nats` is -log p of the generated tokens, in the mean: at temperature 1 and top-p 1 an unbiased estimate of
    the policy's entropy per token.
    """
    found: dict[str, float | int | str] = {
        "rl_batch": queue.num_batches,
        "generation_rounds": seen.rounds,
        "groups_scored": len(seen.groups),
        "groups_learnt": len(queue.batch),
        "kept_share": queue.kept_share,
        "samples_restarted": seen.restarted,
        "samples_carried": seen.carried,
        "prompts_in_flight": queue.in_flight,
        **seen.mismatch().metrics(),
        **seen.engine,
        **{f"prompts_{fate}": count for fate, count in sorted(queue.fates.counts.items())},
    }
    if not seen.groups:
        return found
    samples = [sample for group in seen.groups for sample in group.samples]
    scores = [score for group in seen.groups for score in group.scores]
    found |= _lengths(samples) | _rewards(scores, config.solved_at)
    tasks = sorted({group.prompt.task for group in seen.groups})
    if len(tasks) > 1:
        for task in tasks:
            own = [s for group in seen.groups if group.prompt.task == task for s in group.scores]
            found |= {f"{name}/{task}": value for name, value in _rewards(own, config.solved_at).items()}
    return found


def whole_length_p99(batch: Sequence[Learned]) -> float:
    """99th percentile of prompt and answer together, in tokens: what the window bounds."""
    lengths = [
        len(learned.group.prompt.tokens_S) + len(sample.tokens_S)
        for learned in batch
        for sample in learned.group.samples
    ]
    return float(np.percentile(lengths, 99))


def _rewards(scores: Sequence[Score], solved_at: float) -> dict[str, float | int | str]:
    values = [score.value for score in scores if score.value is not None]
    verdicts = [score.task_value for score in scores if score.task_value is not None]
    found: dict[str, float | int | str] = {
        "reward": float(np.mean(values)) if values else 0.0,
        "pass_rate": float(np.mean([verdict >= solved_at for verdict in verdicts])) if verdicts else 0.0,
    }
    return found | {f"reward_failures/{kind}": count for kind, count in count_failures(scores).items()}


def _lengths(samples: Sequence[Sample]) -> dict[str, float | int | str]:
    lengths = [len(sample.tokens_S) for sample in samples]
    reasons = [sample.finish for sample in samples]
    nats = np.concatenate([sample.log_probs_S for sample in samples]).astype(np.float64)
    found: dict[str, float | int | str] = {
        f"length_tokens_p{percent}": float(np.percentile(lengths, percent)) for percent in (1, 50, 99)
    }
    return found | {
        "length_tokens_mean": float(np.mean(lengths)),
        "truncated_share": reasons.count("length") / len(reasons),
        "repetition_share": reasons.count("repetition") / len(reasons),
        "entropy_nats": float(-nats.mean()),
    }


def write_table(path: Path, groups: Sequence[Group]) -> None:
    """A table of samples as MLflow shows it: JSON with columns and rows, at most `TABLE_ROWS` of them."""
    columns = [
        "prompt_id",
        "task",
        "prompt",
        "sample_id",
        "text",
        "reward",
        "task_value",
        "failure",
        "finish",
        "tokens",
    ]
    rows: list[list[Any]] = []
    for group in groups:
        for sample, score in zip(group.samples, group.scores, strict=True):
            prompt = group.prompt
            rows.append(
                [
                    prompt.prompt_id,
                    prompt.task,
                    prompt.text[:_TEXT_CHARACTERS],
                    sample.sample_id,
                    sample.text[:_TEXT_CHARACTERS],
                    score.value,
                    score.task_value,
                    score.failure,
                    sample.finish,
                    len(sample.tokens_S),
                ]
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"columns": columns, "data": rows[:TABLE_ROWS]}) + "\n", encoding="utf-8")
