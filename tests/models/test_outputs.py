"""What is kept of the members' outputs for calibration."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from models.manifest import FileHash, InvalidBundle, MemberManifest, NetworkSpec, StochasticSpec
from models.masks import draw_masks
from models.outputs import (
    CALIBRATION_BATCH,
    CalibrationOutputs,
    MemberRun,
    calibration_outputs,
    expected_outputs,
    fresh_seed,
    reduce_outputs,
)

CLASSES = 10
MASKS = StochasticSpec(samples=8, width=CLASSES, keep=0.5)
SEED = 3


def pixels_as_logits(images: NDArray[np.uint8], masks: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """A member whose logits are the first K pixels, masked: all that is asked of it can be computed by hand."""
    logits = np.asarray(images.reshape(len(images), -1)[:, :CLASSES] / 16, np.float32)
    return logits if masks is None else np.asarray(logits[None] * masks[:, None], np.float32)


MEMBERS = {"plain": MemberRun(pixels_as_logits), "dropout": MemberRun(pixels_as_logits, MASKS)}


def random_batches(n: int) -> list[NDArray[np.uint8]]:
    images = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 1), np.uint8)
    return [images[start : start + CALIBRATION_BATCH] for start in range(0, n, CALIBRATION_BATCH)]


def described(name: str, stochastic: StochasticSpec | None = None, centers: bool = False) -> MemberManifest:
    return MemberManifest(
        name=name,
        network=NetworkSpec(kind=name),
        strength="robust",
        roles=("classifier",),
        onnx=FileHash(file=f"{name}.onnx", sha256="0" * 64),
        weights=FileHash(file=f"{name}.safetensors", sha256="0" * 64),
        temperature=1.0,
        stochastic=stochastic,
        centers=centers,
        parameters=0,
    )


def test_logits_come_back_from_log_softmax_and_normalizer_within_half_precision() -> None:
    logits = np.random.default_rng(1).normal(0, 5, (50, CLASSES)).astype(np.float32)
    outputs = reduce_outputs(logits)
    assert np.allclose(np.exp(outputs.log_softmax.astype(np.float64)).sum(axis=1), 1, atol=1e-3)
    assert np.allclose(outputs.logits, logits, atol=2e-2)  # half a step of float16 at 32


def test_distances_of_thousands_stay_finite_and_exact_at_the_nearest_center() -> None:
    distances = -np.array([[1000.5, 2000.0, 90000.0]], np.float32)
    outputs = reduce_outputs(distances)
    assert np.isfinite(outputs.log_softmax).all()
    assert outputs.logits[0, 0] == pytest.approx(-1000.5, abs=1e-3)


def test_a_stochastic_member_is_reduced_over_masks() -> None:
    logits = np.random.default_rng(2).normal(0, 2, (MASKS.samples, 5, CLASSES)).astype(np.float32)
    p = np.exp(logits - logits.max(-1, keepdims=True)).astype(np.float64)
    p /= p.sum(-1, keepdims=True)
    mean = p.mean(axis=0)
    outputs = reduce_outputs(logits)
    assert outputs.mutual_information is not None
    assert outputs.variance is not None
    assert np.allclose(outputs.logits, np.log(mean), atol=1e-2)
    entropy = -(mean * np.log(mean)).sum(-1) + (p * np.log(p)).sum(-1).mean(axis=0)
    assert np.allclose(outputs.mutual_information, entropy, atol=1e-5)
    assert np.allclose(outputs.variance, (p**2).sum(-1).mean(axis=0) - (mean**2).sum(-1), atol=1e-5)


def test_fixed_masks_are_those_of_the_seed_and_every_batch_has_fresh_ones_of_its_own() -> None:
    seen: list[bytes] = []

    def recorded(images: NDArray[np.uint8], masks: NDArray[np.float32] | None) -> NDArray[np.float32]:
        assert masks is not None
        seen.append(masks.tobytes())
        return pixels_as_logits(images, masks)

    calibration_outputs({"dropout": MemberRun(recorded, MASKS)}, random_batches(150), None, SEED)
    fixed, fresh = seen[::2], seen[1::2]
    assert set(fixed) == {draw_masks(SEED, MASKS.samples, MASKS.width, MASKS.keep).tobytes()}
    assert len({*fresh, fixed[0]}) == len(fresh) + 1 == 4
    assert len({fresh_seed(seed, batch) for seed in range(20) for batch in range(20)}) == 400


def test_outputs_of_many_batches_are_those_of_one_image_after_the_other() -> None:
    together = calibration_outputs(MEMBERS, random_batches(150), None, SEED)
    alone = calibration_outputs(MEMBERS, [image[None] for batch in random_batches(150) for image in batch], None, SEED)
    assert len(together) == len(alone) == 150
    assert set(together.labels.tolist()) == {-1}
    for name, member in together.members.items():
        assert np.array_equal(member.log_softmax, alone.members[name].log_softmax)
    assert together.members["dropout"].fresh is not None
    assert together.members["plain"].fresh is None


def test_expected_outputs_are_logits_or_log_mean_probabilities_over_the_fixed_masks() -> None:
    (images,) = random_batches(5)
    expected = expected_outputs(MEMBERS, images, SEED)
    assert np.array_equal(expected["plain"], pixels_as_logits(images, None))
    assert np.allclose(np.exp(expected["dropout"]).sum(axis=1), 1, atol=1e-5)
    assert expected["dropout"].dtype == np.float32


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf], ids=str)
def test_a_member_that_is_not_finite_cannot_be_calibrated(wrong: float) -> None:
    def broken(images: NDArray[np.uint8], masks: NDArray[np.float32] | None) -> NDArray[np.float32]:
        logits = pixels_as_logits(images, masks)
        logits[-1, 0] = wrong
        return logits

    with pytest.raises(InvalidBundle, match=r"member plain: expected finite logits, got others among .* 0 to 63"):
        calibration_outputs({"plain": MemberRun(broken)}, random_batches(150), None, SEED)


def test_no_images_cannot_be_calibrated_on() -> None:
    with pytest.raises(InvalidBundle, match="expected calibration images, got none"):
        calibration_outputs(MEMBERS, [], None, SEED)


def test_normalizers_are_kept_of_members_with_centers_only() -> None:
    members = (described("plain", centers=True), described("dropout", MASKS))
    outputs = calibration_outputs(MEMBERS, random_batches(70), None, SEED)
    back = CalibrationOutputs.from_bytes("file", outputs.to_bytes(members), members, CLASSES, 70)
    assert np.array_equal(back.members["plain"].logits, outputs.members["plain"].logits)

    members = (described("plain"), described("dropout", MASKS))
    back = CalibrationOutputs.from_bytes("file", outputs.to_bytes(members), members, CLASSES, 70)
    assert back.members["plain"].log_normalizer is None
    assert np.array_equal(back.members["plain"].logits.argmax(1), outputs.members["plain"].logits.argmax(1))


def test_four_members_ten_classes_and_eight_thousand_images_fit_a_megabyte() -> None:
    n = 8_000
    images = np.zeros((n, 4, 4, 1), np.uint8)
    members = (
        described("metric", centers=True),
        described("edge"),
        described("adversarial"),
        described("bayesian", MASKS),
    )
    runs = {member.name: MemberRun(pixels_as_logits, member.stochastic) for member in members}
    assert len(calibration_outputs(runs, [images], None, SEED).to_bytes(members)) < 1_000_000
