"""Query attacks on a running server, kept image by image, and the campaign's adversarial images shown to it."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from models.card import Deployment, Query
from models.ensemble import Ensemble, Verdict, decide
from models.manifest import Manifest
from service.config import Disclosure
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from training.attacks.query import Attacker, OwnDraws, QueryAttack, attack_one, distance_between
from training.data import Images
from training.endpoint import FLIGHTS, Endpoint, EndpointRefused, Pixels, parts_served
from training.evaluation.campaign import ROUNDED, Campaign, Unit, claim, write_whole
from training.evaluation.scores import REVIEW, share
from training.evaluation.subjects import canonical, full_and_members
from training.progress import counted
from training.refused import TrainingRefused

DISCLOSURES = [level.name.lower() for level in Disclosure]
QUERY_FILE, DEPLOYMENT_FILE = "query.json", "deployment.json"


@dataclass(frozen=True, eq=False)
class Attempt:
    """What became of one image: the nearest that had won, else the clean one, and what the server says of it."""

    adversarial: Pixels  # (h, w, c)
    truth: int
    label: int
    accepted: bool  # to somebody who sees verdicts
    distance: int  # l-infinity, from the clean image
    queries: int  # spent

    def wins(self, radius: int) -> bool:
        """Wrong and accepted, inside the ball."""
        return self.label != self.truth and self.accepted and self.distance <= radius


class QueryCampaign:
    """One query attack on one endpoint over images, a file for each of them; a rerun attacks those that have none."""

    def __init__(self, folder: Path, endpoint: Endpoint, manifest: Manifest, images: Images, attack: QueryAttack) -> None:
        self.endpoint, self.images, self.attack = endpoint, images, attack
        endpoint.expect_bundle(manifest)
        endpoint.expect_disclosure(Disclosure.VERDICT)  # to say in the end what was wrong and accepted
        level = endpoint.disclosure.name.lower()
        self.folder = folder / "endpoint" / f"{attack.name}-{endpoint.ensemble}-{level}-{attack.queries}-n{len(images)}"
        self._claim(manifest)

    def done(self, place: int) -> bool:
        return self._file(place).is_file()

    def run(self, shard: int = 1, shards: int = 1, flights: int = FLIGHTS) -> None:
        """Attack every `shards`-th image, `flights` of them at once; what is done is not done again."""
        mine = range(shard - 1, len(self.images), shards)
        todo = [place for place in mine if not self.done(place)]
        stop = threading.Event()
        # Square seeds the global generator, though nobody here draws from it
        own_random_state = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
        bar = counted(len(mine), len(mine) - len(todo), "image", self.folder.name)
        with own_random_state, bar, ThreadPoolExecutor(flights, thread_name_prefix="attack") as pool:
            try:
                won = 0
                for future in as_completed([pool.submit(self._attack, place, stop) for place in todo]):
                    won += future.result().wins(self.attack.radius)
                    bar.set_postfix_str(f"{won} won", refresh=False)
                    bar.update()
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def kept(self) -> list[Attempt]:
        """Of every image that was attacked, in their order."""
        return [self._read(place) for place in range(len(self.images)) if self.done(place)]

    def _attack(self, place: int, stop: threading.Event) -> Attempt:
        truth = int(self.images.labels[place])
        attacker = Attacker(self.endpoint, self.images.pixels[place], truth, self.attack, stop)
        seed = zlib.crc32(f"{self.attack.seed}/{self.attack.name}/{place}".encode())
        with OwnDraws(seed):
            attack_one(attacker, self._others(place))
        final = self.endpoint.answers(attacker.best[None], Disclosure.VERDICT)
        distance = distance_between(attacker.best, attacker.clean)
        attempt = Attempt(attacker.best, truth, int(final.label[0]), bool(final.accepted[0]), distance, attacker.spent)
        record = {name: value for name, value in vars(attempt).items() if name != "adversarial"}
        write_whole(self._file(place), save({"adversarial": attempt.adversarial}, {"attempt": json.dumps(record)}))
        return attempt

    def _others(self, place: int) -> Iterator[Pixels]:
        """Clean images of other classes, the nearest first."""
        away = np.square(self.images.pixels.astype(np.float32) - self.images.pixels[place]).sum(axis=(1, 2, 3))
        for other in np.argsort(away, kind="stable"):
            if self.images.labels[other] != self.images.labels[place]:
                yield self.images.pixels[other]

    def _read(self, place: int) -> Attempt:
        path = self._file(place)
        try:
            with safe_open(path, "np") as file:
                return Attempt(adversarial=file.get_tensor("adversarial"), **json.loads(file.metadata()["attempt"]))
        except (OSError, SafetensorError, TypeError, ValueError, KeyError) as error:
            raise EndpointRefused(f"{path}: expected an attacked image, got {error}; delete it, and it is done again") from error

    def _file(self, place: int) -> Path:
        return self.folder / f"{place:05d}.safetensors"

    def _claim(self, manifest: Manifest) -> None:
        """Say whose folder this is; refuse one that is another attack's."""
        served = self.endpoint.served
        identity = {
            "bundle": f"{manifest.name} {manifest.subject}",
            "ensemble": parts_served(served),
            "review_rate": served.rates.review,
            "images": hashlib.sha256(self.images.pixels.tobytes() + self.images.labels.tobytes()).hexdigest(),
            "epsilon": self.attack.epsilon,
            "seed": self.attack.seed,
        }
        claim(self.folder / "attack.json", identity, "attack", EndpointRefused)


