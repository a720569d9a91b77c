"""The smallest real run: shards of counting documents, and a run file that trains on them in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.index import ShardWriter
from megatron_m1 import runfile

VOCAB = 128

_RUN = """\
name: tiny-test
run_dir: {run_dir}
model:
  {{num_layers: 8, hidden_size: 32, num_heads: 4, num_kv_heads: 4, head_dim: 8, rotary_dim: 4, num_experts: 4,
    ffn_size: 32, vocab_size: {vocab}}}
layout: {{tp: 2, ep: 2}}
data:
  sources: [{{prefix: {source}}}]
  held_out: [{{prefix: {held_out}}}]
  tokenizer_path: {tokenizer}
training: {{steps: {steps}, sequence_length: 64, micro_batch_size: 1, precision: fp32, evaluation_rows: 4}}
schedule:
  peak_learning_rate: 3.0e-3
  batch_ramp: [{{from_tokens: 0, global_batch_tokens: 256}}, {{from_tokens: 1024, global_batch_tokens: 512}}]
checkpoint: {{every_steps: 2, keep: 3}}
tracking: {{enabled: false}}
"""


def write_shards(directory: Path) -> None:
    """A training shard and a held-out one: documents of 1 to 150 tokens that count up from a random token, so that
    the next token can be learnt."""
    random = np.random.default_rng(0)
    for name, documents in (("train", 400), ("held_out", 40)):
        writer = ShardWriter(directory / name, VOCAB)
        for _ in range(documents):
            start, length = random.integers(0, VOCAB), random.integers(1, 150)
            writer.add_document((start + np.arange(length)) % VOCAB)
        writer.finish()


def data_in(directory: Path) -> DataConfig:
    """The two shards as a run's data; they have no tokenizer."""
    return DataConfig(
        sources=(SourceConfig(prefix=str(directory / "train")),),
        held_out=(SourceConfig(prefix=str(directory / "held_out")),),
        tokenizer_path=str(directory / "none.json"),
    )


# Two layers and few rows on a grid of tp 2 x pp 2: for tests of what happens around the steps, not in them.
SMALLEST: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 2, "softmax_every": 2},
    "layout": {"tp": 2, "pp": 2, "ep": 1},
    "training": {"evaluation_rows": 2},
    "schedule": {"batch_ramp": [{"from_tokens": 0, "global_batch_tokens": 128}]},
}


def write_run_file(run_dir: Path, data: DataConfig, *, steps: int, **sections: dict[str, Any]) -> Path:
    """A run file beside the run directory; `sections` are laid over its own."""
    path = run_dir.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _RUN.format(
        run_dir=json.dumps(str(run_dir)),
        vocab=VOCAB,
        source=json.dumps(data.sources[0].prefix),
        held_out=json.dumps(data.held_out[0].prefix),
        tokenizer=json.dumps(data.tokenizer_path),
        steps=steps,
    )
    if sections:
        text = yaml.safe_dump(runfile.merge(yaml.safe_load(text), sections))
    path.write_text(text)
    return path
