"""Everything a server answers for: each named ensemble of the config, loaded, tested and ready, over one bundle."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Self

from models.bundle import Bundle, InvalidBundle, read_bundle
from models.card import Card, read_card
from models.composition import EnsembleChoice, compose
from models.ensemble import Ensemble
from models.self_test import check_member
from service.batcher import Batcher
from service.config import ServiceConfig
from service.engine import Engine, Lanes, ProviderUnavailable
from service.graph_cache import GraphCache, user_cache
from service.metrics import EnsembleFacts, EnsembleMetrics, Metrics
from service.shadow import Shadow


@dataclass(frozen=True, eq=False)
class LoadedEnsemble:
    """One name a caller may ask for."""

    name: str
    ensemble: Ensemble
    engine: Engine
    batcher: Batcher
    metrics: EnsembleMetrics
    facts: EnsembleFacts


class Ensembles(Mapping[str, LoadedEnsemble]):
    """By name, in the order of the config; the first is the default."""

    def __init__(
        self,
        bundle: Bundle,
        card: Card | None,
        loaded: Mapping[str, LoadedEnsemble],
        shadows: Mapping[str, Shadow],
        lanes: Lanes,
    ) -> None:
        self.bundle = bundle  # without the members' files, which nobody needs once the graphs are loaded
        self.card = card
        self.shadows = MappingProxyType(dict(shadows))  # by the ensemble whose traffic they get
        self._loaded = MappingProxyType(dict(loaded))
        self._lanes = lanes

    @property
    def default(self) -> LoadedEnsemble:
        return next(iter(self._loaded.values()))

    def __getitem__(self, name: str) -> LoadedEnsemble:
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)

    def announce(self, metrics: Metrics) -> None:
        """From now on these are watched, in the place of what went by their names."""
        metrics.offer_bundle(self.bundle.manifest.name, self.bundle.manifest.version)
        for each in self.values():
            metrics.offer(each.name, each.metrics, each.facts, each.batcher.depth)

    def drain(self, timeout: float | None = None) -> bool:
        """Finish what every queue holds and take no more; False where `timeout` seconds in all were too few."""
        end = None if timeout is None else time.monotonic() + timeout
        for shadow in self.shadows.values():
            shadow.close()
        with ThreadPoolExecutor(len(self)) as pool:  # together: no queue takes work while another is being emptied
            drained = pool.map(lambda each: each.batcher.drain(end and max(0.0, end - time.monotonic())), self.values())
            finished = all(list(drained))
        if finished:
            self._lanes.close()
            for each in self.values():
                each.engine.close()
        return finished

    def close(self) -> None:
        """Stop now; what is queued fails."""
        self.drain(0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_ensembles(config: ServiceConfig, metrics: Metrics, cache: GraphCache | None = None) -> Ensembles:
    """Load and test all, or raise InvalidBundle, InvalidEnsemble or ProviderUnavailable; what is served is as before."""
    if config.signature is not None:
        cache = GraphCache(None)  # a graph kept on disk is nobody's signed word
    elif cache is None:
        cache = GraphCache(user_cache(os.environ))
    bundle = read_trusted(config)
    card = read_card(bundle.manifest, bundle.documents)
    lanes = Lanes(config.device.threads)
    loaded: dict[str, LoadedEnsemble] = {}
    ready: list[tuple[Ensemble, Engine]] = []
    try:
        for name in config.ensembles:
            ensemble = compose_named(bundle, config, name)
            ready.append((ensemble, _engine(bundle, ensemble, config, cache, lanes)))
        for ensemble, engine in ready:
            loaded[ensemble.name] = _start(ensemble, engine, config, metrics)
    except BaseException:
        for each in loaded.values():
            each.batcher.drain(0.0)
        for _, engine in ready:
            engine.close()
        lanes.close()
        raise
    bundle = replace(bundle, onnx_bytes={})
    give_back_memory()
    return Ensembles(bundle, card, loaded, _shadows(config, loaded, metrics), lanes)


def read_trusted(config: ServiceConfig) -> Bundle:
    """The bundle of a configuration, signed by whom it should be; without the members' weights."""
    if config.signature is None:
        return read_bundle(config.bundle_path, weights=False)
    from service.signing import verify  # the extra `signing`

    path, key = config.bundle_path, config.signature.public_key
    return read_bundle(path, weights=False, told=lambda files: verify(path, files, key))


def _engine(bundle: Bundle, ensemble: Ensemble, config: ServiceConfig, cache: GraphCache, lanes: Lanes) -> Engine:
    try:
        return Engine(cache.fused(bundle, ensemble), bundle, ensemble, config.device, lanes, config.batching.max_batch_size)
    except (InvalidBundle, ProviderUnavailable):
        raise
    except Exception as error:  # of ONNX, spox or ONNX Runtime: theirs have no common base
        for name in ensemble.members:
            check_member(bundle, bundle.manifest.member(name))  # names the member, if it cannot even run alone
        raise InvalidBundle(f"ensemble {ensemble.name}: expected member graphs that can be fused and run, got {error}") from error


def compose_named(bundle: Bundle, config: ServiceConfig, name: str) -> Ensemble:
    """The ensemble that the config calls `name`."""
    own, rates = config.ensembles[name], config.rates(name)
    choice = EnsembleChoice(
        name=name,
        without=own.without,
        roles=own.roles,
        rule=own.rule,
        detectors=own.detectors,
        review_rate=rates.review_rate,
        reject_rate=rates.reject_rate,
        masks=own.masks,
    )
    return compose(bundle, choice)


def _start(ensemble: Ensemble, engine: Engine, config: ServiceConfig, metrics: Metrics) -> LoadedEnsemble:
    voters, detectors = [voter.name for voter in ensemble.voters], [detector.name for detector in ensemble.detectors]
    own = metrics.ensemble(ensemble.name, voters, detectors)
    facts = EnsembleFacts(
        engine.provider,
        engine.fallback,
        ensemble.review_rate,
        ensemble.reject_rate,
        config.batching.max_queue,
        engine.cuda_graphs,
    )
    return LoadedEnsemble(ensemble.name, ensemble, engine, Batcher(engine, config.batching, own, ensemble.name), own, facts)


def _shadows(config: ServiceConfig, loaded: Mapping[str, LoadedEnsemble], metrics: Metrics) -> dict[str, Shadow]:
    return {
        name: Shadow(loaded[its.ensemble].engine, loaded[name].engine.lanes, its.share, metrics.shadow(name, its.ensemble))
        for name, its in ((name, config.ensembles[name].shadow) for name in loaded)
        if its is not None
    }


def give_back_memory() -> None:
    """Return what loading freed to the system; glibc keeps it otherwise. What is left stays: collections need not look at it."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
