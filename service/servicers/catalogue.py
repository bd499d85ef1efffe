"""What is on offer at one moment: the ensembles, who may ask them, and within which limits. A reload puts another in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from models.manifest import InputSpec
from service.access import Access
from service.codec import AnswerNames
from service.config import Disclosure, ServiceConfig
from service.ensembles import Ensembles, LoadedEnsemble
from service.errors import UnknownName
from service.metrics import EnsembleMetrics
from service.tensors import Outputs
from service.witnesses import Witness


@dataclass(frozen=True, slots=True)
class Served:
    """One ensemble as the servicers see it."""

    name: str
    loaded: LoadedEnsemble
    metrics: EnsembleMetrics
    names: AnswerNames
    outputs: Mapping[Disclosure, Outputs]
    spec: InputSpec
    bundle_version: str
    witnesses: tuple[Witness, ...]


class Catalogue:
    """Immutable, so that a call sees one and the same from its first to its last line."""

    def __init__(self, config: ServiceConfig, ensembles: Ensembles, witnesses: Sequence[Witness] = ()) -> None:
        """`witnesses` look on whatever is offered."""
        self.config, self.limits, self.ensembles = config, config.limits, ensembles
        self.access = Access(config)
        self.served: Mapping[str, Served] = MappingProxyType(
            {name: _served(loaded, ensembles, witnesses) for name, loaded in ensembles.items()}
        )
        self.default = self.served[ensembles.default.name]

    def find(self, name: str) -> Served:
        """The ensemble of this name; the default one for no name."""
        served = self.served.get(name) if name else self.default
        if served is None:
            raise UnknownName("ensemble", name, self.served, "ensemble")
        return served


def _served(loaded: LoadedEnsemble, ensembles: Ensembles, witnesses: Sequence[Witness]) -> Served:
    manifest, ensemble, shadow = ensembles.bundle.manifest, loaded.ensemble, ensembles.shadows.get(loaded.name)
    names = AnswerNames(
        manifest.classes,
        tuple(voter.name for voter in ensemble.voters),
        tuple(str(detector.name) for detector in ensemble.detectors),
        any(manifest.member(name).stochastic for name in ensemble.members),
    )
    return Served(
        name=loaded.name,
        loaded=loaded,
        metrics=loaded.metrics,
        names=names,
        outputs={level: Outputs(names, level) for level in Disclosure},
        spec=manifest.input,
        bundle_version=manifest.version,
        witnesses=(*witnesses, *([shadow] if shadow else [])),
    )
