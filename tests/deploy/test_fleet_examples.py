"""The example fleets: Kubernetes accepts them, the chart finds them, and their pods end in time."""

import json
import re
from typing import Any

import pytest

from tests.support.compose_file import ROOT, VLLM_COMPOSE
from tests.support.helm import objects
from tests.support.kubernetes_schema import check_schema, of_kind, the_only
from vllm_pd_scheduler.config import SchedulerConfig

EXAMPLES = ROOT / "deploy" / "examples"
FLEETS = ("fleet.yaml", "fleet-leaderworkerset.yaml")
FOUND_BY = {"llm-d.ai/inference-serving": "true"}
"""The chart's `fleet.matchLabels` by default."""

Template = dict[str, Any]


def read(name: str) -> list[dict[str, Any]]:
    return objects((EXAMPLES / name).read_text(encoding="utf-8"))


def templates(name: str) -> list[Template]:
    """The pods of a fleet that serve HTTP."""
    found = read(name)
    groups = [each["spec"]["leaderWorkerTemplate"] for each in of_kind(found, "LeaderWorkerSet")]
    plain = [each["spec"]["template"] for each in of_kind(found, "Deployment")]
    return plain + [each["leaderTemplate"] for each in groups]


def command(container: dict[str, Any]) -> str:
    return " ".join(container["command"] + container["args"])


def option(container: dict[str, Any], name: str) -> int:
    (value,) = re.findall(rf"--{name}=(\d+)", command(container))
    return int(value)


def role(template: Template) -> str:
    return str(template["metadata"]["labels"]["llm-d.ai/role"])


def sleeps(container: dict[str, Any]) -> int:
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    return int(seconds)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.iterdir()))
def test_kubernetes_accepts_it(name: str) -> None:
    found = read(name)
    check_schema(found)
    for each in of_kind(found, "LeaderWorkerSet"):
        group = each["spec"]["leaderWorkerTemplate"]
        for which in ("leaderTemplate", "workerTemplate"):
            metadata = {"name": which, **group[which].get("metadata", {})}
            check_schema(
                [{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": group[which]["spec"]}]
            )


@pytest.mark.parametrize("name", FLEETS)
def test_the_chart_finds_both_roles(name: str) -> None:
    found = templates(name)
    assert [role(each) for each in found] == ["prefill", "decode"]
    for each in found:
        assert FOUND_BY.items() <= each["metadata"]["labels"].items()
        (container,) = each["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert ports["http"] == option(container, "port") == 8000
        assert str(ports["nixl"]) == environment["VLLM_NIXL_SIDE_CHANNEL_PORT"]
        assert "VLLM_NIXL_SIDE_CHANNEL_HOST" in environment


@pytest.mark.parametrize("name", FLEETS)
def test_a_worker_of_a_group_is_no_instance(name: str) -> None:
    for each in of_kind(read(name), "LeaderWorkerSet"):
        assert "metadata" not in each["spec"]["leaderWorkerTemplate"]["workerTemplate"]


@pytest.mark.parametrize("name", FLEETS)
def test_the_connector_is_the_one_that_is_documented(name: str) -> None:
    compose = VLLM_COMPOSE.read_text(encoding="utf-8")
    for each in templates(name):
        (container,) = each["spec"]["containers"]
        (transfer,) = re.findall(r"--kv-transfer-config='?(\{.*?\})", command(container))
        which = "p_kv" if role(each) == "prefill" else "d_kv"
        (documented,) = re.findall(rf"&{which} '(.*)'", compose)
        assert json.loads(transfer) == json.loads(documented)
        assert container["image"] in compose


@pytest.mark.parametrize("name", FLEETS)
def test_a_pod_has_time_to_end(name: str) -> None:
    defaults = SchedulerConfig()
    for each in templates(name):
        (container,) = each["spec"]["containers"]
        running = option(container, "shutdown-timeout")
        assert each["spec"]["terminationGracePeriodSeconds"] > sleeps(container) + running
        if role(each) == "prefill":
            assert sleeps(container) > defaults.kv_lease_duration  # D may still fetch
            assert running >= defaults.prefill_timeout


@pytest.mark.parametrize("name", FLEETS)
def test_a_worker_outlives_its_leader(name: str) -> None:
    for each in of_kind(read(name), "LeaderWorkerSet"):
        group = each["spec"]["leaderWorkerTemplate"]
        (leader,) = group["leaderTemplate"]["spec"]["containers"]
        (worker,) = group["workerTemplate"]["spec"]["containers"]
        assert sleeps(worker) > sleeps(leader) + option(leader, "shutdown-timeout")


def test_prometheus_scrapes_the_port_of_the_pods() -> None:
    spec = the_only(read("podmonitor.yaml"), "PodMonitor")["spec"]
    assert spec["selector"]["matchLabels"] == FOUND_BY
    assert [each["port"] for each in spec["podMetricsEndpoints"]] == ["http"]
