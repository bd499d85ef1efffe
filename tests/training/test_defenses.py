"""Losses against a few lines of NumPy, centers and augmentation against what defines them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.networks.metric import max_mahalanobis_centers
from training.adversarial import adversarial_loss
from training.augment import augment
from training.averaging import WeightAverage
from training.bayesian import masked_loss
from training.loop import one_cycle
from training.metric import center_loss
from training.recipe import Schedule
from training.step import step_generator


def log_softmax(z: np.ndarray) -> np.ndarray:
    return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))


def test_the_adversarial_loss_is_cross_entropy() -> None:
    z, y = np.random.default_rng(0).normal(size=(5, 4)), np.array([0, 1, 2, 3, 1])
    expected = -log_softmax(z)[np.arange(5), y].mean()
    assert float(adversarial_loss(torch.from_numpy(z), torch.from_numpy(y), 0.0)) == pytest.approx(expected)


def test_the_center_loss_adds_half_the_squared_distance_to_the_own_center() -> None:
    rng = np.random.default_rng(1)
    features, centers, y = rng.normal(size=(6, 3)), rng.normal(size=(4, 3)), np.array([0, 1, 2, 3, 0, 1])
    squared = ((features[:, None] - centers) ** 2).sum(axis=2)
    expected = -log_softmax(-squared)[np.arange(6), y].mean() + 0.1 * 0.5 * squared[np.arange(6), y].mean()
    assert float(center_loss(torch.from_numpy(-squared), torch.from_numpy(y), 0.1, 0.0)) == pytest.approx(expected)


def test_the_masked_loss_is_the_mean_over_masks() -> None:
    z, y = np.random.default_rng(2).normal(size=(3, 5, 4)), np.array([0, 1, 2, 3, 1])
    expected = np.mean([-log_softmax(z[t])[np.arange(5), y].mean() for t in range(3)])
    assert float(masked_loss(torch.from_numpy(z), torch.from_numpy(y), 0.0)) == pytest.approx(expected)


@pytest.mark.parametrize(("classes", "features"), [(2, 2), (10, 10), (10, 64)])
def test_class_centers_have_equal_norm_and_equal_maximal_distance(classes: int, features: int) -> None:
    """Of k points on a sphere the smallest distance is largest where every cosine is -1/(k-1) (a simplex)."""
    centers = max_mahalanobis_centers(classes, features, radius=3.0).numpy()
    cosines = centers @ centers.T / 9
    assert np.allclose(np.diag(cosines), 1, atol=1e-5)
    assert np.allclose(cosines[~np.eye(classes, dtype=bool)], -1 / (classes - 1), atol=1e-5)


def test_too_few_features_for_the_centers_are_refused() -> None:
    with pytest.raises(ValueError, match="10 class centers need a feature space of at least 10 dimensions, got 9"):
        max_mahalanobis_centers(10, 9, 1.0)


@pytest.mark.parametrize("symmetry", ["none", "mirror", "dihedral"])
def test_augmentation_without_shift_only_moves_pixels(symmetry: str) -> None:
    pixels = torch.randint(0, 256, (64, 6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moved = augment(pixels, symmetry, 0, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    assert torch.equal(moved.flatten(1).sort(dim=1).values, pixels.flatten(1).sort(dim=1).values)
    forms = {"none": 1, "mirror": 2, "dihedral": 8}[symmetry]
    one = torch.arange(36, dtype=torch.uint8).reshape(1, 6, 6, 1).expand(400, -1, -1, -1)
    seen = {tuple(image.flatten().tolist()) for image in augment(one, symmetry, 0, torch.Generator().manual_seed(2))}  # type: ignore[arg-type]
    assert len(seen) == forms


def test_a_shift_keeps_the_middle_and_follows_its_generator() -> None:
    pixels = torch.full((8, 10, 10, 1), 7, dtype=torch.uint8)
    assert torch.equal(augment(pixels, "none", 2, torch.Generator().manual_seed(0)), pixels)
    ramp = torch.arange(100, dtype=torch.uint8).reshape(1, 10, 10, 1).expand(8, -1, -1, -1)
    first = augment(ramp, "none", 2, torch.Generator().manual_seed(5))
    assert torch.equal(first, augment(ramp, "none", 2, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, ramp)


def test_the_weight_average_converges_to_constant_weights_and_copies_counters() -> None:
    network = torch.nn.BatchNorm1d(2)
    average = WeightAverage(network, decay=0.9)
    network.load_state_dict({**network.state_dict(), "weight": torch.full((2,), 3.0), "num_batches_tracked": torch.tensor(11)})
    for step in range(200):
        average.update(network, step)
    averaged = average.network.state_dict()
    assert torch.allclose(averaged["weight"], torch.full((2,), 3.0), atol=1e-4)
    assert int(averaged["num_batches_tracked"]) == 11


def test_one_cycle_rises_to_the_peak_and_falls_to_nothing() -> None:
    schedule = Schedule(learning_rate=0.2, warm_up=0.25)
    assert one_cycle(0.25, schedule) == pytest.approx(0.2)
    assert one_cycle(0.0, schedule) < 0.001
    assert one_cycle(0.9999, schedule) < 1e-6


def test_one_cycle_stays_at_its_peak_until_it_is_to_fall() -> None:
    schedule = Schedule(learning_rate=0.2, warm_up=0.25, fall_from=0.6)
    assert [one_cycle(share, schedule) for share in (0.25, 0.4, 0.6)] == pytest.approx([0.2] * 3)
    assert one_cycle(0.125, schedule) == pytest.approx(0.1)
    assert one_cycle(0.8, schedule) == pytest.approx(0.1)
    assert one_cycle(0.9999, schedule) < 1e-6


def test_step_generators_depend_on_seed_purpose_and_step() -> None:
    def draw(seed: int, purpose: str, step: int) -> float:
        return float(torch.rand(1, generator=step_generator(torch.device("cpu"), seed, purpose, step)))

    assert draw(0, "edge", 3) == draw(0, "edge", 3)
    assert len({draw(0, "edge", 3), draw(1, "edge", 3), draw(0, "metric", 3), draw(0, "edge", 4)}) == 4
