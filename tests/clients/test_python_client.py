"""phalanx-client against a real server."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType

import grpc
import numpy as np
import pytest

from models.bundle import write_bundle
from phalanx_client import (
    Classification,
    Client,
    Disclosure,
    ImageError,
    Masks,
    PhalanxError,
    RawPixels,
    Robustness,
    Share,
    Verdict,
)
from service.config import ServiceConfig
from service.server import Server
from tests.bundles import CLASSES, tiny_parts
from tests.service.cards import CONJECTURE, with_card

REPOSITORY = Path(__file__).resolve().parents[2]
CLIENT = REPOSITORY / "clients" / "python"
TILE = REPOSITORY / "examples" / "tiles" / "forest-1.png"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundle = write_bundle(tmp_path_factory.mktemp("client") / "bundle", with_card(tiny_parts()))
    config = ServiceConfig.model_validate(
        {
            "bundle": bundle.path,
            "listen": "127.0.0.1:0",
            "metrics": False,
            "ensembles": {"full": {}, "no-bayesian": {"without": ["bayesian"]}},
            "device": {"provider": "cpu", "threads": 1},
            "limits": {"max_images_per_request": 16},
            "shutdown": {"notice_seconds": 0},
        }
    )
    with Server(config) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(str(server.address)) as client:
        yield client


def pixels(seed: int = 0, size: int = 8) -> RawPixels:
    return RawPixels.from_array(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def assert_alike(one: object, other: object) -> None:
    """The same answer, but for what a batch of another size changes in the last digits of a float."""
    assert isinstance(one, Classification)
    assert isinstance(other, Classification)
    for each in fields(Classification):
        assert _numbers(getattr(one, each.name)) == pytest.approx(_numbers(getattr(other, each.name)), abs=1e-5), each.name


def _numbers(value: object) -> list[object]:
    """Everything in a value, without its nesting."""
    if isinstance(value, tuple):
        return [number for part in value for number in _numbers(part)]
    if is_dataclass(value):
        return [number for each in fields(value) for number in _numbers(getattr(value, each.name))]
    return [value]


def test_paths_bytes_and_pixels_are_classified_together(client: Client) -> None:
    answer = client.classify(TILE, str(TILE), TILE.read_bytes(), pixels())
    first, *others, raw = answer.results
    assert isinstance(first, Classification)
    assert len(others) == 2
    for other in others:
        assert_alike(first, other)
    assert isinstance(raw, Classification)
    assert (first.resized, raw.resized) == (True, False)
    assert answer.ensemble == "full"
    assert answer.disclosure is Disclosure.EVIDENCE
    assert first.class_name == CLASSES[first.class_index]
    assert first.verdict in (Verdict.CLEAN, Verdict.SUSPECT, Verdict.REJECTED)
    assert first.trusted == (first.verdict is Verdict.CLEAN)
    assert {vote.member for vote in first.votes} == {"metric", "edge", "adversarial", "bayesian"}
    assert len(first.detections) == 5
    assert sum(first.probabilities) == pytest.approx(1, abs=1e-5)
    assert first.confidence == pytest.approx(max(first.probabilities))
    assert first.masks_seed is not None


def test_metadata_goes_with_the_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = write_bundle(tmp_path / "bundle", tiny_parts())
    values = {"bundle": bundle.path, "listen": "127.0.0.1:0", "metrics": False, "logging": {"requests": "all"}}
    with caplog.at_level("INFO"), Server(ServiceConfig.model_validate(values)) as server, Client(str(server.address)) as client:
        client.classify(pixels(), metadata=(("x-request-id", "one"),))
        list(client.classify_stream([("a", pixels())], metadata=(("x-request-id", "many"),)))
    assert [record.__dict__["request_id"] for record in caplog.records if "request_id" in record.__dict__] == ["one", "many"]


def test_what_is_not_disclosed_is_absent(client: Client) -> None:
    (result,) = client.classify(pixels(), disclosure=Disclosure.LABEL).results
    assert isinstance(result, Classification)
    assert result.verdict is Verdict.UNSPECIFIED
    assert not result.trusted
    assert (result.confidence, result.p_value, result.masks_seed) == (None, None, None)
    assert (result.probabilities, result.votes, result.detections) == ((), (), ())


def test_a_bad_image_is_an_error_among_the_results(client: Client) -> None:
    bad, good = client.classify(b"not an image", pixels()).results
    assert isinstance(bad, ImageError)
    assert bad.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "images[0]" in bad.field
    assert isinstance(good, Classification)


def test_a_refused_call_says_which_field_and_why(client: Client) -> None:
    with pytest.raises(PhalanxError, match=r"INVALID_ARGUMENT: expected 1 to 16 images, got 0") as refused:
        client.classify()
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(refused.value.fields) == ["images"]
    with pytest.raises(PhalanxError, match=r"NOT_FOUND: .*'nobody'"):
        client.classify(pixels(), ensemble="nobody")


def test_a_caller_beyond_its_quota_is_told_so_and_when_to_come_back(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", tiny_parts())
    config = ServiceConfig.model_validate(
        {
            "bundle": bundle.path,
            "listen": "127.0.0.1:0",
            "metrics": False,
            "quota": {"images_per_second": 0.1, "burst_images": 1},
            "device": {"provider": "cpu", "threads": 1},
            "shutdown": {"notice_seconds": 0},
        }
    )
    with Server(config) as server, Client(str(server.address)) as client:
        client.classify(pixels())
        with pytest.raises(PhalanxError, match=r"RESOURCE_EXHAUSTED: .* more than its 0\.1 images a second") as refused:
            client.classify(pixels())
    assert refused.value.reason == "QUOTA"
    assert 5 < (refused.value.retry_seconds or 0) <= 10


def test_a_server_that_is_not_there_is_an_error_of_the_same_kind() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(PhalanxError, match="UNAVAILABLE"):
        client.classify(pixels(), timeout=5)


def test_a_server_that_ends_is_asked_once_more_where_another_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed worker or a replaced replica looks like to a caller."""
    bundle = write_bundle(tmp_path / "bundle", tiny_parts())
    plain = {"bundle": bundle.path, "metrics": False, "device": {"provider": "cpu"}, "shutdown": {"notice_seconds": 0}}
    servers = [Server(ServiceConfig.model_validate({**plain, "listen": "127.0.0.1:0"}))]
    again = ServiceConfig.model_validate({**plain, "listen": servers[0].address})
    with Client(str(servers[0].address)) as client:
        before = client.classify(pixels())
        servers[0].drain()
        replacement = threading.Timer(0.5, lambda: servers.append(Server(again)))
        replacement.start()
        try:
            assert client.classify(pixels()).results == before.results
        finally:
            replacement.join()
            servers[-1].drain()
        monkeypatch.setattr("phalanx_client.client.PATIENCE", 0.2)
        with pytest.raises(PhalanxError) as caught:
            client.classify(pixels())
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_a_stream_keeps_order_and_ids_and_survives_a_bad_image(client: Client) -> None:
    images = [(f"image {i}", b"broken" if i == 3 else pixels(i)) for i in range(20)]
    answers = list(client.classify_stream(images, ensemble="no-bayesian"))
    assert [answer.id for answer in answers] == [name for name, _ in images]
    assert [i for i, answer in enumerate(answers) if isinstance(answer.result, ImageError)] == [3]
    for (_, image), answer in zip(images, answers, strict=True):
        if isinstance(image, RawPixels):
            assert_alike(answer.result, client.classify(image, ensemble="no-bayesian").results[0])


