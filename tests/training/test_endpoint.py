"""Attacks through a real server: what they cost it is counted by the server itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from models.bundle import read_bundle, read_manifest
from models.composition import EnsembleChoice, compose
from models.manifest import InputSpec, Manifest
from service.access import token_digest
from service.config import Disclosure
from service.graph_cache import GraphCache
from tests.bundles import random_images, write_tiny_bundle
from tests.service.serving import Running, random_pixels, serving
from training.attacks import query
from training.attacks.query import ATTACKS, QueryAttack, short_of_winning
from training.data import Images, splits_of
from training.endpoint import Answers, Endpoint, EndpointRefused
from training.evaluation.campaign import Campaign, Unit
from training.evaluation.card import DEPLOYED
from training.evaluation.queries import QueryCampaign, query_card, rescore
from training.evaluation.subjects import full_and_members
from training.evaluation.suites import suite

LIMIT = 16  # images in a request


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("attacked") / "bundle")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> GraphCache:
    return GraphCache(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def running(bundle: Path, graphs: GraphCache) -> Iterator[Running]:
    limits = {"disclosure": "probabilities", "max_images_per_request": LIMIT}
    ensembles = {"full": {}, "votes-only": {"detectors": []}, "strict": {"review_rate": 0.5}}
    with serving(bundle, graphs, ensembles=ensembles, limits=limits) as server:
        yield server


@pytest.fixture
def address(running: Running) -> str:
    return str(running.server.address)


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


@pytest.fixture(scope="module")
def images(running: Running, manifest: Manifest) -> Images:
    """Accepted, and of the class that the server gives them."""
    pixels = random_images(manifest.input, 40, seed=5)
    with Endpoint(str(running.server.address)) as endpoint:
        answers = endpoint.answers(pixels)
    return Images(pixels[answers.accepted], answers.label[answers.accepted])


def classified(running: Running) -> float:
    """How many images the server has computed."""
    return sum(value for series, value in running.scrape().items() if series.startswith("phalanx_verdicts_total"))


def answered(running: Running) -> float:
    """How many requests to classify the server has answered."""
    counts = (
        value
        for series, value in running.scrape().items()
        if series.startswith("phalanx_request_seconds_count") and "Classify" in series
    )
    return sum(counts)


def test_answers_keep_the_order_of_the_images_over_several_requests(running: Running, address: str) -> None:
    pixels = random_pixels(3 * LIMIT + 1)
    with Endpoint(address, disclosure=Disclosure.PROBABILITIES) as endpoint:
        before = answered(running)
        together = endpoint.answers(pixels)
        assert answered(running) - before == 4
        alone = [endpoint.answers(image[None]) for image in pixels]
    assert together.label.tolist() == [int(each.label[0]) for each in alone]
    assert together.p_value is not None
    assert together.probabilities is not None
    assert together.probabilities.argmax(axis=1).tolist() == together.label.tolist()


def test_a_caller_who_sees_the_class_only_takes_every_answer_for_an_acceptance(address: str) -> None:
    colours = np.array(list(itertools.product((0, 127, 255), repeat=3)), np.uint8)
    pixels = np.broadcast_to(colours[:, None, None], (27, 8, 8, 3))
    with Endpoint(address, disclosure=Disclosure.LABEL) as endpoint:
        blind, seeing = endpoint.answers(pixels), endpoint.answers(pixels, Disclosure.VERDICT)
    assert blind.accepted.all()
    assert not seeing.accepted.all()
    assert blind.p_value is None
    assert blind.probabilities is None
    assert seeing.probabilities is None


def test_the_score_is_the_margin_and_what_the_p_value_lacks() -> None:
    label, accepted = np.array([0, 0, 1]), np.array([True, False, False])
    p, probabilities = np.array([0.5, 0.01, 0.01], np.float32), np.array([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8]], np.float32)
    short = short_of_winning(Answers(label, accepted, p, probabilities), truth=0, rate=0.05)
    assert short == pytest.approx([np.log(4), np.log(4) + np.log(5), np.log(5)], rel=1e-5)
    assert short_of_winning(Answers(label, accepted, None, None), truth=0, rate=0.05).tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    "disclosure", [Disclosure.LABEL, Disclosure.VERDICT, Disclosure.PROBABILITIES], ids=lambda d: d.name.lower()
)
@pytest.mark.parametrize("name", ATTACKS)
def test_no_image_costs_more_than_its_queries_and_none_that_counts_leaves_the_ball(
    running: Running, address: str, manifest: Manifest, images: Images, name: str, disclosure: Disclosure, tmp_path: Path
) -> None:
    few = images.take(np.arange(4))
    before = classified(running)
    with Endpoint(address, disclosure=disclosure) as endpoint:
        campaign = QueryCampaign(tmp_path, endpoint, manifest, few, QueryAttack(name, epsilon=12.5, queries=70))
        campaign.run(flights=4)
    attempts = campaign.kept()
    assert len(attempts) == len(few)
    assert all(attempt.queries <= 70 for attempt in attempts)
    assert classified(running) - before == sum(attempt.queries for attempt in attempts) + len(few)  # and one each, to judge
    for attempt, clean in zip(attempts, few.pixels, strict=True):
        assert attempt.distance == np.abs(attempt.adversarial.astype(int) - clean).max()
        assert attempt.queries == 70 or attempt.distance <= 12
    card = query_card(campaign)
    assert (card.attack, card.ensemble, card.disclosure, card.queries) == (name, "full", disclosure.name.lower(), 70)
    assert card.wrong_and_accepted.value == np.mean([attempt.wins(12) for attempt in attempts])
    assert card.median_queries == np.median([attempt.queries for attempt in attempts])


def test_with_labels_alone_hopskipjump_finds_what_a_change_of_colour_would(
    address: str, manifest: Manifest, images: Images, tmp_path: Path
) -> None:
    """Images whose class one of 26 changes of colour by 16 is known to change, looked for within 24."""
    with Endpoint(address, "votes-only", Disclosure.LABEL) as endpoint:
        changed = [
            endpoint.answers(recoloured(images.pixels, signs)).label != images.labels
            for signs in itertools.product((-16, 0, 16), repeat=3)
        ]
        near = images.take(np.flatnonzero(np.any(changed, axis=0))[:6])
        campaign = QueryCampaign(tmp_path, endpoint, manifest, near, QueryAttack("hopskipjump", epsilon=24, queries=1500))
        campaign.run()
    assert len(near) > 3
    assert query_card(campaign).wrong_and_accepted.value == 1.0


def test_who_is_not_told_the_verdict_goes_on_from_the_boundary(
    address: str, manifest: Manifest, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a small margin is rejected; where his perturbation goes on as far as the ball allows, it is not."""
    attack = QueryAttack("hopskipjump", epsilon=40, queries=600)
    with Endpoint(address, "strict", Disclosure.LABEL) as endpoint:
        few = images.take(np.flatnonzero(endpoint.answers(images.pixels, Disclosure.VERDICT).accepted))
        deeper = QueryCampaign(tmp_path / "deeper", endpoint, manifest, few, attack)
        deeper.run()
        monkeypatch.setattr(query, "_deeper", lambda _: None)
        content = QueryCampaign(tmp_path / "content", endpoint, manifest, few, attack)
        content.run()
    pairs = list(zip(deeper.kept(), content.kept(), strict=True))
    assert sum(after.wins(40) for after, _ in pairs) >= sum(before.wins(40) for _, before in pairs) > 3
    found = [(after, before) for after, before in pairs if before.distance <= 40 and before.label != before.truth]
    assert all(after.label != after.truth and after.distance <= 40 for after, _ in found)
    assert np.mean([after.distance - before.distance for after, before in found]) > 2


