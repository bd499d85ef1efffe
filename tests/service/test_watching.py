"""What ships for operators, against the real thing: promtool, and a Prometheus that scraped a running server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import grpc
import pytest
import yaml

from service.graph_cache import GraphCache
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from tests.service.serving import ENSEMBLES, random_pixels, request, serving

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"


def program(name: str) -> str:
    """Of $PROMETHEUS, where `make test` unpacks Debian's package, or of this machine."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PROMETHEUS", ""), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"{name} is not here; on Debian it is in the package prometheus")
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads((DEPLOY / "grafana" / "phalanx.json").read_text())["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    """Every query of the dashboard, by its panel, as Grafana would send it."""
    values = {"$ensemble": ".*", "$__rate_interval": "1m"}
    return [
        (panel["title"], re.sub(r"\$\w+", lambda name: values[name[0]], target["expr"]))
        for panel in panels()
        for target in panel["targets"]
    ]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def test_the_alerts_pass_their_unit_tests() -> None:
    promtool = program("promtool")
    for arguments in (
        ["check", "rules", "alerts.yml"],
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "alerts.test.yml"],
    ):
        done = subprocess.run([promtool, *arguments], cwd=ALERTS.parent, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_unit_test_in_which_it_fires() -> None:
    tests = yaml.safe_load((ALERTS.parent / "alerts.test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if case.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in rules() if "alert" in rule}


class Prometheus:
    def __init__(self, address: str) -> None:
        self._address = address

    def ask(self, query: str) -> list[dict[str, Any]]:
        return list(self.get("query", query=query)["result"])

    def get(self, what: str, **parameters: str) -> Any:
        with urlopen(f"http://{self._address}/api/v1/{what}?{urlencode(parameters)}", timeout=10) as response:
            return json.load(response)["data"]


@pytest.fixture(scope="module")
def prometheus(tiny_bundle: Path, graphs: GraphCache, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has scraped a server with something of everything: answers, rejections, errors, batches, reloads, a shadow."""
    binary, folder = program("prometheus"), tmp_path_factory.mktemp("prometheus")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    decision = {"review_rate": 0.5, "reject_rate": 0.2}  # so that something is set aside
    ensembles = {**ENSEMBLES, "full": {"shadow": {"ensemble": "fresh"}}}
    quarantine = {"folder": folder / "quarantine"}
    with serving(tiny_bundle, graphs, decision=decision, ensembles=ensembles, quarantine=quarantine) as running:
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [{"job_name": "phalanx", "static_configs": [{"targets": [str(running.server.metrics_address)]}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [
            binary,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}",
            f"--web.listen-address={address}",
        ]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                asked = Prometheus(address)
                _await(asked, "up == 1")  # some seconds: Prometheus looks for new targets every five
                for turn in range(6):  # counts must be seen to rise
                    _traffic(running)
                    if turn == 2:
                        running.server.reload("the test")
                    time.sleep(1)
                for query in ("ensemble:phalanx_flagged:ratio_rate30m", "rate(phalanx_verdicts_total[1m]) > 0"):
                    _await(asked, query)
                yield asked
            finally:
                process.terminate()


def _traffic(running: Any) -> None:
    running.native.Classify(request(random_pixels(200)))
    for name in ("no-edge", "votes-only"):
        running.native.Classify(request(random_pixels(5), name))
    broken = pb.ClassifyRequest(images=[pb.Image(encoded=b"no image"), *request(random_pixels(1)).images])
    running.native.Classify(broken)
    with pytest.raises(grpc.RpcError):
        running.native.Classify(pb.ClassifyRequest())


def _await(asked: Prometheus, query: str, seconds: float = 60.0) -> None:
    """Until the query finds something."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(URLError):  # it starts
            if asked.ask(query):
                return
        assert time.monotonic() < end, f"Prometheus finds nothing for {query}"
        time.sleep(0.2)


def test_every_query_of_the_dashboard_finds_something(prometheus: Prometheus) -> None:
    empty = [f"{title}: {query}" for title, query in queries() if not prometheus.ask(query)]
    assert not empty, empty
    assert len(queries()) >= 20


def test_quantiles_and_ratios_of_the_dashboard_are_numbers(prometheus: Prometheus) -> None:
    for title, query in queries():
        values = [float(series["value"][1]) for series in prometheus.ask(query)]
        assert any(value == value for value in values), f"{title}: {query} is NaN throughout"


def test_every_rule_is_evaluated_and_every_recorded_one_finds_something(prometheus: Prometheus) -> None:
    found = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(found) == len(rules())
    assert {rule["health"] for rule in found} == {"ok"}
    late = ("ratio_rate5m", "ratio_rate30m", "ratio_rate1h", "ratio_rate6h")
    recorded = [rule["record"] for rule in rules() if "record" in rule and "errors" not in rule["record"]]
    assert recorded
    assert all(prometheus.ask(name) for name in recorded)
    # no error of the server's own was made: there is nothing to record, and nothing must burn
    assert not any(prometheus.ask(f"ensemble:phalanx_errors:{window} > 0") for window in late)


def test_names_of_metrics_follow_prometheus_practice(prometheus: Prometheus) -> None:
    """Of ours: a prefix, base units, `_total` on counters and on nothing else."""
    for name, entries in prometheus.get("metadata").items():
        if not name.startswith("phalanx_"):
            continue
        kind = entries[0]["type"]
        assert not name.endswith("_total") or kind == "counter", name
        if kind == "counter":  # whose name Prometheus keeps without the suffix
            assert prometheus.get("series", **{"match[]": f"{name.removesuffix('_total')}_total"}), name
        assert not re.search(r"milli|micro|_ms\b|percent|kilo", name), name
        if kind == "histogram":
            assert name.endswith(("_seconds", "_images", "_value")), name
