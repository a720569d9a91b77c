"""Slopes against numbers worked out by hand from the published formula."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda.lightning.decay import lightning_slopes


def test_slopes_of_minimax_m1_at_its_first_and_last_lightning_layers():
    first, last = lightning_slopes(64, 0, 80), lightning_slopes(64, 78, 80)
    assert first.dtype == torch.float32
    # 2^(-1/8) and 2^-8, times 1 + 1e-5; then times 1/79 + 1e-5
    assert first[0].item() == pytest.approx(0.9170040432 * 1.00001, rel=1e-7)
    assert first[63].item() == pytest.approx(0.00390625 * 1.00001, rel=1e-7)
    assert last[63].item() == pytest.approx(0.00390625 * (1 / 79 + 1e-5), rel=1e-6)


def test_heads_between_two_powers_take_every_other_slope_of_the_larger():
    slopes = lightning_slopes(6, 0, 2) / 1.00001
    expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert torch.allclose(slopes, torch.tensor(expected), rtol=1e-6)


def test_a_single_layer_has_the_factor_of_the_first():
    assert torch.equal(lightning_slopes(4, 0, 1), lightning_slopes(4, 0, 7))


def test_a_layer_outside_the_model_is_refused():
    with pytest.raises(ValueError, match="layer_index=4 is outside a model of 4 layers: 0 to 3"):
        lightning_slopes(4, 4, 4)