def test_a_stream_may_be_left_early(client: Client) -> None:
    def forever() -> Iterator[tuple[str, RawPixels]]:
        while True:
            yield "again", pixels()

    stream = client.classify_stream(forever())
    assert next(stream).id == "again"
    del stream
    assert client.classify(pixels()).results


def test_what_the_callers_images_raise_is_raised_to_the_caller(client: Client) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        list(client.classify_stream([("there", pixels()), ("not there", "nowhere.png")]))


def test_an_unknown_ensemble_fails_the_request_and_not_the_stream(client: Client) -> None:
    (answer,) = client.classify_stream([("x", pixels())], ensemble="nobody")
    assert answer.id == "x"
    assert isinstance(answer.result, ImageError)
    assert (answer.result.code, answer.result.field) == (grpc.StatusCode.NOT_FOUND.value[0], "ensemble")
    assert "'nobody'" in answer.result.message


def test_ensembles_are_described(client: Client) -> None:
    full, other = client.list_ensembles()
    assert (full.name, full.is_default, other.name, other.is_default) == ("full", True, "no-bayesian", False)
    assert full == client.get_ensemble() == client.get_ensemble("full")
    assert full.classes == CLASSES
    assert (full.input.height, full.input.width, full.input.channels) == (8, 8, 3)
    assert [member.name for member in full.members if member.stochastic] == ["bayesian"]
    assert (full.masks, other.masks) == (Masks.FIXED, Masks.UNSPECIFIED)
    assert full.rates.calibration_images == 200
    assert full.bundle.name == "tiny"
    assert full.limits.max_images_per_request == 16
    with pytest.raises(PhalanxError, match="NOT_FOUND"):
        client.get_ensemble("nobody")


