"""The graph that a server runs for its default ensemble, without the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bundle import read_bundle
from models.masks import draw_masks
from service.config import ServiceConfig
from service.ensembles import compose_named
from service.graph_cache import GraphCache


@dataclass(frozen=True)
class BareGraph:
    """A fused graph, and what it is fed with beside images."""

    content: bytes
    shape: tuple[int, int, int]  # of an image
    masks: Mapping[str, Any]  # none where no member is stochastic

    def feeds(self, images: NDArray[np.uint8]) -> dict[str, Any]:
        """For images (n, height, width, channels)."""
        return {"image": images, **self.masks}


def bare_graph(config: ServiceConfig, cache: Path) -> BareGraph:
    """Graphs are kept in `cache`."""
    bundle = read_bundle(config.bundle_path, weights=False)
    ensemble = compose_named(bundle, config, next(iter(config.ensembles)))
    masks: dict[str, Any] = {}
    if spec := bundle.manifest.masks_of(ensemble.members):
        masks["masks"] = draw_masks(bundle.manifest.masks.seed, spec.samples, spec.width, spec.keep)
    return BareGraph(GraphCache(cache).fused(bundle, ensemble), bundle.manifest.input.shape, masks)
