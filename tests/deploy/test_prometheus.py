"""Prometheus's rules name metrics that exist, fire when they should, and read what real processes say."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.compose_file import ROOT
from tests.support.known_metrics import OTHERS, known_series, names, problems
from tests.support.processes import Client, spawned, unused_ports
from tests.support.stack import client, fleet, session, stack, up
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.envoy.ports import EnvoyPorts

__all__ = ["client", "fleet", "session", "stack", "up"]

DIRECTORY = ROOT / "deploy" / "prometheus"
RULES = [
    rule
    for group in yaml.safe_load((DIRECTORY / "rules.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
SCRAPE = yaml.safe_load((DIRECTORY / "scrape.yml").read_text(encoding="utf-8"))


def known_with_recorded() -> dict[str, set[str]]:
    """The series that exist, and those that the rules make of them."""
    known = known_series()
    for name, expression in RECORDED.items():
        known[name] = set().union(*(known.get(each, set()) for each in names(expression)))
    return known


def promtool(*arguments: str) -> None:
    """Run promtool; skip the test where there is none."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = subprocess.run(
        ["promtool", *arguments], cwd=DIRECTORY, capture_output=True, text=True, timeout=HUNG_S
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_names_only_what_exists(rule: dict[str, Any]) -> None:
    assert problems(rule["expr"], known_with_recorded()) == []


def test_what_does_not_exist_is_found() -> None:
    known = known_with_recorded()
    for wrong in (
        "rate(pd_scheduler_request_total[5m])",
        'pd_scheduler_in_flight{prefill="p"}',
        "sum by (reason) (pd_scheduler_in_flight)",
        "pd_scheduler_requests_total_bucket",
        "pod:no_such_record:rate5m > 1",
    ):
        assert problems(wrong, known), wrong
    assert problems("sum by (pod) (rate(up[5m] offset 10m)) > 1e-3 or vector(2)", known) == []


def test_every_record_is_used() -> None:
    """By an alert, another record or the dashboard."""
    dashboard = (ROOT / "deploy" / "grafana" / "dashboard.json").read_text(encoding="utf-8")
    used = dashboard + "".join(rule["expr"] for rule in RULES)
    assert [name for name in RECORDED if name not in used] == []


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_it_is_and_how_grave(name: str) -> None:
    alert = ALERTS[name]
    assert re.fullmatch(r"PD[A-Z]\w+", name)
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert alert["annotations"].keys() == {"summary", "runbook"}
    assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"


def test_every_alert_is_tested() -> None:
    tested = (DIRECTORY / "rules_test.yml").read_text(encoding="utf-8")
    for name in ALERTS:
        assert re.search(rf'alertname(="|: ){name}\b', tested), name


def test_promtool_accepts_rules_and_configuration() -> None:
    promtool("check", "rules", "rules.yml")
    promtool("check", "config", "scrape.yml")


def test_promtool_finds_that_they_fire() -> None:
    promtool("test", "rules", "rules_test.yml")


def test_targets_are_where_scheduler_and_envoy_listen() -> None:
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in SCRAPE["scrape_configs"]}
    assert targets["vllm-pd-scheduler"] == [f"127.0.0.1:{SchedulerConfig().admin_port}"]
    assert targets["envoy"] == [f"127.0.0.1:{EnvoyPorts().admin}"]


@pytest.fixture
def prometheus(client: Client, tmp_path: Path) -> Iterator[str]:
    """The URL of a Prometheus on ``scrape.yml``, with the addresses of processes that run here."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    config = {**SCRAPE, "global": {"scrape_interval": "1s", "evaluation_interval": "1s"}}
    config["rule_files"] = [str(DIRECTORY / "rules.yml")]
    here: dict[str, Any] = {
        "vllm-pd-scheduler": [{"targets": [client.stack.admin], "labels": {"pod": "pod-0"}}],
        "envoy": [{"targets": [client.stack.envoy_admin], "labels": {"pod": "pod-0"}}],
        "vllm": [
            {"targets": [each.url], "labels": {"instance": each.id, "role": each.role}}
            for each in client.fleet.instances
        ],
    }
    config["scrape_configs"] = [
        {**job, "static_configs": [
            {**group, "targets": [target.removeprefix("http://") for target in group["targets"]]}
            for group in here[job["job_name"]]
        ]}
        for job in SCRAPE["scrape_configs"]
    ]  # fmt: skip
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    (port,) = unused_ports(1)
    options = {
        "config.file": path,
        "storage.tsdb.path": tmp_path / "data",
        "web.listen-address": f"127.0.0.1:{port}",
    }
    command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
    with spawned(command):
        yield f"http://127.0.0.1:{port}/api/v1"


async def test_a_real_prometheus_reads_a_real_pod(client: Client, prometheus: str) -> None:
    await client.until_split()

    async def query(expression: str) -> list[dict[str, Any]]:
        async with client.session.get(f"{prometheus}/query", params={"query": expression}) as response:
            answer = await response.json(content_type=None)
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    async def started() -> bool:
        try:
            async with client.session.get(prometheus.removesuffix("/api/v1") + "/-/ready") as response:
                return response.status == 200
        except OSError:
            return False

    async def scraped() -> bool:
        return len(await query("up == 1")) == 2 + len(client.fleet.instances)

    async def recorded() -> bool:
        return bool(await query("pod:pd_error_share:ratio5m"))

    await until(started)
    await until(scraped)
    await until(recorded)
    for name, labels in OTHERS.items():
        if name.startswith("envoy_"):
            found = await query(f'{name}{{pod="pod-0"}}')
            assert found, name
            assert set(labels) <= found[0]["metric"].keys(), name
    # The label is an instance of vLLM, not the scheduler's address.
    states = await query('pd_scheduler_instance_state{state="healthy", pod="pod-0"}')
    assert {each["metric"]["instance"] for each in states} == {each.id for each in client.fleet.instances}
    groups = (await client.json(f"{prometheus}/rules"))["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(RULES)
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] == "err"] == []
    assert await query('ALERTS{alertstate="firing"}') == []
