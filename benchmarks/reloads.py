"""200 reloads under load, two bundles in turn: how many calls failed, or were answered wrongly, or by half of each.

    python -m benchmarks.reloads

One server process with an admin port; callers in this process, unary and streaming. Every answer is compared with what its
bundle answers at rest. The second bundle is the first with other temperatures, so that answers tell them apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np

from benchmarks.processes import REPOSITORY, await_serving, free_port, phalanx, provenance, random_images, request
from models.bundle import read_bundle, read_manifest, write_bundle
from service.access import token_digest
from service.connect import with_token
from service.pb.phalanx.v1 import admin_pb2, admin_pb2_grpc
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc as pb_grpc

TOKEN = "of this benchmark"
SCOPES = ["classify", "ablate", "describe", "admin"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=REPOSITORY / "models" / "bundles" / "eurosat")
    parser.add_argument("--reloads", type=int, default=200)
    parser.add_argument("--callers", type=int, default=6, help="one more streams (default: %(default)s)")
    given = parser.parse_args()
    print(f"{given.reloads} reloads, {given.callers} callers and a stream; {provenance()}")
    with tempfile.TemporaryDirectory() as folder:
        bundles = [given.bundle.resolve(), other_temperatures(given.bundle, Path(folder) / "other")]
        link, admin = Path(folder) / "bundle", f"127.0.0.1:{free_port()}"
        link.symlink_to(bundles[0])
        callers = {"all": {"token_sha256": token_digest(TOKEN), "scopes": SCOPES}}
        config = {"bundle": str(link), "admin": admin, "callers": callers, "ensembles": {"full": {}}}
        with phalanx(config, Path(folder)) as server:
            await_serving(server)
            with server.channel() as public, grpc.insecure_channel(admin) as private:
                stub = pb_grpc.DefenseEnsembleStub(with_token(public, TOKEN))
                operator = admin_pb2_grpc.AdminStub(with_token(private, TOKEN))
                failed = measure(stub, operator, link, bundles, given.reloads, given.callers)
    sys.exit(failed)


def measure(
    stub: pb_grpc.DefenseEnsembleStub,
    operator: admin_pb2_grpc.AdminStub,
    link: Path,
    bundles: list[Path],
    reloads: int,
    callers: int,
) -> int:
    """1 where anything failed."""
    images = request(random_images(3, read_manifest(bundles[0]).input.shape))

    def swap(bundle: Path) -> float:
        aside = link.with_name("aside")
        aside.symlink_to(bundle)
        aside.replace(link)
        return operator.Reload(admin_pb2.ReloadRequest(), timeout=60).seconds

    expected = {}
    for bundle in reversed(bundles):
        swap(bundle)
        answer = stub.Classify(images)
        expected[answer.bundle_version] = [result.classification for result in answer.results]
    assert len(expected) == len(bundles), "the two bundles must have different versions"
    outcomes: Counter[str] = Counter()
    over = threading.Event()

    def judged(version: str, got: list[pb.Classification]) -> str:
        same = all(
            g.class_index == w.class_index and np.allclose(g.probabilities, w.probabilities, atol=1e-5)
            for g, w in zip(got, expected[version], strict=False)
        )
        return f"right, by {version}" if same else "WRONG"

    def ask() -> None:
        while not over.is_set():
            try:
                answer = stub.Classify(images, timeout=30)
                outcomes[judged(answer.bundle_version, [result.classification for result in answer.results])] += 1
            except grpc.RpcError as error:
                call: object = error
                assert isinstance(call, grpc.Call)
                outcomes[f"FAILED {call.code().name}"] += 1

    def stream() -> None:
        def requests() -> Iterator[pb.ClassifyStreamRequest]:
            while not over.is_set():
                yield pb.ClassifyStreamRequest(image=images.images[0])

        for answer in stub.ClassifyStream(requests()):
            failed = answer.result.HasField("error")
            outcomes["FAILED in the stream" if failed else judged(answer.bundle_version, [answer.result.classification])] += 1

    seconds = []
    began = time.monotonic()
    with ThreadPoolExecutor(callers + 1) as pool:
        running = [pool.submit(ask) for _ in range(callers)] + [pool.submit(stream)]
        for turn in range(reloads):
            seconds.append(swap(bundles[turn % 2]))
        over.set()
        for each in running:
            each.result(60)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:>8} {outcome}")
    median, longest = statistics.median(seconds), max(seconds)
    print(f"a reload took {median:.2f} s in the median, {longest:.2f} s at most; {time.monotonic() - began:.0f} s in all")
    return int(any(not outcome.startswith("right") for outcome in outcomes))


def other_temperatures(bundle: Path, target: Path) -> Path:
    """The bundle with every voter's temperature halved: the same classes, other probabilities."""
    parts = read_bundle(bundle).parts()
    members = [replace(member, temperature=member.temperature / 2) for member in parts.members]
    return write_bundle(target, replace(parts, members=members, documents={})).path


if __name__ == "__main__":
    main()
