"""What an ensemble is, as GetEnsemble and ListEnsembles tell it."""

from __future__ import annotations

from models.card import Share, measured_on
from service.config import Disclosure
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.servicers.catalogue import Catalogue, Served


def describe(served: Served, catalogue: Catalogue, disclosure: Disclosure) -> pb.Ensemble:
    """As a caller sees it who is told so much of an answer."""
    ensemble, limits = served.loaded.ensemble, catalogue.limits
    manifest = catalogue.ensembles.bundle.manifest
    members = [_member(name, served, catalogue) for name in ensemble.members]
    masks = {"fixed": pb.MASKS_FIXED, "fresh": pb.MASKS_FRESH}[ensemble.masks]
    return pb.Ensemble(
        name=served.name,
        is_default=served is catalogue.default,
        classes=manifest.classes,
        input=pb.InputSpec(height=served.spec.height, width=served.spec.width, channels=served.spec.channels),
        members=members,
        detectors=[pb.Detector(name=d.name, member=d.member or "", decides=d.decides) for d in ensemble.detectors],
        rule=pb.Rule(name=ensemble.rule, alpha=ensemble.alpha, scale=ensemble.scale),
        rates=pb.Rates(review=ensemble.review_rate, reject=ensemble.reject_rate, calibration_images=manifest.calibration.n),
        bundle=pb.Bundle(name=manifest.name, version=manifest.version),
        masks=masks if any(member.stochastic for member in members) else pb.MASKS_UNSPECIFIED,
        provider=served.loaded.engine.provider,
        limits=pb.Limits(
            disclosure=pb.Disclosure.ValueType(disclosure),
            max_images_per_request=limits.max_images_per_request,
            max_message_bytes=limits.max_message_bytes,
            max_image_pixels=limits.max_image_pixels,
            max_request_pixels=limits.max_request_pixels,
        ),
        robustness=_robustness(served, catalogue),
    )


def _member(name: str, served: Served, catalogue: Catalogue) -> pb.Member:
    manifest = catalogue.ensembles.bundle.manifest.member(name)
    voter = next((voter for voter in served.loaded.ensemble.voters if voter.name == name), None)
    return pb.Member(
        name=name,
        kind=manifest.network.kind,
        strength=manifest.strength,
        votes=voter is not None,
        weight=voter.weight if voter else 0.0,
        temperature=manifest.temperature,
        parameters=manifest.parameters,
        stochastic=manifest.stochastic is not None,
    )


def _robustness(served: Served, catalogue: Catalogue) -> pb.Robustness | None:
    """What the card says of this very ensemble; of another one's figures not even the sentence."""
    card, manifest = catalogue.ensembles.card, catalogue.ensembles.bundle.manifest
    if card is None or (system := measured_on(card, manifest, served.loaded.ensemble)) is None:
        return None
    headline = card.headline
    return pb.Robustness(
        epsilon=card.epsilon,
        images=system.robust.n,
        clean=_share(system.clean),
        robust=_share(system.robust),
        robust_with_rejection=_share(system.rejecting_5),
        suite=headline.suite,
        publishable=card.publishable,
        conjecture=headline.conjecture if system.name == headline.ensemble else "",
        failed_checks=[f"{check.name}: {check.measured}" for check in card.failed],
    )


def _share(share: Share) -> pb.Share:
    return pb.Share(value=share.value, low=share.low, high=share.high)
