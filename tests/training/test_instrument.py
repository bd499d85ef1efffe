"""attack, ablate and report on a real bundle: in shards, after a kill, and against what must be refused."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from models.bundle import read_bundle
from models.card import CARD_FILE, Card, Deployment, Query, read_card
from models.composition import EnsembleChoice, compose
from models.ensemble import decide
from models.manifest import content_version
from tests.training.commands import ROOT, SMOKE, answered, phalanx_train
from training.attacks.masks import hears_masks
from training.data import splits_of
from training.evaluation.campaign import FLOAT, ROUNDED, Campaign
from training.evaluation.card import ablated_on, build, checks, ledgers_of, under_fresh_masks
from training.evaluation.queries import QUERY_FILE, kept_queries
from training.evaluation.report import EXAMPLES, OF_EACH, against, commands, examples, finished
from training.evaluation.scores import ledger, share
from training.evaluation.subjects import controls, every_subset, full_and_members
from training.evaluation.suites import assembled, suite
from training.system import Members, load_networks


@pytest.fixture(scope="module")
def campaign(built: Path, folder: Path) -> Campaign:
    bundle = read_bundle(built)
    return Campaign(folder, bundle, splits_of(bundle, None), suite("smoke"), 8, 0, torch.device("cpu"))


def test_what_is_done_is_not_done_again_and_what_a_kill_took_is(built: Path, folder: Path) -> None:
    units = sorted(folder.glob("units/*/*/*.safetensors"))
    lost = units[len(units) // 2]
    kept = {path: path.stat().st_mtime_ns for path in units if path != lost}
    before = load_file(lost)
    lost.unlink()

    ended = phalanx_train("attack", str(built), *SMOKE, "--out", str(folder))
    assert ended.returncode == 0, ended.stderr
    assert "passed: every loss and gradient is finite: 0 losses and 0 gradients" in ended.stdout
    ended = phalanx_train("ablate", str(built), *SMOKE, "--out", str(folder))
    assert ended.returncode == 0, ended.stderr

    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    after = load_file(lost)
    assert all(np.array_equal(after[name], before[name]) for name in before)


FULL_DISK = """
import resource, signal, sys
from training.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # of any file: room for what the folder holds, and for no unit
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_and_a_kill_lose_nothing_that_was_done(built: Path, tmp_path: Path) -> None:
    attack = ["attack", str(built), *SMOKE, "--out", str(tmp_path), "--systems", "metric"]
    ended = subprocess.run([sys.executable, "-c", FULL_DISK, *attack], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "00000-00008.safetensors: cannot be written (File too large); what was done is kept" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.glob("units/*/*/*"))

    with subprocess.Popen([sys.executable, "-m", "training.cli", *attack], cwd=ROOT, stdout=subprocess.DEVNULL) as killed:
        while not (kept := list(tmp_path.glob("units/*/*/*.safetensors"))) and killed.poll() is None:
            time.sleep(0.01)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in kept}

    ended = answered(*attack)
    assert ended.returncode == 0, ended.stderr
    assert "metric " in ended.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_a_control_that_only_noise_was_tried_on_stands_and_is_reported(campaign: Campaign) -> None:
    units = finished(campaign)
    falls = "the undefended member bayesian falls"
    by_noise = [unit for unit in units if unit.entry.access == "none"]
    left = {check.name: check.measured for check in checks(campaign, by_noise) if not check.passed}
    assert falls in left
    assert float(left[falls].split("%")[0]) > 10


def test_every_adversarial_image_lies_in_the_ball_and_is_what_the_members_answered_to(campaign: Campaign) -> None:
    members = Members(load_networks(campaign.bundle, torch.device("cpu")), campaign.bundle.manifest.masks.seed)
    full = compose(campaign.bundle, EnsembleChoice("full"))
    for unit in finished(campaign)[::7]:
        clean = campaign.images.pixels[unit.start : unit.stop].astype(np.float32)
        for version in (FLOAT, ROUNDED):
            pixels = campaign.adversarial(unit, version)
            assert np.abs(pixels.astype(np.float32) - clean).max() <= campaign.epsilon * unit.entry.epsilon_factor
            with torch.inference_mode():
                again = decide(full, members.outputs(full.members, torch.from_numpy(pixels)))
            kept = decide(full, campaign.found(unit).outputs[version])
            assert np.array_equal(again.label.numpy(), kept.label)
            assert np.allclose(again.probabilities.numpy(), kept.probabilities, atol=1e-5)


