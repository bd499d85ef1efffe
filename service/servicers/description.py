"""What an ensemble is, as GetEnsemble and ListEnsembles tell it.  Nothing in it depends on a request, so it is made
once.
"""

from __future__ import annotations

from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.servicers.gate import Gate, Served


def describe(served: Served, gate: Gate) -> pb.Ensemble:
    ensemble, limits = served.loaded.ensemble, gate.limits
    manifest = gate.ensembles.bundle.manifest
    members = [_member(name, served, gate) for name in ensemble.members]
    masks = {"fixed": pb.MASKS_FIXED, "fresh": pb.MASKS_FRESH}[ensemble.masks]
    return pb.Ensemble(
        name=served.name,
        is_default=served is gate.default,
        classes=manifest.classes,
        input=pb.InputSpec(height=served.spec.height, width=served.spec.width, channels=served.spec.channels),
        members=members,
        detectors=[pb.Detector(name=detector.name, member=detector.member or "") for detector in ensemble.detectors],
        rule=pb.Rule(name=ensemble.rule, alpha=ensemble.alpha, scale=ensemble.scale),
        rates=pb.Rates(review=ensemble.review_rate, reject=ensemble.reject_rate, calibration_images=manifest.calibration.n),
        bundle=pb.Bundle(name=manifest.name, version=manifest.version),
        masks=masks if any(member.stochastic for member in members) else pb.MASKS_UNSPECIFIED,
        provider=served.loaded.engine.provider,
        limits=pb.Limits(
            disclosure=pb.Disclosure.ValueType(limits.disclosure),
            max_images_per_request=limits.max_images_per_request,
            max_message_bytes=limits.max_message_bytes,
            max_image_pixels=limits.max_image_pixels,
            max_request_pixels=limits.max_request_pixels,
        ),
    )


def _member(name: str, served: Served, gate: Gate) -> pb.Member:
    manifest = gate.ensembles.bundle.manifest.member(name)
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