def query_card(campaign: QueryCampaign) -> Query:
    """What was found on all images attacked so far, those that are wrong as they are included."""
    attempts, attack = campaign.kept(), campaign.attack
    if not attempts:
        raise EndpointRefused(f"{campaign.folder}: expected an image that was attacked, got none")
    return Query(
        attack=attack.name,
        ensemble=campaign.endpoint.ensemble,
        disclosure=campaign.endpoint.disclosure.name.lower(),
        queries=attack.queries,
        median_queries=float(np.median([attempt.queries for attempt in attempts])),
        wrong_and_accepted=share(np.array([attempt.wins(attack.radius) for attempt in attempts])),
    )


def rescore(endpoint: Endpoint, ensemble: Ensemble, campaign: Campaign, units: Sequence[Unit]) -> Deployment:
    """The units' rounded adversarial images through the server, against the rule on the outputs that were stored of them.

    `ensemble` is the one that is served, its masks fixed.
    """
    if not units:
        raise EndpointRefused(f"{campaign.folder}: expected units with adversarial images, got none")
    endpoint.expect_bundle(campaign.bundle.manifest)
    endpoint.expect_ensemble(ensemble)
    endpoint.expect_disclosure(Disclosure.PROBABILITIES)
    if endpoint.served.masks == pb.MASKS_FRESH:
        raise EndpointRefused(f"{endpoint.ensemble}: expected fixed masks, got fresh ones, under which no answer is like another")

    def differences(unit: Unit) -> tuple[NDArray[Any], ...]:
        told = endpoint.answers(campaign.adversarial(unit, ROUNDED), Disclosure.PROBABILITIES)
        assert told.probabilities is not None, "expect_disclosure has seen to it"
        ours = decide(ensemble, campaign.found(unit).outputs[ROUNDED])
        p_value = np.ones_like(ours.p_value) if told.p_value is None else told.p_value
        return (
            told.label != ours.label,
            told.accepted != ((ours.verdict == Verdict.CLEAN) | (ours.verdict == Verdict.UNSCREENED)),
            np.abs(p_value - ours.p_value),
            np.abs(told.probabilities - ours.probabilities).max(axis=1),
        )

    found = []
    with ThreadPoolExecutor(FLIGHTS, "rescore") as pool, counted(len(units), 0, "unit", f"through {endpoint.address}") as bar:
        for difference in pool.map(differences, units):
            found.append(difference)
            bar.update()
    labels, verdicts, p_values, probabilities = (np.concatenate(each) for each in zip(*found, strict=True))
    return Deployment(
        images=len(labels),
        labels_differ=int(labels.sum()),
        verdicts_differ=int(verdicts.sum()),
        p_value_difference=float(p_values.max()),
        probability_difference=float(probabilities.max()),
    )