def test_a_system_is_judged_on_what_was_made_against_the_others_too(campaign: Campaign) -> None:
    units = finished(campaign)
    found = ledger(campaign, compose(campaign.bundle, EnsembleChoice("full")), units)
    assert {"full", "adversarial", "edge", "metric", "bayesian"} <= {row.against for row in found.rows}
    assert not any(row.counts for row in found.rows if row.against == "naive-soft-vote")
    counted = found.where(lambda row: row.counts)
    assert bool((counted.robust <= counted.where(lambda row: row.against == "full").robust).all())


@pytest.fixture(scope="module")
def reported(built: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle that was given its card."""
    copy = tmp_path_factory.mktemp("with-card") / "bundle"
    shutil.copytree(built, copy)
    page = copy.parent / "report.html"
    ended = phalanx_train("report", str(copy), *SMOKE, "--out", str(folder), "--html", str(page), "--embed")
    assert ended.returncode == 0, ended.stderr
    assert "Robustness" in page.read_text(encoding="utf-8")
    return copy


def test_the_card_goes_into_the_bundle_and_says_what_it_lacks(built: Path, reported: Path, folder: Path) -> None:
    before, after = read_bundle(built).manifest, read_bundle(reported)
    assert (after.manifest.version, after.manifest.subject) == (before.version, before.subject)
    card = read_card(after.manifest, dict(after.documents))
    assert card == Card.model_validate_json((folder / CARD_FILE).read_bytes())
    assert card is not None
    assert card.headline.ensemble == "full"
    assert not card.headline.publishable
    assert any("standard suite" in lack for lack in card.missing)
    assert [system.name for system in card.systems] == ["adversarial", "bayesian", "edge", "metric", "full"]
    assert card.ablation is not None
    assert len(card.ablation.subsets) == 15
    for figure in ("clean", "robust", "rejecting_5"):  # Shapley values share out what all members together have
        whole = next(subset for subset in card.ablation.subsets if len(subset.members) == 4)
        total = sum(w.shapley.value for w in card.ablation.worths if (w.figure, w.attacker) == (figure, "adaptive"))
        if figure != "clean":  # the subset's clean accuracy is of the whole test split
            assert total == pytest.approx(getattr(whole, figure).value)


def test_masks_that_nobody_knows_are_attacked_and_drawn_again(campaign: Campaign) -> None:
    units = finished(campaign)
    subjects = {subject.name: subject for subject in full_and_members(campaign.bundle.manifest)}

    def points(name: str) -> list[tuple[int, int, int]]:
        return [(point.samples, point.n, point.draws) for point in under_fresh_masks(campaign, subjects[name], units)]

    assert points("bayesian") == [(0, 8, 10), (2, 8, 10)]  # fewer draws are tried on the whole ensemble only
    assert points("edge") == []
    heard = hears_masks(campaign.system(subjects["full"]))
    assert points("full") == ([(0, 8, 10), (1, 8, 10), (2, 8, 10)] if heard else [])
    assert not any("fresh masks" in lack for lack in build(campaign, units, ledgers_of(campaign, units), ()).missing)


def test_no_unit_is_counted_twice(campaign: Campaign) -> None:
    files = [unit.file for unit in finished(campaign)]
    assert len(files) == len(set(files))


def test_the_whole_list_leaves_no_attack_to_be_missed(built: Path, tmp_path: Path) -> None:
    """The list of `standard`, with as little of each attack as there can be."""
    few = assembled(
        "standard", images=4, steps=1, restarts=1, apgd=1, targets=1, queries=2, draws=1, weights=(1.0,), curve=3, fab=1, masks=(1,)
    )
    bundle = read_bundle(built)
    campaign = Campaign(tmp_path, bundle, splits_of(bundle, None), few, 4, 0, torch.device("cpu"))
    units = list(campaign.units(full_and_members(bundle.manifest)))
    for unit in units:
        campaign.attack(unit)
    card = build(campaign, units, ledgers_of(campaign, units), ())
    names = {check.name for check in card.checks}
    for more in ("four times the steps", "three times the starts"):
        assert {f"{more} change nothing", f"{more} of the joint attack change nothing"} <= names
    assert "longer-noise does not beat the gradient" in names
    others = ("1,000 images", "ablation", "server", "the ensemble's size", "seeds")
    assert [lack for lack in card.missing if not any(other in lack for other in others)] == []
    assert {entry.name for entry in few.entries} <= {entry.name for entry in suite("standard").entries}


def test_examples_are_of_attacks_on_the_ensemble_in_their_order(campaign: Campaign) -> None:
    """What was made against another system fools the ensemble, too, now and then; it shows nothing of it."""
    full = full_and_members(campaign.bundle.manifest)[-1]
    units, order = against(campaign, full, finished(campaign)), [entry.name for entry in campaign.suite.entries]
    assert [unit.entry.name for unit in units] == [name for name in order if name in {unit.entry.name for unit in units}]
    assert units[0].entry.name == "margin-pgd"
    assert {"margin-pgd", "features", "joint"} <= {unit.entry.name for unit in units}
    assert all(unit.subject == campaign.owner(full, unit.entry) for unit in units)
    shown = [example.attack for example in examples(campaign, finished(campaign))]
    assert shown == sorted(shown, key=order.index)
    assert 0 < len(shown) <= EXAMPLES
    assert max(shown.count(attack) for attack in shown) <= OF_EACH


def test_half_an_ablation_is_none(campaign: Campaign) -> None:
    units = finished(campaign)
    assert build(campaign, units, ledgers_of(campaign, units), ()).ablation is not None
    fewer = [unit for unit in units if unit.subject.name != "edge+metric"]
    card = build(campaign, fewer, ledgers_of(campaign, fewer), ())
    assert card.ablation is None
    assert "an ablation of every subset" in card.missing


def test_a_campaign_grows_and_an_ablation_may_stop_before_it(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every subset on two images, then the ensemble and its members on four."""
    monkeypatch.setattr("training.evaluation.campaign.UNIT", 2)
    few = assembled("few", images=4, steps=2, restarts=1, apgd=1, targets=1, queries=2, draws=1, weights=(1.0,), curve=0)
    bundle = read_bundle(built)
    mains = [*full_and_members(bundle.manifest), *controls(bundle.manifest)]
    begun, grown = (Campaign(tmp_path, bundle, splits_of(bundle, None), few, n, 0, torch.device("cpu")) for n in (2, 4))
    for unit in begun.units([*mains, *every_subset(bundle.manifest)]):
        begun.attack(unit)
    odd = Campaign(tmp_path, bundle, splits_of(bundle, None), few, 3, 0, torch.device("cpu"))
    cut_short = list(odd.units(mains[:1]))[1]
    assert (cut_short.start, cut_short.stop) == (2, 3)
    odd.attack(cut_short)
    assert {(unit.start, unit.stop) for unit in grown.units(mains) if grown.done(unit)} == {(0, 2)}
    for unit in grown.units(mains):
        if not grown.done(unit):
            grown.attack(unit)

    units = finished(grown)
    assert (ablated_on(begun, finished(begun)), ablated_on(grown, units)) == (2, 2)
    first, whole = (build(c, finished(c), ledgers_of(c, finished(c)), ()) for c in (begun, grown))
    assert (first.n, whole.n) == (2, 4)
    assert first.ablation is not None
    assert whole.ablation == first.ablation
    assert {attack.robust.n for attack in whole.systems[-1].attacks} == {2, 4}  # what was made against a subset is of two
    assert "an ablation on 4 images (it has 2)" in whole.missing


def test_of_query_attacks_that_are_alike_the_one_on_most_images_counts(built: Path, tmp_path: Path) -> None:
    bundle = read_bundle(built)
    campaign = Campaign(tmp_path, bundle, splits_of(bundle, None), suite("smoke"), 8, 0, torch.device("cpu"))
    for n, won in ((100, 9), (8, 1)):
        each = Query(
            attack="square", ensemble="full", disclosure="label", queries=20, median_queries=20,
            wrong_and_accepted=share(np.arange(n) < won),
        )  # fmt: skip
        folder = tmp_path / "endpoint" / f"square-full-label-20-n{n}"
        folder.mkdir(parents=True)
        (folder / QUERY_FILE).write_text(each.model_dump_json())
    (found,) = kept_queries(campaign)
    assert (found.wrong_and_accepted.n, found.wrong_and_accepted.value) == (100, 0.09)


def test_a_server_that_saw_a_part_of_the_images_is_said_to_have(campaign: Campaign) -> None:
    units = finished(campaign)
    made = sum(unit.stop - unit.start for unit in campaign.units(full_and_members(campaign.bundle.manifest)))

    def missing(images: int) -> list[str]:
        deployment = Deployment(images=images, labels_differ=0, p_value_difference=0.0)
        lacks = build(campaign, units, ledgers_of(campaign, units), (), deployment=deployment).missing
        return [lack for lack in lacks if "running server (" in lack]

    assert missing(made) == []
    assert missing(made - 1) == [f"the adversarial images scored by the running server (it saw {made - 1:,} of {made:,})"]


def test_what_to_type_again_says_how_many_images_each_part_had() -> None:
    args = argparse.Namespace(suite="quick", data="here", seed=0, bundle=Path("b"), control=None)
    assert commands(args, 1000, 300) == [
        "phalanx-train attack b --suite quick --data FOLDER --images 1000",
        "phalanx-train ablate b --suite quick --data FOLDER --images 300",
        "phalanx-train report b --suite quick --data FOLDER --images 1000",
    ]
    assert not any("ablate" in line for line in commands(args, 1000, 0))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(("--seed", "1"), "holds another campaign: expected seed 1, got 0", id="another seed in a folder in use"),
        pytest.param(("--systems", "everything"), "no system everything; there are adversarial", id="a system misspelt"),
        pytest.param(("--shard", "3/2"), "expected I/N with 1 <= I <= N", id="a share that is none"),
        pytest.param(("--jobs", "2", "--shard", "1/2"), "expected --jobs or --shard, got both", id="shards of shards"),
        pytest.param(("--jobs", "0"), "--jobs: expected 1 or more, got 0", id="no process at all"),
    ],
)
def test_a_clumsy_attack_is_answered_in_one_sentence(built: Path, folder: Path, arguments: tuple[str, ...], says: str) -> None:
    ended = answered("attack", str(built), *SMOKE, "--out", str(folder), *arguments)
    assert ended.returncode != 0
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("epsilon", [0.0, 255.5])
def test_a_radius_that_is_none_is_refused(built: Path, tmp_path: Path, epsilon: float) -> None:
    shutil.copytree(built, copy := tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    manifest["provenance"]["epsilon"] = epsilon
    manifest["version"] = content_version(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    ended = answered("attack", str(copy), *SMOKE, "--out", str(tmp_path / "out"))
    assert ended.returncode == 2
    assert f"expected an epsilon in (0, 255] in its provenance, got {epsilon:g}" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [pytest.param("begun on Monday", id="no JSON"), pytest.param("[1, 2]", id="a list")])
def test_a_folder_that_does_not_say_what_it_holds_is_refused(built: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "campaign.json").write_text(content)
    ended = answered("attack", str(built), *SMOKE, "--out", str(tmp_path))
    assert ended.returncode == 2
    assert "campaign.json: expected the identity of a kept campaign as JSON, got" in ended.stderr


def test_an_unknown_suite_names_those_there_are(built: Path) -> None:
    ended = answered("attack", str(built), "--suite", "brutal")
    assert ended.returncode == 2
    assert "invalid choice: 'brutal'" in ended.stderr
    assert "standard" in ended.stderr


def test_weights_that_are_not_those_of_the_graph_are_not_attacked(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(built, copy)
    (copy / "edge.safetensors").write_bytes((copy / "metric.safetensors").read_bytes())
    ended = answered("attack", str(copy), *SMOKE, "--out", str(tmp_path / "out"))
    assert ended.returncode == 2
    assert "edge.safetensors: expected SHA-256" in ended.stderr


def test_a_report_of_half_a_campaign_says_what_is_missing(built: Path, tmp_path: Path) -> None:
    ended = answered("attack", str(built), *SMOKE, "--out", str(tmp_path), "--systems", "metric")
    assert ended.returncode == 0, ended.stderr
    ended = answered("report", str(built), *SMOKE, "--out", str(tmp_path))
    assert ended.returncode == 2
    assert "phalanx-train attack done, got" in ended.stderr


def test_a_damaged_unit_is_named(built: Path, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "campaign"
    shutil.copytree(folder, copy)
    unit = copy / "units" / "full" / "margin-pgd" / "00000-00008.safetensors"
    unit.write_bytes(unit.read_bytes()[:100])
    ended = answered("report", str(built), *SMOKE, "--out", str(copy))
    assert ended.returncode == 2
    assert "margin-pgd/00000-00008.safetensors: expected a unit of this campaign" in ended.stderr


def test_a_campaign_says_what_it_is_about(folder: Path) -> None:
    said = json.loads((folder / "campaign.json").read_text(encoding="utf-8"))
    assert (said["suite"], said["seed"]) == ("smoke", 0)
    assert "n" not in said
