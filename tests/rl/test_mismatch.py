"""The mismatch of generation and training: measured on hand-made numbers, on our own model, and as M1's Figure 3."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_m1.model.packed import Packed
from megatron_m1.rl.mismatch import Mismatch, MismatchConfig, MismatchError, check, measure
from tests.rl import generate_ranks as ranks
from tests.tolerances import GENERATED_LOG_PROB


def of_model(alone, **options) -> Mismatch:
    """Of what a model generates token by token and what training computes of the same texts in one pass each."""
    (chunk,) = ranks.build(alone, **options)
    samples = ranks.generate([chunk], alone, ranks.requests())
    prompts = {prompt.prompt_id: prompt for prompt in ranks.prompts()}
    trained = []
    for sample in samples:
        prompt = prompts[sample.prompt_id].tokens_S
        whole = torch.from_numpy(np.concatenate([prompt, sample.tokens_S]))
        packed = Packed.from_lengths(
            [len(whole) - 1], row_tokens=len(whole) - 1, auxiliary_weight=0.0, device=alone.device
        )
        with torch.no_grad():
            losses_T = chunk(whole[:-1], packed, whole[1:])
        trained.append(-losses_T[len(prompt) - 1 :].numpy())
    return measure(np.concatenate(trained), np.concatenate([sample.log_probs_S for sample in samples]))


def test_token_by_token_and_in_one_pass_are_the_same_model(alone):
    found = of_model(alone)
    assert found.num_tokens > 200
    assert found.nats[-1] < GENERATED_LOG_PROB
    assert found.correlation > 1 - 1e-6


def test_a_head_in_fp32_brings_the_two_closer(alone):
    # bf16 layers under both heads, as in MiniMax-M1's Figure 3: 0.987 before, 0.997 after
    fp32 = of_model(alone, precision="bf16")
    bf16 = of_model(alone, precision="bf16", model=replace(ranks.MODEL, head_fp32=False))
    assert fp32.correlation > bf16.correlation, (fp32, bf16)
    assert fp32.nats[0] < bf16.nats[0], (fp32, bf16)


def test_percentiles_and_correlation_are_those_of_the_numbers():
    p = np.array([0.1, 0.2, 0.4, 0.8])
    q = np.array([0.2, 0.4, 0.8, 0.1])
    found = measure(np.log(p), np.log(q))
    # distances ln 2, ln 2, ln 2, ln 8
    assert found.num_tokens == 4
    assert np.allclose(found.nats[0], np.log(2)) and np.allclose(found.nats[-1], np.log(8))
    deviations = (p - p.mean()) * (q - q.mean())
    expected = deviations.sum() / np.sqrt(((p - p.mean()) ** 2).sum() * ((q - q.mean()) ** 2).sum())
    assert found.correlation == pytest.approx(expected)
    assert measure(np.log(p), np.log(2 * p) - np.log(2)).correlation == pytest.approx(1.0)


def test_the_gate_opens_and_closes_where_it_is_told():
    good, config = Mismatch(100, 0.995, (0.0, 0.1, 3.0)), MismatchConfig()
    check(good, config)
    for bad in (
        replace(good, correlation=0.985),
        replace(good, nats=(0.0, 1.5, 3.0)),
        replace(good, correlation=float("nan")),
    ):
        with pytest.raises(MismatchError, match="generation and training disagree on 100 tokens"):
            check(bad, config)
        check(replace(bad, num_tokens=10), config)