def test_what_was_measured_under_attack_is_told_of_that_ensemble_alone(client: Client) -> None:
    full, other = client.list_ensembles()
    assert full.robustness == Robustness(
        epsilon=4,
        images=300,
        clean=Share(0.94, 0.94 - 0.01, 0.94 + 0.01),
        robust=Share(0.62, 0.62 - 0.01, 0.62 + 0.01),
        robust_with_rejection=Share(0.62 + 0.09, 0.62 + 0.09 - 0.01, 0.62 + 0.09 + 0.01),
        suite="quick",
        publishable=False,
        conjecture=CONJECTURE,
        failed_checks=(),
    )
    assert other.robustness is None


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        pytest.param(np.zeros((2, 2, 3), np.float32), r"expected uint8 .* got float32 \(2, 2, 3\)", id="floats"),
        pytest.param(np.zeros((1, 2, 2, 3), np.uint8), r"got uint8 \(1, 2, 2, 3\)", id="a batch"),
    ],
)
def test_an_array_that_is_no_image_is_refused(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RawPixels.from_array(array)


def test_pixels_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 x 2 x 3 = 12 bytes of pixels, got 11"):
        RawPixels(b"\0" * 11, 2, 2)
    assert RawPixels.from_array(np.zeros((2, 3), np.uint8)) == RawPixels(b"\0" * 6, 2, 3, channels=1)


def test_nothing_but_grpcio_and_protobuf_is_needed() -> None:
    script = """if True:
        import sys

        NEEDED = {"google", "grpc", "phalanx_client", "typing_extensions"}  # the last is grpcio's own need

        class Nothing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] not in NEEDED | sys.stdlib_module_names or name == "google.rpc":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Nothing())
        import phalanx_client
        print(phalanx_client.Client().classify.__name__)
    """
    environment = {"PYTHONPATH": str(CLIENT / "src")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "classify\n", done.stderr


def test_the_distribution_holds_the_package_its_types_and_its_licence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=CLIENT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"phalanx_client/__init__.py", "phalanx_client/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_stubs_are_those_of_the_contract(tmp_path: Path) -> None:
    generator = load_generator()
    generator.generate(tmp_path)
    made, kept = tmp_path / "pb", CLIENT / "src" / "phalanx_client" / "pb"
    files = {path.relative_to(made) for path in made.rglob("*.py*")}
    assert files == {path.relative_to(kept) for path in kept.rglob("*.py*") if path.suffix != ".pyc"}
    for file in files:
        assert (made / file).read_text() == (kept / file).read_text(), f"{file}: run clients/python/generate"


def load_generator() -> ModuleType:
    from importlib.machinery import SourceFileLoader

    loader = SourceFileLoader("generate_client", str(CLIENT / "generate"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
