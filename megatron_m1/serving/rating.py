"""`m1 data pass-rate` from start to end: a run's own model, or a server, answers prompts; rl/pass_rate.py keeps count.

A run's weights generate under its layout, on ranks started here like those of `m1 generate`; a server is asked for
texts (rl/http_texts.py). `m1 serve` of the same weights gives the texts that the run gives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from megatron_m1 import runfile
from megatron_m1.rl import http_texts
from megatron_m1.rl.draw import sample_keys
from megatron_m1.rl.engine_config import HttpEngineConfig
from megatron_m1.rl.generate import Request
from megatron_m1.rl.http_engine import EngineError, check_model
from megatron_m1.rl.pass_rate import (
    Answer,
    PassRateConfig,
    Rate,
    RateRecord,
    dropped_path,
    rate_all,
    record_path,
    write_chosen,
)
from megatron_m1.rl.prompts import PromptSource, RewardKind, read_objects
from megatron_m1.rl.rewards.interface import Reward, check_prompts, check_rewards
from megatron_m1.rl.rewards.pool import PoolConfig, RewardPool
from megatron_m1.rl.sample import Prompt
from megatron_m1.serving.model import Drawing, ServedModel
from megatron_m1.serving.run import opened_model

VERIFYING = ("exact", "math", "logic", "code", "software")
Report = Callable[[str, int, int], None]
"""(what, done, total)."""
Answered = Iterator[tuple[Prompt, Sequence[Answer]]]
# a call of the generator fills its slots this often, so that few of them stand empty at its end
_TURNS = 4
_UNREAD = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """Which prompts are rated, how, and where the result goes.

    Raises:
        ValueError: a reward that does not verify, or prompts that would be written over.
    """

    prompts: Path
    """JSONL, as a source of kind `file`."""
    reward: str
    """One of VERIFYING."""
    out: Path
    """Where the prompts go that are kept."""
    config: PassRateConfig = field(default_factory=PassRateConfig)

    def __post_init__(self) -> None:
        if self.reward not in VERIFYING:
            raise ValueError(
                f"--reward {self.reward!r} gives no pass rate: allowed are {', '.join(VERIFYING)}, which verify; "
                "choose the one that fits the answers of the file"
            )
        if self.out.absolute() == self.prompts.absolute():
            raise ValueError(
                f"--out {self.out} is the file of prompts itself, which stays as it is: name another file for those "
                "that are kept"
            )

    @property
    def source(self) -> PromptSource:
        """The prompts as a source of a run."""
        reward = cast(RewardKind, self.reward)
        return PromptSource(name="prompts", path=str(self.prompts), reward=reward, place=self.config.place)

    def read(self) -> list[dict[str, Any]]:
        """The prompts as they stand in their file, each one usable.

        Raises:
            ValueError: the file cannot be read, is empty, or has a prompt whose answer its reward cannot use.
        """
        found = list(read_objects(self.source))
        if not found:
            raise ValueError(f"{self.prompts} has 0 prompts: it needs 1 or more; name another file")
        check_prompts((self.prompt(number, found) for number in range(len(found))), self.rewards())
        return found

    def prompt(self, number: int, objects: Sequence[dict[str, Any]]) -> Prompt:
        """One of them, without its tokens."""
        values = objects[number]
        return Prompt(
            prompt_id=number,
            tokens_S=_UNREAD,
            text=values["prompt"],
            task="prompts",
            answer=values.get("answer"),
        )

    def rewards(self) -> dict[str, Reward]:
        """The reward, by the name of its task."""
        return {"prompts": self.source.build_reward()}

    def about(self, by: str) -> dict[str, Any]:
        """What a rate depends on; the bounds may change without a new answer."""
        free = ("above", "below", "at_once", "workers")
        settings = {name: value for name, value in asdict(self.config).items() if name not in free}
        prompts = hashlib.sha256(self.prompts.read_bytes()).hexdigest()
        return {"prompts": prompts, "by": by, "reward": self.reward, **settings}


def settings_of(overrides: Sequence[str]) -> tuple[PassRateConfig, list[str]]:
    """The section `rate` of a command line, and what is left for the run.

    Raises:
        ValueError: an unknown field, or a value that it does not take.
    """
    values: dict[str, Any] = {}
    for_run = []
    for text in overrides:
        name, value = runfile.parse_override(text)
        if name.startswith("rate."):
            values = runfile.merge(values, runfile.nest(name.removeprefix("rate."), value))
        else:
            for_run.append(text)
    runfile.refuse_unknown_keys(PassRateConfig, values, source="section rate")
    try:
        # JSON mode, as for run files
        return TypeAdapter(PassRateConfig).validate_json(json.dumps(values), strict=True), for_run
    except ValidationError as error:
        raise ValueError("\n".join(runfile.sentence_of(detail) for detail in error.errors())) from error


def endpoint(url: str, model: str, key_file: str, at_once: int, for_run: Sequence[str]) -> HttpEngineConfig:
    """The server that answers.

    Raises:
        ValueError: no model is named, or there are settings of a run.
    """
    if for_run:
        raise ValueError(
            f"{' '.join(for_run)} and --by {url}: with a server only rate.FIELD=VALUE is allowed, since there is no "
            "run to lay it over; leave it out, or name a run"
        )
    if not model:
        raise ValueError(
            f"--by {url} names a server and --model is empty: a server may have several models; name one with --model"
        )
    return HttpEngineConfig(url=url, model=model, key_file=key_file or None, concurrency=at_once)


def rate_by_server(rating: Rating, endpoint: HttpEngineConfig, report: Report) -> None:
    """Rate all prompts by the model of a server, write the files and print the table.

    Raises:
        ValueError: prompts, record or reward cannot be used, or the server does not answer.
    """
    objects = rating.read()
    try:
        check_model(endpoint, "--by")
        with RateRecord(
            record_path(rating.out), rating.about(f"{endpoint.model} at {endpoint.url}")
        ) as record:
            asked = [rating.prompt(number, objects) for number in _missing(record.rates, objects)]
            _rate(rating, objects, record, http_texts.answers_of(endpoint, asked, rating.config), report)
    except EngineError as error:
        # written for users, as every plain ValueError is
        raise ValueError(str(error)) from error


def rate_by_run(rating: Rating, run: str, overrides: Sequence[str], report: Report) -> None:
    """Rate all prompts by a run's newest weights, write the files and print the table; on every rank.

    overrides: all of the command line, those of section `rate` among them.

    Raises:
        ValueError: prompts, record, reward or run cannot be used.
        SystemExit: a local rank failed.
    """
    objects = rating.read()
    options = ["--by", run, "--reward", rating.reward, "--out", str(rating.out)]
    command = ["data", "pass-rate", str(rating.prompts), *options, "--", *overrides]
    _, for_run = settings_of(overrides)
    with opened_model(command, run, for_run, 0, rating.config.at_once) as model:
        if model is None:
            return
        record: RateRecord | None = None
        told: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                by = f"step {model.step} of {model.config.run_dir.absolute()}"
                record = RateRecord(record_path(rating.out), rating.about(by))
                told = [_missing(record.rates, objects), None]
            except ValueError as error:
                told = [None, str(error)]
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise ValueError(told[1])
        answered = _own_answers(model, rating, [rating.prompt(number, objects) for number in told[0]])
        if record is None:
            for _ in answered:
                pass
            return
        with record:
            _rate(rating, objects, record, answered, report)


def _missing(rates: dict[int, Rate], objects: Sequence[Any]) -> list[int]:
    return [number for number in range(len(objects)) if number not in rates]


def _own_answers(model: ServedModel, rating: Rating, prompts: Sequence[Prompt]) -> Answered:
    """The answers of a run's own model; collective."""
    config, window = rating.config, model.limits.window
    size = max(1, _TURNS * model.limits.slots * model.config.layout.dp // config.samples)
    read = [_read(model, prompt, chat=config.chat) for prompt in prompts]
    for prompt, (tokens, _) in zip(prompts, read, strict=True):
        if len(tokens) >= window:
            raise ValueError(
                f"prompt {prompt.prompt_id} has {len(tokens)} tokens: the run's window of {window} tokens "
                "(training.sequence_length) leaves no room for an answer; drop the prompt, or raise it"
            )
    for first in range(0, len(prompts), size):
        part = slice(first, first + size)
        requests = [
            request
            for prompt, (tokens, _) in zip(prompts[part], read[part], strict=True)
            for request in _requests(prompt, tokens, config)
        ]
        end_token = read[first][1]
        samples = model.generate(requests, Drawing(temperature=config.temperature, end_token=end_token))
        texts = [
            Answer(
                text=model.coder.text([token for token in sample.tokens_S if token != end_token]),
                was_cut=sample.finish == "length",
            )
            for sample in samples
        ]
        for number, prompt in enumerate(prompts[part]):
            yield prompt, texts[number * config.samples : (number + 1) * config.samples]


def _read(model: ServedModel, prompt: Prompt, *, chat: bool) -> tuple[list[int], int]:
    """Tokens of a prompt, and the token that ends its answer."""
    if chat:
        return model.coder.chat_prompt([{"role": "user", "content": prompt.text}], None)
    return model.coder.tokens(prompt.text), model.coder.end_token


def _requests(prompt: Prompt, tokens: list[int], config: PassRateConfig) -> Iterable[Request]:
    asked = Prompt(
        prompt_id=prompt.prompt_id,
        tokens_S=np.array(tokens, dtype=np.int64),
        text=prompt.text,
        task=prompt.task,
    )
    numbers = np.arange(config.samples)
    keys = sample_keys(config.seed, np.full(config.samples, prompt.prompt_id), numbers)
    for number, key in zip(numbers.tolist(), keys.tolist(), strict=True):
        yield Request(prompt=asked, sample_id=number, key=key, max_tokens=config.max_tokens)


def _rate(
    rating: Rating,
    objects: Sequence[dict[str, Any]],
    record: RateRecord,
    answered: Answered,
    report: Report,
) -> None:
    """Judge the answers as they come, then write and print what was found."""
    rewards = rating.rewards()
    check_rewards(rewards)
    with RewardPool(rewards, PoolConfig(workers=rating.config.workers)) as pool:
        report("prompts", len(record.rates), len(objects))
        for rate in rate_all(answered, pool):
            record.add(rate)
            report("prompts", len(record.rates), len(objects))
    fates = write_chosen(rating.out, objects, record.rates, rating.config)
    _print(rating, fates, list(record.rates.values()))


def _print(rating: Rating, fates: dict[str, int], rates: Sequence[Rate]) -> None:
    config, total = rating.config, sum(fates.values())
    table = Table("prompts", "number", "share", "pass rate", box=None, pad_edge=False)
    meaning = {
        "kept": f"between {config.above:g} and {config.below:g}",
        "too hard": f"{config.above:g} or less",
        "too easy": f"{config.below:g} or more",
        "no verdict": "the reward failed on most answers",
    }
    for fate, count in fates.items():
        table.add_row(fate, f"{count:,}", f"{count / total:.1%}", meaning[fate])
    console = Console(width=120)
    console.print(table, highlight=False)
    num_answers = len(rates) * config.samples
    cut, failed = sum(rate.cut for rate in rates), sum(sum(rate.failures.values()) for rate in rates)
    for line in (
        f"{num_answers:,} answers: {cut:,} cut at {config.max_tokens:,} tokens or the window, {failed:,} without a "
        "verdict",
        f"kept prompts -> {rating.out}; the others -> {dropped_path(rating.out)}",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
