"""What the ranks of the evaluation tests do; every function here runs inside `run_ranks`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_m1.longcontext import evaluate
from megatron_m1.longcontext.config import LongContextConfig
from megatron_m1.longcontext.evaluate import find_needles, loss_by_position
from parallel.groups import Groups, create_groups, destroy_groups
from parallel.layout import Layout
from tests.rl.generate_ranks import build

BOUND_NATS = 12.0
CONFIG = LongContextConfig(needle_lengths=(64, 128), needle_depths=3, needle_trials=5)


@dataclass(frozen=True)
class Row:
    """A row of random tokens in ragged documents; the loss counts at `asked` of them."""

    tokens_S: np.ndarray
    labels_S: np.ndarray
    loss_mask_S: np.ndarray
    document_lengths: np.ndarray
    sample_id: int


def make_row(tokens: int, depth: float, trial: int) -> Row:
    """One target per row, so that a share between 0 and 1 of the rows is found by chance of the weights."""
    rng = np.random.default_rng([tokens, round(depth * 10), trial])
    ids = rng.integers(0, 64, tokens + 1)
    mask = np.zeros(tokens, dtype=np.float32)
    mask[rng.integers(tokens // 2, tokens)] = 1
    first = int(rng.integers(1, tokens - 1))
    return Row(ids[:-1], ids[1:], mask, np.array([first, tokens - first]), trial)


def measure(groups: Groups) -> tuple[Any, Any]:
    """Needle grid and losses by position of the test model."""
    chunks = build(groups)
    rows = [make_row(128, 0.0, trial) for trial in range(3)]
    rows = [
        Row(r.tokens_S, r.labels_S, np.ones(128, np.float32), r.document_lengths, r.sample_id) for r in rows
    ]
    curve = loss_by_position(chunks, groups, rows)
    # random weights find next to nothing: with a looser bound some answers pass and some do not
    evaluate.FOUND_BELOW_NATS = BOUND_NATS
    return find_needles(chunks, groups, CONFIG, make_row), curve


def in_layouts(layouts: list[Layout]) -> list[tuple[Any, Any]]:
    """The same measurement in several layouts of one world size."""
    found = []
    for layout in layouts:
        groups = create_groups(layout, torch.device("cpu"))
        found.append(measure(groups))
        destroy_groups()
    return found
