"""The thermometer code of pixels: flat where it should be, the same in ONNX, and never without a gradient for an attack."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.networks import build_network
from models.networks.thermometer import PixelConfig, Thermometer, ThermometerConfig, front
from training.onnx_export import check_parity, export_onnx

CONFIG = ThermometerConfig(thresholds=(25.5, 89.25, 153.0), width=38.25)
DATA = {"classes": 10, "channels": 1, "mean": (73.0,), "std": (90.0,)}
BACKBONE = {"widths": (8, 16), "blocks": (1, 1), "stem_kernel": 3, "stem_stride": 2}


def row(*values: float) -> torch.Tensor:
    """One image (1, 1, n, 1)."""
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1, 1)


def test_every_plane_rises_from_its_threshold_over_the_width() -> None:
    code = Thermometer(CONFIG)(row(0, 25.5, 44.625, 63.75, 89.25, 255))
    assert code.shape == (1, 3, 1, 6)
    assert code[0, :, 0].tolist() == [[0, 0, 0.5, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]]


def test_a_black_background_is_black_all_over_the_ball() -> None:
    noise = torch.rand(1, 28, 28, 1, generator=torch.Generator().manual_seed(0)) * 25.5
    assert not Thermometer(CONFIG)(noise).any()


def test_a_colour_image_has_the_planes_of_every_channel() -> None:
    image = torch.zeros(2, 4, 5, 3)
    image[..., 1] = 255
    code = Thermometer(CONFIG)(image)
    assert code.shape == (2, 9, 4, 5)
    assert code.mean(dim=(0, 2, 3)).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    config = PixelConfig(classes=2, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3, thermometer=CONFIG)
    assert config.planes == 9
    assert isinstance(front(config), Thermometer)


def test_the_gradient_reaches_beyond_the_ramp() -> None:
    """Where the code is flat, within reach of a ramp, the way to it is known; farther away there is none."""
    x = row(0, 10, 70, 120, 255).requires_grad_()
    Thermometer(CONFIG.model_copy(update={"thresholds": (25.5,)}))(x).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == pytest.approx([1 / 89.25, 1 / 89.25, 1 / 89.25, 0, 0])


def test_the_code_is_the_same_with_and_without_a_gradient() -> None:
    pixels = torch.rand(4, 9, 9, 3, generator=torch.Generator().manual_seed(1)) * 255
    thermometer = Thermometer(CONFIG)
    assert torch.equal(thermometer(pixels), thermometer(pixels.clone().requires_grad_()).detach())
    assert torch.equal(thermometer(pixels.byte()), thermometer(pixels.byte().float()))


@pytest.mark.parametrize("kind", ["adversarial", "metric", "certified"])
def test_a_coded_network_answers_alike_in_torch_and_onnx_runtime(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 28, 28, 1), np.uint8)
    own = {"size": (28, 28), "hidden": 16} if kind == "certified" else {"backbone": BACKBONE}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network(kind, DATA | own | {"thermometer": CONFIG.model_dump()})
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.from_numpy(pixels))
    assert check_parity(network.eval(), export_onnx(network, pixels), pixels, None) < 1e-4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"thresholds": (), "width": 1.0}, "thresholds"),
        ({"thresholds": (3.0,), "width": 0.0}, "width"),
        ({"width": 3.0}, "thresholds"),
        ({"thresholds": (float("inf"),), "width": 3.0}, "thresholds"),
        ({"thresholds": (float("nan"),), "width": 3.0}, "thresholds"),
        ({"thresholds": (-3.0,), "width": 3.0}, "thresholds"),
        ({"thresholds": (3.0,), "width": float("inf")}, "width"),
        ({"thresholds": (3.0,), "width": 3.0, "surrogate_reach": float("inf")}, "surrogate_reach"),
    ],
)
def test_a_thermometer_that_cannot_be_read_is_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build_network("adversarial", DATA | {"thermometer": settings})
