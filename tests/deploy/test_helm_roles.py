"""The Helm chart lets the scheduler read what its sources need, and nothing else."""

import json
from pathlib import Path

import pytest

from tests.support.chart import (
    EPP,
    NAME,
    Objects,
    Values,
    accepted,
    config_of,
    merged,
    render,
)
from tests.support.helm import NAMESPACE
from tests.support.kubernetes_schema import containers, of_kind, the_only
from vllm_pd_scheduler.config.sources import KubernetesSource

pytestmark = pytest.mark.usefixtures("helm")


def test_the_scheduler_alone_has_a_token_for_the_api_server() -> None:
    pod = the_only(render({}), "Deployment")["spec"]["template"]["spec"]
    with_token = [
        each["name"]
        for each in containers(pod)
        if any("serviceaccount" in mount["mountPath"] for mount in each["volumeMounts"])
    ]
    assert with_token == ["scheduler"]


SOURCES: dict[str, tuple[Values, Values]] = {
    "pods": ({"selector": "app=vllm", "ports": [8000]}, {"": {"pods"}}),
    "services": (
        {"services": {"prefill": "p", "decode": "d"}},
        {"discovery.k8s.io": {"endpointslices"}},
    ),
    "pool": (
        {"pool": "chat"},
        {
            "": {"pods"},
            "inference.networking.k8s.io": {"inferencepools"},
            "inference.networking.x-k8s.io": {"inferenceobjectives"},
            "llm-d.ai": {"inferencemodelrewrites", "inferenceobjectives"},
        },
    ),
}
"""A Kubernetes source, and what has to be read for it."""


def granted(found: Objects) -> dict[str, dict[str, set[str]]]:
    """What may be read: namespace, API group, resources."""
    for each in of_kind(found, "Role"):
        for rule in each["rules"]:
            assert rule["verbs"] == ["get", "list", "watch"]
    assert not of_kind(found, "ClusterRole")
    return {
        each["metadata"]["namespace"]: {
            group: set(rule["resources"]) for rule in each["rules"] for group in rule["apiGroups"]
        }
        for each in of_kind(found, "Role")
    }


@pytest.mark.parametrize("kind", SOURCES)
def test_the_role_has_what_the_sources_need(kind: str) -> None:
    entry, needed = SOURCES[kind]
    assert granted(render({"config": {"discovery": [{"type": "kubernetes", **entry}]}})) == {
        NAMESPACE: needed
    }


def test_each_namespace_of_a_source_has_a_role() -> None:
    (pods_entry, pods_needed), (services, services_needed) = SOURCES["pods"], SOURCES["services"]
    entries = [
        {"type": "kubernetes", "namespace": "a", **pods_entry},
        {"type": "kubernetes", "namespace": "b", **services},
        {"type": "kubernetes", "namespace": "b", **pods_entry},
    ]
    found = render({"config": {"discovery": entries}})
    assert granted(found) == {"a": pods_needed, "b": {**pods_needed, **services_needed}}
    for each in of_kind(found, "RoleBinding"):
        assert each["metadata"]["namespace"] in ("a", "b")
        assert each["subjects"] == [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}]


def test_without_a_source_in_kubernetes_there_is_nothing_to_read() -> None:
    instances = {
        f"{role}_instances": [{"id": role, "host": "10.0.0.1", "port": port}]
        for role, port in (("prefill", 8000), ("decode", 8001))
    }
    found = render({"config": instances})
    assert not granted(found)
    assert "serviceAccountToken" not in json.dumps(found)
    assert config_of(found)["discovery"] == []


@pytest.mark.parametrize("values", [{}, EPP], ids=["standalone", "epp"])
def test_the_sources_are_the_pods_of_the_fleet(values: Values, mounted: Path) -> None:
    found = render(merged(values, {"fleet": {"matchLabels": {"app": "vllm"}, "ports": [8000, 8001]}}))
    (source,) = accepted(found, mounted).discovery
    assert isinstance(source, KubernetesSource)
    if values == EPP:
        pool = the_only(found, "InferencePool")
        assert source.pool == pool["metadata"]["name"]
        assert pool["spec"]["selector"]["matchLabels"] == {"app": "vllm"}
        assert pool["spec"]["targetPorts"] == [{"number": 8000}, {"number": 8001}]
    else:
        assert source.selector == "app=vllm"
        assert source.ports == [8000, 8001]
