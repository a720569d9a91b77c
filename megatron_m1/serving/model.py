"""A run's model for generation: its newest weights under any layout, its tokenizer, its chat template."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from pydantic import ValidationError

from data_pipeline.chat import ChatEncoder
from data_pipeline.tokenize import DocumentEncoder
from megatron_m1 import runfile
from megatron_m1.config import RUN_FILE, RunConfig, load_run
from megatron_m1.model.hybrid import HybridModel, build_model
from megatron_m1.rl.generate import GenerationConfig, Generator, Request
from megatron_m1.rl.sample import Sample
from megatron_m1.rl.stop import RepetitionConfig
from megatron_m1.stages import stages_of
from megatron_m1.training.weights import load_weights
from parallel.checkpoint import CheckpointStore
from parallel.groups import Groups
from parallel.manifest import list_checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How one request is drawn; requests that share it are generated together."""

    temperature: float = 1.0
    top_p: float = 1.0
    end_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds all requests."""

    window: int
    """Most tokens of prompt and answer together."""
    slots: int
    """Sequences generated at once."""


class TextCoder:
    """Text to tokens and back, where the run has a tokenizer; chats where it has a template."""

    def __init__(self, config: RunConfig) -> None:
        path = Path(config.data.tokenizer_path)
        self.encoder: DocumentEncoder | None = config.data.open_tokenizer() if path.is_file() else None
        self.chat: ChatEncoder | None = None
        self._why_no_chat = f"there is no tokenizer at {path}"
        if self.encoder is not None:
            try:
                self.chat = ChatEncoder(path.parent)
            except ValueError as error:
                self._why_no_chat = str(error)

    @property
    def end_token(self) -> int:
        """What ends a text; without a tokenizer, 0, which is `m1 data demo`'s."""
        return self.encoder.end_id if self.encoder else 0

    def tokens(self, text: str) -> list[int]:
        """Raises: ValueError where there is no tokenizer."""
        if self.encoder is None:
            raise ValueError(
                "the run has no tokenizer: a prompt must be a list of token ids; set data.tokenizer_path for text"
            )
        return self.encoder.encode_one(text)[:-1].tolist()

    def chat_prompt(self, messages: Any, tools: Any) -> tuple[list[int], int]:
        """Tokens up to where the assistant speaks, and the token that ends its turn.

        Raises:
            ValueError: no chat template, or it refuses the conversation.
        """
        if self.chat is None:
            raise ValueError(f"the run has no chat template ({self._why_no_chat}): use /v1/completions")
        end = self.chat.end_id
        return self.chat.encode_prompt(messages, tools).tolist(), self.end_token if end is None else end

    def text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of tokens; without a tokenizer, their numbers."""
        if self.encoder is None:
            return " ".join(str(int(token)) for token in tokens)
        return self.encoder.decode(tokens)


class ServedModel:
    """The model of a run on this rank; every method is collective.

    Args:
        config: from `config_of`.
        groups: process groups of its layout, fitted to the job.
        limits: window and slots.

    Raises:
        ValueError: there is no complete checkpoint.
        CheckpointError: it is damaged or of another model.
    """

    def __init__(self, config: RunConfig, groups: Groups, limits: Limits) -> None:
        self.config, self.limits, self._groups = config, limits, groups
        model_parallel_cuda_manual_seed(config.seed, force_reset_rng=True)
        self._chunks: list[HybridModel] = build_model(
            config.model, groups, precision=config.training.precision, seed=None
        )
        self.coder = TextCoder(config)
        self.step = -1
        """Optimizer step of the weights."""
        self.load_s = 0.0
        """Seconds that the last load took."""
        self.load(config.run_dir / "checkpoints", None)

    def load(self, directory: Path, step: int | None) -> None:
        """Take the weights of a step, or of the newest complete checkpoint, of a directory of checkpoints.

        Raises:
            ValueError: there is none.
            CheckpointError: damaged or of another model; the old weights stay.
        """
        started = time.monotonic()
        store = CheckpointStore(directory, self.config.checkpoint, self._groups)
        step = store.newest_complete() if step is None else step
        if step is None:
            raise ValueError(
                f"{directory} has no complete checkpoint: a model is served from one; train the run first, or name "
                "another"
            )
        load_weights(store, step, self._chunks)
        self.step, self.load_s = step, time.monotonic() - started

    def generate(self, requests: Sequence[Request], drawing: Drawing) -> list[Sample]:
        """Samples in the order of their requests, which have keys of their own; the same on every rank."""
        settings = GenerationConfig(
            window=self.limits.window,
            slots=self.limits.slots,
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            end_token=drawing.end_token,
            # whoever asks decides when an answer is too long
            repetition=RepetitionConfig(tokens=0),
        )
        generator = Generator(
            self._chunks, self._groups, settings, version=self.step, text_of=self.coder.text
        )
        return generator.run(requests)


def config_of(run: str, overrides: Sequence[str]) -> RunConfig:
    """The run that is served, as the stage saw it that its newest checkpoint belongs to.

    Args:
        run: a run directory, a preset, or a run file.
        overrides: such as layout.tp=2; the layout may differ from the trained one.
    """
    path = Path(run)
    config = load_run(path / RUN_FILE if path.is_dir() else run, overrides)
    steps = [entry.step for entry in list_checkpoints(config.run_dir / "checkpoints") if entry.complete]
    newest = max(steps, default=0)
    stage = next((stage for stage in stages_of(config) if newest <= stage.last.step), None)
    stage = stage or stages_of(config)[-1]
    # a run with stages has its layout in them; what the user says for all of it comes last
    return _overridden(stage.config, overrides) if config.stages else stage.config


def _overridden(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A resolved run with `section.field=value` laid over it."""
    values = config.model_dump(mode="json")
    for text in overrides:
        name, value = runfile.parse_override(text)
        values = runfile.merge(values, runfile.nest(name, value))
    try:
        return RunConfig.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ValueError("\n".join(runfile.sentence_of(detail) for detail in error.errors())) from error
