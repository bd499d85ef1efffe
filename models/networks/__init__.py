"""The torch networks, one file per kind. A new defense adds its file and a line to `NETWORKS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from models.networks.adversarial import AdversarialConfig, AdversarialNetwork
from models.networks.bayesian import BayesianConfig, BayesianNetwork
from models.networks.certified import CertifiedConfig, CertifiedNetwork
from models.networks.edge import EdgeConfig, EdgeNetwork
from models.networks.metric import MetricConfig, MetricNetwork
from models.networks.spec import NetworkConfig


@dataclass(frozen=True)
class NetworkKind:
    """A kind of network: its settings and its module."""

    config: type[NetworkConfig]
    module: type[nn.Module]


NETWORKS: Mapping[str, NetworkKind] = {
    "adversarial": NetworkKind(AdversarialConfig, AdversarialNetwork),
    "bayesian": NetworkKind(BayesianConfig, BayesianNetwork),
    "certified": NetworkKind(CertifiedConfig, CertifiedNetwork),
    "edge": NetworkKind(EdgeConfig, EdgeNetwork),
    "metric": NetworkKind(MetricConfig, MetricNetwork),
}


def build_network(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised network of `kind`; raises ValueError on an unknown kind or setting."""
    if kind not in NETWORKS:
        raise ValueError(f"unknown network kind {kind!r}; known are {', '.join(sorted(NETWORKS))}")
    found = NETWORKS[kind]
    return found.module(found.config.model_validate(config))
