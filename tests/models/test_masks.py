"""Masks are a function of their seed, on every machine and with every NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from models.masks import draw_masks


def test_a_mask_is_0_or_1_over_keep() -> None:
    masks = draw_masks(seed=3, samples=32, width=100, keep=0.7)
    assert masks.shape == (32, 100)
    assert masks.dtype == np.float32
    assert set(np.unique(masks).tolist()) == {0, float(np.float32(1 / 0.7))}


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_units_are_kept_with_the_probability_that_was_asked_for(keep: float) -> None:
    kept = draw_masks(seed=0, samples=400, width=100, keep=keep) > 0
    assert kept.mean() == pytest.approx(keep, abs=5 * np.sqrt(keep * (1 - keep) / 40_000))


def test_all_units_are_kept_with_probability_1() -> None:
    np.testing.assert_array_equal(draw_masks(seed=0, samples=4, width=50, keep=1), 1)


def test_the_same_seed_draws_the_same_masks_for_ever() -> None:
    """Written down on NumPy 2.4: a bundle made then is served with these."""
    kept = draw_masks(seed=7, samples=2, width=16, keep=0.5) > 0
    assert ["".join("01"[bit] for bit in row) for row in kept.astype(int)] == ["0111101010001000", "1001111101101111"]


def test_another_seed_draws_others() -> None:
    assert (draw_masks(1, 32, 64, 0.5) != draw_masks(2, 32, 64, 0.5)).mean() == pytest.approx(0.5, abs=0.1)


def test_the_largest_seed_of_a_manifest_will_do() -> None:
    assert draw_masks(2**63 - 1, 1, 3, 0.5).shape == (1, 3)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, float("nan")])
def test_a_probability_outside_0_to_1_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=r"expected a probability of keeping a unit in \(0, 1\], got"):
        draw_masks(0, 1, 1, keep)