def recoloured(pixels: np.ndarray, shift: tuple[int, ...]) -> np.ndarray:
    return np.clip(pixels.astype(int) + shift, 0, 255).astype(np.uint8)


def test_an_image_that_is_wrong_as_it_is_costs_one_query_and_is_counted(
    address: str, manifest: Manifest, images: Images, tmp_path: Path
) -> None:
    wrong = Images(images.pixels[:2], (images.labels[:2] + 1) % len(manifest.classes))
    with Endpoint(address) as endpoint:
        campaign = QueryCampaign(tmp_path, endpoint, manifest, wrong, QueryAttack("boundary", epsilon=4))
        campaign.run()
    assert [(attempt.queries, attempt.distance) for attempt in campaign.kept()] == [(1, 0), (1, 0)]
    assert query_card(campaign).wrong_and_accepted.value == 1.0


def test_what_is_done_is_not_done_again_and_what_a_kill_took_is(
    running: Running, address: str, manifest: Manifest, images: Images, tmp_path: Path
) -> None:
    six, attack = images.take(np.arange(6)), QueryAttack("square", epsilon=4, queries=20)
    with Endpoint(address) as endpoint:
        QueryCampaign(tmp_path, endpoint, manifest, six, attack).run(shard=2, shards=2)
        campaign = QueryCampaign(tmp_path, endpoint, manifest, six, attack)
        assert [campaign.done(place) for place in range(6)] == [False, True] * 3
        kept = {path: path.stat().st_mtime_ns for path in campaign.folder.glob("*.safetensors")}
        before = classified(running)
        campaign.run()
        attempts = campaign.kept()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert classified(running) - before == sum(attempt.queries for attempt in attempts[::2]) + 3


