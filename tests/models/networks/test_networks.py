"""Every network takes raw pixels, exports, and answers in ONNX Runtime as in torch; edges are the same bits."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from models.masks import draw_masks
from models.networks import NETWORKS, build_network
from models.networks.bayesian import BayesianNetwork
from models.networks.edge import EdgeConfig, binary_edges, sobel_magnitude
from training.onnx_export import ParityError, check_parity, export_onnx

SAMPLE = Path(__file__).parents[2] / "data" / "eurosat"
DATA = {"classes": 10, "channels": 3, "mean": (87.0, 97.0, 104.0), "std": (50.0, 35.0, 30.0)}
SMALL: dict[str, object] = {"backbone": {"widths": (8, 16), "blocks": (1, 1), "stem_kernel": 5, "stem_stride": 2}}
SMALL_CERTIFIED = {"size": (64, 64), "hidden": 16, "convolutions": [{"channels": 8, "kernel": 4, "stride": 2}]}


@pytest.fixture(scope="module")
def tiles() -> NDArray[np.uint8]:
    """(50, 64, 64, 3), real EuroSAT tiles."""
    table = datasets.load_dataset(str(SAMPLE), split="test")
    return np.stack([np.asarray(picture) for picture in table["image"]])


def network_of(kind: str, tiles: NDArray[np.uint8], seed: int = 0) -> nn.Module:
    """A small network whose batch norm has seen the tiles."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network(kind, DATA | (SMALL_CERTIFIED if kind == "certified" else SMALL))
    inputs: list[torch.Tensor] = [torch.from_numpy(tiles)]
    if isinstance(network, BayesianNetwork):
        inputs.append(torch.ones(2, network.mask_width))
    with torch.no_grad():
        for _ in range(20):
            network.train()(*inputs)
    return network.eval()


@pytest.mark.parametrize("kind", sorted(NETWORKS))
def test_a_network_answers_alike_in_torch_and_onnx_runtime(kind: str, tiles: NDArray[np.uint8]) -> None:
    network = network_of(kind, tiles)
    masks = draw_masks(3, 32, network.mask_width, 0.7) if isinstance(network, BayesianNetwork) else None
    assert check_parity(network, export_onnx(network, tiles), tiles, masks) < 1e-4


def test_parity_notices_other_weights(tiles: NDArray[np.uint8]) -> None:
    exported = export_onnx(network_of("adversarial", tiles, seed=0), tiles)
    with pytest.raises(ParityError, match="torch and ONNX Runtime differ by"):
        check_parity(network_of("adversarial", tiles, seed=1), exported, tiles, None)


def test_parity_notices_masks_that_change_nothing(tiles: NDArray[np.uint8]) -> None:
    network = network_of("bayesian", tiles)
    exported = export_onnx(network, tiles)
    with pytest.raises(ParityError, match="do not vary over masks"):
        check_parity(network, exported, tiles, np.ones((32, network.mask_width), np.float32))  # type: ignore[arg-type]


def test_an_exported_graph_names_no_path_of_the_machine_it_was_made_on(tiles: NDArray[np.uint8]) -> None:
    exported = export_onnx(network_of("edge", tiles), tiles)
    assert str(Path(torch.__file__).parent).encode() not in exported
    assert str(Path(__file__).parents[3]).encode() not in exported


def test_edges_are_the_same_bits_in_torch_numpy_and_onnx_runtime(tiles: NDArray[np.uint8]) -> None:
    class Edges(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return binary_edges(sobel_magnitude(image.float().permute(0, 3, 1, 2)), 32.5, 16.0)

    (got,) = onnxruntime.InferenceSession(export_onnx(Edges(), tiles), providers=["CPUExecutionProvider"]).run(
        None, {"image": tiles}
    )
    assert np.array_equal(got, Edges()(torch.from_numpy(tiles)).numpy())

    x = np.pad(tiles.astype(np.int64), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    h, w = tiles.shape[1:3]

    def at(dy: int, dx: int) -> NDArray[np.int64]:
        return x[:, dy : dy + h, dx : dx + w]

    g_x = at(0, 2) + 2 * at(1, 2) + at(2, 2) - at(0, 0) - 2 * at(1, 0) - at(2, 0)
    g_y = at(2, 0) + 2 * at(2, 1) + at(2, 2) - at(0, 0) - 2 * at(0, 1) - at(0, 2)
    expected = (np.abs(g_x) + np.abs(g_y) > 32.5).transpose(0, 3, 1, 2)
    assert np.array_equal(got, expected)
    assert 0.05 < expected.mean() < 0.95


def test_binary_edges_carry_the_gradient_of_their_surrogate() -> None:
    g = torch.tensor([0.0, 30.0, 33.0, 90.0], requires_grad=True)
    edges = binary_edges(g, 32.5, 16.0)
    assert edges.tolist() == [0.0, 0.0, 1.0, 1.0]
    edges.sum().backward()
    s = 1 / (1 + np.exp(-(g.detach().numpy() - 32.5) / 16))
    assert g.grad is not None
    assert g.grad.numpy() == pytest.approx(s * (1 - s) / 16, abs=1e-7)


def test_a_threshold_that_a_pixel_could_tie_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a half-integer such as 32.5.*got 32"):
        EdgeConfig.model_validate({**DATA, "thresholds": (32,)})


def test_uint8_and_float_pixels_give_the_same_logits(tiles: NDArray[np.uint8]) -> None:
    """Serving feeds bytes, attacks feed floats; the network must not tell them apart."""
    for kind in sorted(set(NETWORKS) - {"bayesian"}):
        network = network_of(kind, tiles)
        bytes_, floats = torch.from_numpy(tiles[:4]), torch.from_numpy(tiles[:4]).float().requires_grad_()
        assert torch.allclose(network(bytes_), network(floats), atol=1e-5)


def test_an_unknown_kind_is_answered_with_those_known() -> None:
    with pytest.raises(ValueError, match="unknown network kind 'magic'; known are adversarial, bayesian, certified, edge, metric"):
        build_network("magic", {})