# The command, and what it leaves for the report


def through_endpoint(args: argparse.Namespace, campaign: Campaign) -> int:
    """`phalanx-train attack --endpoint`: query attacks on the server, then what the campaign has found shown to it."""
    if args.query_images < 1:
        raise TrainingRefused(f"--query-images: expected 1 or more, got {args.query_images}")
    manifest, images = campaign.bundle.manifest, campaign.images.take(np.arange(min(args.query_images, len(campaign.images))))
    with Endpoint(args.endpoint, args.ensemble, Disclosure[args.disclosure.upper()]) as endpoint:
        if not math.isclose(endpoint.served.rates.review, REVIEW, rel_tol=1e-3) and endpoint.served.detectors:
            raise TrainingRefused(
                f"{args.endpoint}: figures are given at a review rate of {REVIEW:g}, got {endpoint.served.rates.review:g}"
            )
        for name in args.query_attacks:
            attack = QueryAttack(name, campaign.epsilon, args.queries, args.seed)
            queries = QueryCampaign(campaign.folder, endpoint, manifest, images, attack)
            queries.run(*args.shard)
            found = query_card(queries)
            write_whole(queries.folder / QUERY_FILE, found.model_dump_json(indent=1).encode())
            won = found.wrong_and_accepted
            print(
                f"{name}, {found.disclosure} disclosed, at most {found.queries} queries: {won.value:.1%} wrong and accepted "
                f"({won.low:.1%} to {won.high:.1%}, n = {won.n}), {found.median_queries:.0f} queries in the median"
            )
        if not args.no_rescore:
            _rescore(endpoint, campaign)
    return 0


def _rescore(endpoint: Endpoint, campaign: Campaign) -> None:
    """Every image that was made against the ensemble or one of its members, to the one that the server calls by the same name."""
    mains = full_and_members(campaign.bundle.manifest)
    subject = next((s for s in canonical(campaign.bundle.manifest) if s.name == endpoint.ensemble), None)
    units = [unit for unit in campaign.units(mains) if campaign.done(unit)] if subject else []
    if subject is None or not units:
        print(f"nothing was attacked yet under the name {endpoint.ensemble}: no image to show the server", file=sys.stderr)
        return
    found = rescore(endpoint, campaign.system(subject).ensemble, campaign, units)
    write_whole(campaign.folder / DEPLOYMENT_FILE, found.model_dump_json(indent=1).encode())
    print(
        f"{found.images} adversarial images through the server: {found.labels_differ} labels and {found.verdicts_differ} verdicts "
        f"differ, probabilities by {found.probability_difference:.2g} and p-values by {found.p_value_difference:.2g} at most"
    )


def kept_queries(campaign: Campaign) -> list[Query]:
    """What query attacks have found so far, each on the most images that it was tried on."""
    found = [Query.model_validate_json(path.read_bytes()) for path in sorted(campaign.folder.glob(f"endpoint/*/{QUERY_FILE}"))]
    found.sort(key=lambda query: query.wrong_and_accepted.n)
    return sorted({query.identity: query for query in found}.values(), key=lambda query: query.identity)


def kept_deployment(campaign: Campaign) -> Deployment | None:
    """What the server said of the campaign's images, None if it was never asked."""
    path = campaign.folder / DEPLOYMENT_FILE
    return Deployment.model_validate_json(path.read_bytes()) if path.is_file() else None