def test_the_same_seed_finds_the_same_however_many_images_are_attacked_at_once(
    address: str, manifest: Manifest, images: Images, tmp_path: Path
) -> None:
    few = images.take(np.arange(3))
    found = {}
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    with Endpoint(address, disclosure=Disclosure.PROBABILITIES) as endpoint:
        for name, flights in itertools.product(("square", "boundary"), (1, 3)):
            campaign = QueryCampaign(tmp_path / str(flights), endpoint, manifest, few, QueryAttack(name, epsilon=12, queries=90))
            campaign.run(flights=flights)
            found[name, flights] = [(attempt.adversarial.tobytes(), attempt.queries) for attempt in campaign.kept()]
    assert found["square", 1] == found["square", 3]
    assert found["boundary", 1] == found["boundary", 3]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        pytest.param(
            {"version": "0123456789ab"}, "bundle: expected tiny 0123456789ab, got tiny ", id="weights of another training"
        ),
        pytest.param({"classes": ("cat", "dog")}, "classes: expected cat, dog, got annual crop", id="other classes"),
        pytest.param(
            {"input": InputSpec(height=8, width=8, channels=1)},
            r"images: expected \(8, 8, 1\), got \(8, 8, 3\)",
            id="images of another shape",
        ),
    ],
)
def test_a_server_of_another_bundle_is_refused(
    address: str, manifest: Manifest, images: Images, changed: dict[str, object], says: str, tmp_path: Path
) -> None:
    with Endpoint(address) as endpoint, pytest.raises(EndpointRefused, match=says):
        QueryCampaign(tmp_path, endpoint, manifest.model_copy(update=changed), images, QueryAttack("square", 4))


def test_a_folder_of_another_attack_is_refused(address: str, manifest: Manifest, images: Images, tmp_path: Path) -> None:
    with Endpoint(address) as endpoint:
        QueryCampaign(tmp_path, endpoint, manifest, images, QueryAttack("square", 4))
        with pytest.raises(EndpointRefused, match="holds another attack: expected epsilon 5, got 4"):
            QueryCampaign(tmp_path, endpoint, manifest, images, QueryAttack("square", 5))


@pytest.mark.parametrize("content", [pytest.param("begun on Monday", id="no JSON"), pytest.param("[1, 2]", id="a list")])
def test_a_folder_that_does_not_say_what_it_holds_is_refused(
    address: str, manifest: Manifest, images: Images, tmp_path: Path, content: str
) -> None:
    with Endpoint(address) as endpoint:
        begun = QueryCampaign(tmp_path, endpoint, manifest, images, QueryAttack("square", 4))
        (begun.folder / "attack.json").write_text(content)
        with pytest.raises(EndpointRefused, match=r"attack.json: expected the identity of a kept attack as JSON, got"):
            QueryCampaign(tmp_path, endpoint, manifest, images, QueryAttack("square", 4))


def test_a_damaged_file_is_named(address: str, manifest: Manifest, images: Images, tmp_path: Path) -> None:
    with Endpoint(address) as endpoint:
        campaign = QueryCampaign(tmp_path, endpoint, manifest, images.take(np.arange(1)), QueryAttack("square", 4, 5))
        with pytest.raises(EndpointRefused, match="expected an image that was attacked, got none"):
            query_card(campaign)
        campaign.run()
        path = campaign.folder / "00000.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(EndpointRefused, match=r"00000.safetensors: expected an attacked image, got .*delete it"):
            campaign.kept()


def test_where_no_server_is_one_sentence_says_so() -> None:
    with pytest.raises(EndpointRefused, match=r"no server answers at 127.0.0.1:1 .*`phalanx serve` starts one"):
        Endpoint("127.0.0.1:1", patience=0.2)


