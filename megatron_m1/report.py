"""What a run tells its user: lines on the screen, the record, MLflow, and the result at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from data_pipeline.config import DataConfig
from megatron_m1.config import RUN_FILE, RunConfig
from megatron_m1.rl.loop import PolicyTrainer
from megatron_m1.stages import Stage
from megatron_m1.training.loop import Trainer
from megatron_m1.training.metrics import StepMetrics
from megatron_m1.training.progress import Progress
from megatron_m1.training.sample import continue_text
from megatron_m1.training.tracking import RunDescription, Tracking, open_command, provenance_tags
from parallel.groups import Groups


class Report:
    """Rank 0's record, MLflow and progress line; silence on every other rank."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._console = Console(stderr=True) if dist.get_rank() == 0 else None
        self._stack = ExitStack()
        self._tracking: Tracking | None = None

    def begin(
        self,
        stage: Stage,
        groups: Groups,
        resumed_from: int | None,
        place: Path,
        run_id: str | None,
        *,
        stages: Sequence[Stage],
    ) -> None:
        """A stage of `stages` begins, or goes on in this life; the first one opens the record.

        resumed_from: step that was saved in `place`; None at the beginning of a run.
        """
        if len(stages) > 1:
            config = stage.config
            self.say(
                f"stage {stage.name!r}, steps {stage.first.step + 1} to {stage.last.step}: "
                f"{config.training.sequence_length} tokens per row, rotary base {config.model.rotary_base:g}, "
                f"layout tp={groups.layout.tp} pp={groups.layout.pp} cp={groups.layout.cp} dp={groups.layout.dp} "
                f"ep={groups.layout.ep}"
            )
        if self._console is None or self._tracking is not None:
            return
        if resumed_from is not None:
            self.say(f"resumed from step {resumed_from} in {place}")
        layout = {f"layout_{axis}": str(size) for axis, size in asdict(groups.layout).items()}
        description = RunDescription(
            name=self._config.name,
            parameters=self._config.model_dump(mode="json"),
            tags=provenance_tags() | layout,
            run_file=self._config.run_dir / RUN_FILE,
        )
        self._tracking = Tracking(
            self._config.tracking,
            self._config.run_dir,
            description,
            resume_from_step=resumed_from,
            run_id=run_id,
        )
        self._progress = Progress(
            stages[-1].last.step, first_step=(resumed_from or 0) + 1, console=self._console
        )
        self._stack.enter_context(self._tracking)
        self._stack.enter_context(self._progress)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None on other ranks, or while the server has not answered."""
        return self._tracking.run_id if self._tracking else None

    def step(self, metrics: StepMetrics) -> None:
        if self._tracking:
            self._tracking.log_step(metrics)
            self._progress.update(metrics)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        if self._tracking:
            self._tracking.log_evaluation(step, values)
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def keep(self, step: int, file: Path) -> None:
        """Store a file of the run directory with the run in MLflow."""
        if self._tracking:
            self._tracking.log_file(step, file)

    def say(self, text: str) -> None:
        """Print a line, on rank 0 only."""
        if self._console:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def sync(self) -> None:
        if self._tracking:
            self._tracking.sync()

    def go_back(self, why: Sequence[str], to_step: int) -> None:
        """What came after a step is void: say why; the record goes on as a new life of the run that begins there."""
        for sentence in why:
            self.say(sentence)
        self.say(f"back to step {to_step}")
        self._stack.close()
        self._tracking = None

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def say_result(
    config: RunConfig,
    groups: Groups,
    trainer: Trainer | PolicyTrainer,
    report: Report,
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
