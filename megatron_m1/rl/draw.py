"""Drawing the next token. The random number belongs to (seed, prompt, sample, position): no batch order changes it.

The draw inverts the cumulative distribution, so that logits which differ in their last bits, as those of two layouts
do, give another token only if the number falls into that gap, about once in a million tokens.
Legend: n sequences, P vocabulary entries.
"""

from __future__ import annotations

import numpy as np
import torch


def sample_keys(seed: int, prompt_ids_n: np.ndarray, sample_ids_n: np.ndarray) -> np.ndarray:
    """uint64 [n], one per (prompt, sample): the seed of a sample, whichever engine draws it.

    splitmix64 (Steele et al., OOPSLA 2014), chained.
    """
    state_n = np.full(len(prompt_ids_n), seed, dtype=np.uint64)
    for part_n in (prompt_ids_n, sample_ids_n):
        state_n = _chained(state_n, part_n)
    return state_n


def uniforms(keys_n: np.ndarray, positions_n: np.ndarray) -> np.ndarray:
    """fp64 [n] in [0, 1), one per sample's key (uint64) and position of its next token."""
    return (_chained(keys_n, positions_n) >> np.uint64(11)) * 2.0**-53


def _chained(state_n: np.ndarray, part_n: np.ndarray) -> np.ndarray:
    return _mix(state_n ^ _mix(part_n.astype(np.uint64)))


def _mix(x_n: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x_n = x_n + np.uint64(0x9E3779B97F4A7C15)
        x_n = (x_n ^ (x_n >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x_n = (x_n ^ (x_n >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x_n ^ (x_n >> np.uint64(31))


def draw(
    logits_nP: torch.Tensor, uniforms_n: torch.Tensor, *, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per sequence.

    Args:
        logits_nP: fp32 [n, P].
        uniforms_n: fp64 [n] in [0, 1).
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: draw among the most probable tokens whose probabilities first reach this sum; 1 is all.

    Returns:
        Tokens int64 [n], and their log-probabilities fp32 [n] in nats at temperature 1 without top-p, which is what
        training computes.
    """
    log_probs_nP = logits_nP.log_softmax(-1)
    if temperature == 0:
        tokens_n = logits_nP.argmax(-1)
    else:
        probs_nP = (logits_nP / temperature).softmax(-1).double()
        if top_p < 1:
            probs_nP = _most_probable(probs_nP, top_p)
        cumulative_nP = probs_nP.cumsum(-1)
        aim_n1 = uniforms_n[:, None] * cumulative_nP[:, -1:]
        # right=True never lands on a token of probability 0
        tokens_n = torch.searchsorted(cumulative_nP, aim_n1, right=True)[:, 0].clamp(
            max=logits_nP.shape[1] - 1
        )
    return tokens_n, log_probs_nP.gather(1, tokens_n[:, None])[:, 0]


def _most_probable(probs_nP: torch.Tensor, top_p: float) -> torch.Tensor:
    sorted_nP, order_nP = probs_nP.sort(dim=-1, descending=True, stable=True)
    before_nP = sorted_nP.cumsum(-1) - sorted_nP
    return torch.zeros_like(probs_nP).scatter(-1, order_nP, sorted_nP * (before_nP < top_p))