def test_a_server_that_goes_away_ends_the_attack(
    bundle: Path, graphs: GraphCache, manifest: Manifest, images: Images, tmp_path: Path
) -> None:
    with serving(bundle, graphs, ensembles={"full": {}}) as leaving:
        endpoint = Endpoint(str(leaving.server.address), patience=0)
        campaign = QueryCampaign(tmp_path, endpoint, manifest, images, QueryAttack("square", 4))
    with endpoint, pytest.raises(EndpointRefused, match="no server answers"):
        campaign.run()
    assert not campaign.kept()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        pytest.param({"ensemble": "ful"}, "unknown ensemble 'ful'; expected one of: full, votes-only", id="an ensemble misspelt"),
        pytest.param(
            {"disclosure": Disclosure.EVIDENCE}, "discloses probabilities at most, expected evidence", id="more than it tells"
        ),
    ],
)
def test_what_a_server_does_not_have_is_refused_at_once(address: str, asked: dict[str, str], says: str) -> None:
    with pytest.raises(EndpointRefused, match=says):
        Endpoint(address, **asked)  # type: ignore[arg-type]


def test_images_that_would_be_resized_are_refused(address: str) -> None:
    with (
        Endpoint(address) as endpoint,
        pytest.raises(EndpointRefused, match=r"takes uint8 images \(8, 8, 3\), got uint8 \(9, 9, 3\)"),
    ):
        endpoint.answers(random_pixels(1, size=9))


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        pytest.param(("bogus", 4), "expected a query attack of square, hopskipjump, boundary, got 'bogus'", id="no such attack"),
        pytest.param(
            ("square", 0.5), "expected an epsilon of 1 or more, as pixels are served whole, got 0.5", id="less than a pixel"
        ),
        pytest.param(("square", 4, 0), "expected 1 query an image or more, got 0", id="no query"),
    ],
)
def test_an_attack_that_cannot_be_is_refused(attack: tuple[str, float, int], says: str) -> None:
    with pytest.raises(EndpointRefused, match=says):
        QueryAttack(*attack)


def test_the_server_answers_to_stored_images_as_the_instrument_computed(built: Path, tmp_path: Path) -> None:
    bundle = read_bundle(built)
    campaign = Campaign(tmp_path / "out", bundle, splits_of(bundle, None), suite("smoke"), 4, 0, torch.device("cpu"))
    full = [subject for subject in full_and_members(bundle.manifest) if subject.name == "full"]
    units = [unit for unit in campaign.units(full) if unit.entry.name in ("margin-pgd", "noise")]
    for unit in units:
        campaign.attack(unit)
    ensemble = compose(bundle, EnsembleChoice("full"))
    ensembles = {"full": {}, "no-edge": {"without": ["edge"]}, "fresh": {"masks": "fresh"}}
    with serving(built, GraphCache(tmp_path / "graphs"), ensembles=ensembles) as running:
        address = str(running.server.address)
        with Endpoint(address, "full") as endpoint:
            deployment = rescore(endpoint, ensemble, campaign, units)
            turn_round(campaign, units)
            altered = rescore(endpoint, ensemble, campaign, units)
        with Endpoint(address, "no-edge") as endpoint, pytest.raises(EndpointRefused, match="expected no-edge to be"):
            rescore(endpoint, ensemble, campaign, units)
        with Endpoint(address, "fresh") as endpoint, pytest.raises(EndpointRefused, match="expected fixed masks, got fresh ones"):
            rescore(endpoint, compose(bundle, EnsembleChoice("fresh", masks="fresh")), campaign, units)
    assert (deployment.images, deployment.labels_differ, deployment.verdicts_differ) == (8, 0, 0)
    assert deployment.probability_difference <= 1e-5
    assert deployment.p_value_difference <= 0.011  # a rank or so among 100 calibration images
    assert altered.probability_difference > DEPLOYED


def turn_round(campaign: Campaign, units: Sequence[Unit]) -> None:
    """Every perturbation; what the members answered to it stays."""
    for path in [campaign.folder / "units" / unit.file for unit in units]:
        with safe_open(path, "np") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        save_file(tensors | {"delta": -tensors["delta"]}, path, metadata)


def test_a_server_that_wants_a_token_gets_the_environments(
    bundle: Path, graphs: GraphCache, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    scopes = ["classify", "describe"]
    callers = {"attacker": {"token_sha256": token_digest("its token"), "scopes": scopes, "disclosure": "verdict"}}
    with serving(bundle, graphs, ensembles={"full": {}}, callers=callers) as server:
        with pytest.raises(EndpointRefused, match="UNAUTHENTICATED: expected credentials"):
            Endpoint(str(server.server.address))
        monkeypatch.setenv("PHALANX_TOKEN", "its token")
        with Endpoint(str(server.server.address), disclosure=Disclosure.VERDICT) as endpoint:
            assert len(endpoint.answers(images.pixels[:3]).label) == 3
        with pytest.raises(EndpointRefused, match="discloses verdict at most, expected probabilities"):
            Endpoint(str(server.server.address), disclosure=Disclosure.PROBABILITIES)
