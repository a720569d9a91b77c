"""A run directory with weights nobody trained, and a server of it in this process."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer

from data_pipeline.tokenize import train_byte_level_bpe
from megatron_m1.config import RunConfig, dump_run
from megatron_m1.rl.remote import Remote
from megatron_m1.serving.desk import Desk
from megatron_m1.serving.http import Server
from megatron_m1.serving.model import Limits, ServedModel, config_of
from megatron_m1.training.weights import WeightsExport
from parallel.groups import Groups
from tests.rl import generate_ranks

MODEL = dataclasses.replace(generate_ranks.MODEL, vocab_size=320)
WINDOW = 64
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_run(directory: Path, groups: Groups) -> tuple[RunConfig, list[Any]]:
    """A run with a tokenizer, a chat template, and checkpoints of steps 1 and 2; its chunks are those of step 2."""
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir(parents=True)
    train_byte_level_bpe(["user assistant say yes no amber birch copper"], 290, tokenizer / "tokenizer.json")
    table = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    table.add_special_tokens([AddedToken("<|end|>", special=True)])
    table.save(str(tokenizer / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "eos_token": "<|end|>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    config = RunConfig.model_validate(
        {
            "name": "served",
            "run_dir": directory / "run",
            "model": dataclasses.asdict(MODEL),
            "data": {"tokenizer_path": str(tokenizer / "tokenizer.json")},
            "training": {"steps": 2, "sequence_length": WINDOW, "precision": "fp32"},
            "schedule": {"warmup_steps": 0, "batch_ramp": [{"from_tokens": 0, "global_batch_tokens": 1024}]},
        }
    )
    config.run_dir.mkdir()
    (config.run_dir / "run.yaml").write_text(dump_run(config))
    chunks = generate_ranks.build(groups, model=MODEL)
    export = WeightsExport(config.run_dir / "checkpoints", chunks, groups)
    export(1)
    with torch.no_grad():
        for chunk in chunks:
            for weight in chunk.parameters():
                weight.mul_(1.01)
    export(2)
    return config, chunks


@contextmanager
def serving(run_dir: Path, groups: Groups) -> Iterator[Server]:
    """The server of a run, in threads of this process."""
    model = ServedModel(config_of(str(run_dir), []), groups, Limits(window=WINDOW, slots=4))
    desk = Desk()
    thread = threading.Thread(target=desk.serve, args=(model,))
    with Server(model, desk, model.config.name, "127.0.0.1", 0) as server:
        thread.start()
        try:
            yield server
        finally:
            desk.close()
            thread.join(30)
            assert not thread.is_alive()


def post(server: Server, path: str, **body: Any) -> Any:
    """An answer below /v1."""
    return Remote(url=server.url).exchange("POST", path, body)
