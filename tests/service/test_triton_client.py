"""The Open Inference Protocol as clients of others speak it: NVIDIA's tritonclient and its perf_analyzer, unmodified.

They run in an environment of their own, which `make test` sets up and names in TRITON_PYTHON: they need another protobuf,
and no process may load two packages' stubs of one protocol.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.pb.phalanx.v1 import defense_ensemble_pb2
from tests.service.serving import SIZE, Running, random_pixels, request

TRITON_PYTHON = os.environ.get("TRITON_PYTHON", "")
SECONDS = 120
pytestmark = pytest.mark.skipif(not TRITON_PYTHON, reason="TRITON_PYTHON names no Python that has tritonclient: use `make test`")


@pytest.fixture(scope="module")
def told(running: Running) -> dict[str, Any]:
    """All that the client made of the server's answers about three images."""
    pixels = io.BytesIO()
    np.save(pixels, random_pixels(3))
    caller = Path(__file__).with_name("triton_caller.py")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [TRITON_PYTHON, str(caller), str(running.server.address), "full"],
        input=pixels.getvalue(), capture_output=True, timeout=SECONDS, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_tritonclient_finds_the_server_ready(told: dict[str, Any]) -> None:
    assert told["live"]
    assert told["ready"] == [True, True, True]
    assert told["metadata"]["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": ["-1", str(SIZE), str(SIZE), "3"]}]
    assert told["config"]["max_batch_size"] == 256
    assert int(told["statistics"][0]["inference_count"]) >= 6


def test_tritonclient_is_told_what_our_own_client_is(told: dict[str, Any], running: Running) -> None:
    ours = [result.classification for result in running.native.Classify(request(random_pixels(3))).results]
    outputs = told["outputs"]
    assert outputs["label"] == ["INT64", [answer.class_index for answer in ours]]
    assert [defense_ensemble_pb2.Verdict.Name(1 + code) for code in outputs["verdict"][1]] == [
        defense_ensemble_pb2.Verdict.Name(answer.verdict) for answer in ours
    ]
    expected: dict[str, Any] = {
        "probabilities": [answer.probabilities for answer in ours],
        "votes": [[vote.probabilities for vote in answer.votes] for answer in ours],
        "p_value": [answer.p_value for answer in ours],
    }
    for name, values in expected.items():
        assert outputs[name][0] == "FP32"
        np.testing.assert_allclose(outputs[name][1], values, atol=1e-5, err_msg=name)


def test_tritonclient_gets_the_outputs_it_asks_for(told: dict[str, Any]) -> None:
    assert told["chosen"] == ["mine", told["outputs"]["verdict"][1], None]


def test_tritonclient_is_told_what_was_expected_and_what_came(told: dict[str, Any]) -> None:
    assert told["refused"][0] == "StatusCode.INVALID_ARGUMENT"
    assert "expected one input, `image` UINT8 [-1, 8, 8, 3], got one called 'pixels'" in told["refused"][1]
    assert told["unknown"][0] == "StatusCode.NOT_FOUND"
    assert "unknown model 'nobody'" in told["unknown"][1]


def test_perf_analyzer_measures_the_server(running: Running, tmp_path: Path) -> None:
    """It reads configuration and statistics before, during and after its own load; a wrong count there stops it."""
    binary = Path(TRITON_PYTHON).with_name("perf_analyzer")
    libraries = [str(folder) for folder in binary.parents[1].glob("lib/python*/site-packages/nvidia/cuda_runtime/lib")]
    environment = os.environ | {"LD_LIBRARY_PATH": ":".join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")])}
    starts = subprocess.run([binary, "--version"], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    if starts.returncode:
        pytest.skip(f"perf_analyzer does not start: {starts.stderr.strip()}; on Debian it needs the package libb64-0d")
    report = tmp_path / "report.csv"
    done = subprocess.run(
        [
            binary, "-m", "full", "-u", str(running.server.address), "-i", "grpc", "-b", "2", "--concurrency-range", "2",
            "--measurement-mode", "count_windows", "--measurement-request-count", "50", "-s", "999", "-r", "3",
            "-f", str(report),
        ],
        env=environment, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = csv.DictReader(io.StringIO(report.read_text()))
    assert float(row["Inferences/Second"]) > 0
    assert float(row["Server Compute Infer"]) > 0
