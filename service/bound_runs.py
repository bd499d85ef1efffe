"""Runs on a GPU: inputs and outputs lie in memory that is bound once for each size of batch, and each size is one CUDA graph.

A run of n images takes the smallest size that holds them; what is beside them in it is computed and thrown away. A CUDA graph
is the whole run as one launch: it is captured in a size's first run, at addresses that must then stay, which is why memory is
bound. Nothing here has run on a GPU yet (docs/decisions/cuda-graphs.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

IMAGE = "image"  # the input that has a size; the others are shared by all images of a run
GRAPH_ID, NO_GRAPH = "gpu_graph_id", -1  # a run option of ONNX Runtime
TOLERANCE = 1e-3  # two runs of one size differ by rounding; a graph that reads or writes elsewhere is far off


def sizes_up_to(most: int) -> tuple[int, ...]:
    """Images: the powers of two below the most, and the most."""
    return (*(2**power for power in range((most - 1).bit_length())), most)


@dataclass(frozen=True, slots=True)
class _Size:
    """What the runs of one size read and write."""

    binding: Any  # an IOBinding
    images: NDArray[np.uint8]  # (size, height, width, channels), where they are put together
    image: Any  # an OrtValue on the device, and so are the others
    outputs: Sequence[Any]
    options: Any  # RunOptions


class BoundRuns:
    """One run at a time, as its memory is used over and over; on a GPU all in one thread, see service/gpu_runs.py."""

    def __init__(
        self,
        session: ort.InferenceSession,
        graphs: bool,
        *,
        columns: Sequence[str],
        others: Mapping[str, NDArray[Any]],
        sizes: Sequence[int],
        device: str,
    ) -> None:
        """`columns` are the outputs, `others` the inputs beside the images, of the shapes they will always have; `sizes` ascend;
        `device` is `cuda`, or `cpu` in tests.
        """
        self.sizes = tuple(sizes)
        self._session, self._columns, self._device = session, columns, device
        shape, *_ = [each.shape for each in session.get_inputs() if each.name == IMAGE]
        self._others = {name: self._on_device(value) for name, value in others.items()}
        self._given = dict(others)  # what lies in these
        self._bound = {size: self._bind(size, shape[1:], size if graphs else NO_GRAPH) for size in sizes}

    def run(self, images: NDArray[np.uint8], others: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The outputs for images (n, height, width, channels); more than the largest size holds are several runs."""
        n, most = len(images), self.sizes[-1]
        if n > most:
            parts = [self.run(images[start : start + most], others) for start in range(0, n, most)]
            return [np.concatenate(column) for column in zip(*parts, strict=True)]
        bound = self._bound[next(size for size in self.sizes if size >= n)]
        bound.images[:n] = images
        bound.image.update_inplace(bound.images)
        for name, value in others.items():
            if value is not self._given[name]:
                self._others[name].update_inplace(value)
                self._given[name] = value
        self._session.run_with_iobinding(bound.binding, bound.options)
        return [output.numpy()[:n].copy() for output in bound.outputs]

    def warm_up(self, size: int) -> None:
        """Its first run, on black images, so that it is not slow for the first caller; captures its graph, or raises what ONNX
        Runtime raises where that cannot be.
        """
        self.run(self._bound[size].images, self._given)

    def differs(self, size: int, samples: NDArray[np.uint8]) -> bool:
        """Whether this size, filled with the samples, is answered otherwise than by a plain run of the same session."""
        images = np.resize(samples, (size, *samples.shape[1:]))
        pairs = zip(self.run(images, self._given), self._plain(images), strict=True)
        return not all(np.allclose(mine, plain, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True) for mine, plain in pairs)

    def _plain(self, images: NDArray[np.uint8]) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = self._session.run(self._columns, {IMAGE: images, **self._given}, _options(NO_GRAPH))
        return found

    def _bind(self, size: int, shape: Sequence[int], graph: int) -> _Size:
        images = np.zeros((size, *shape), np.uint8)
        outputs = [  # what they look like, a run tells that is bound to nothing
            ort.OrtValue.ortvalue_from_shape_and_type(value.shape, value.dtype, self._device, 0) for value in self._plain(images)
        ]
        image = self._on_device(images)
        binding = self._session.io_binding()
        for name, value in ({IMAGE: image} | self._others).items():
            binding.bind_ortvalue_input(name, value)
        for name, value in zip(self._columns, outputs, strict=True):
            binding.bind_ortvalue_output(name, value)
        return _Size(binding, images, image, outputs, _options(graph))

    def _on_device(self, value: NDArray[Any]) -> Any:
        """A copy, on the CPU too, where ONNX Runtime would write into what the caller gave."""
        return ort.OrtValue.ortvalue_from_numpy(value.copy(), self._device, 0)


def _options(graph: int) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(graph))
    return options
