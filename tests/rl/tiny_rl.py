"""The smallest whole life of a model: pretraining, two longer contexts, fine-tuning, reinforcement learning.

Two ranks, another layout in every stage, texts made by rule, a tokenizer of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from data_pipeline.synthetic import make_problem
from data_pipeline.tokenize import train_byte_level_bpe

VOCAB = 384
RL_FIRST = 8
"""Steps of the four stages before the last."""
SHORT_FIRST = 2
"""Those of the first alone."""

_RUN = """\
name: tiny-rl
run_dir: {run_dir}
model:
  {{num_layers: 4, softmax_every: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 4, head_dim: 8, rotary_dim: 4,
    num_experts: 4, ffn_size: 32, vocab_size: {vocab}}}
data:
  sources:
    - {{name: copy, kind: synthetic, task: copy, length_tokens: 24}}
    - {{name: pairs, kind: synthetic, task: key_value, length_tokens: 64}}
  held_out: [{{name: copy, kind: synthetic, task: copy, length_tokens: 24}}]
  tokenizer_path: {tokenizer}
  front: thread
training: {{steps: 2, sequence_length: 64, micro_batch_size: 1, precision: fp32, evaluation_rows: 0}}
schedule: {{peak_learning_rate: 3.0e-3, batch_ramp: [{{from_tokens: 0, global_batch_tokens: 256}}]}}
optimizer: {{epsilon: 1.0e-15}}
checkpoint: {{every_steps: 1, keep: 3}}
tracking: {{enabled: false}}
rl:
  sources:
    - {{name: copy, kind: synthetic, task: copy, length_words: 1, count: 12}}
    - {{name: sums, kind: synthetic, task: arithmetic, length_words: 3, count: 8}}
  group_size: 4
  groups_per_batch: 4
  updates_per_batch: 2
  most_rounds: 2
  rollout: {{slots: 8}}
  window: {{stages_tokens: [44]}}
  scoring: {{format_weight: 0.0, overlong: {{weight: 0.05, buffer_share: 0.9}}}}
  pool: {{workers: 1}}
  table_every_batches: 2
stages:
  - {{name: pretrain, layout: {{tp: 2}}}}
  - name: context 128
    layout: {{cp: 2}}
    model: {{rotary_base: 20000.0}}
    training: {{sequence_length: 128}}
  - name: context 256
    layout: {{pp: 2}}
    model: {{rotary_base: 40000.0}}
    training: {{sequence_length: 256}}
  - name: answers
    mix: {{weights: {{copy: 1.0}}}}
    layout: {{dp: 2, ep: 2}}
    model: {{rotary_base: 40000.0}}
  - name: policy
    kind: rl
    layout: {{pp: 2}}
    model: {{rotary_base: 40000.0}}
    training: {{steps: {rl_steps}}}
    schedule: {{peak_learning_rate: 1.0e-3}}
"""


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE of the texts of the tasks."""
    tasks = "copy", "arithmetic", "key_value"
    texts = [make_problem(task, 0, number, 4).text for task in tasks for number in range(50)]
    train_byte_level_bpe(texts, VOCAB, path)


def write_run_file(run_dir: Path, tokenizer: Path, *, rl_steps: int = 4) -> Path:
    """A run file beside the run directory; `RL_FIRST` steps come before those of reinforcement learning."""
    path = run_dir.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_RUN.format(run_dir=run_dir, vocab=VOCAB, tokenizer=tokenizer, rl_steps=rl_steps))
    return path


def write_short_file(
    run_dir: Path, layout: dict[str, int], rl_steps: int, rl: dict[str, Any], tracking: dict[str, Any]
) -> Path:
    """A run of the first and the last stage alone, `SHORT_FIRST` steps before reinforcement learning, in one layout.

    Args:
        run_dir: the tokenizer lies beside it.
        layout: of both stages.
        rl_steps: of the last.
        rl: laid over the section.
        tracking: the section.
    """
    path = write_run_file(run_dir, run_dir.with_name("tokenizer.json"), rl_steps=rl_steps)
    values = yaml.safe_load(path.read_text())
    first, *_, last = values["stages"]
    values["stages"] = [stage | {"layout": layout, "model": {}} for stage in (first, last)]
    values |= {"rl": values["rl"] | rl, "tracking": tracking}
    path.write_text(yaml.safe_dump(values))
    return path
