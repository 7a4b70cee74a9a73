"""The examples for autoscalers: their objects are well formed, and their queries name metrics that exist."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from tests.deploy.test_fleet_examples import read
from tests.support.known_metrics import known_series, problems
from tests.support.kubernetes_schema import of_kind, the_only

INTEGER, TEXT, BOOLEAN = int, str, bool
POLICY = {"type": TEXT, "value": INTEGER, "periodSeconds": INTEGER}
RULES = {"stabilizationWindowSeconds": INTEGER, "selectPolicy": TEXT, "policies": [POLICY]}
SCALED_OBJECT = {
    "apiVersion": TEXT,
    "kind": TEXT,
    "metadata": {"name": TEXT},
    "spec": {
        "scaleTargetRef": {"apiVersion": TEXT, "kind": TEXT, "name": TEXT, "envSourceContainerName": TEXT},
        "pollingInterval": INTEGER,
        "cooldownPeriod": INTEGER,
        "idleReplicaCount": INTEGER,
        "minReplicaCount": INTEGER,
        "maxReplicaCount": INTEGER,
        "fallback": {"failureThreshold": INTEGER, "replicas": INTEGER},
        "triggers": [
            {
                "type": TEXT,
                "name": TEXT,
                "metricType": TEXT,
                "metadata": {
                    "serverAddress": TEXT,
                    "query": TEXT,
                    "threshold": TEXT,
                    "activationThreshold": TEXT,
                    "ignoreNullValues": TEXT,
                },
            }
        ],
        "advanced": {
            "restoreToOriginalReplicaCount": BOOLEAN,
            "horizontalPodAutoscalerConfig": {"behavior": {"scaleUp": RULES, "scaleDown": RULES}},
        },
    },
}
"""The part that is used of the schema of KEDA's resource ``scaledobjects.keda.sh`` and of its trigger
``prometheus`` (config/crd/bases/keda.sh_scaledobjects.yaml, and its documentation, of KEDA 2.10 and later).

All of a trigger's metadata are strings.
"""

EXAMPLES = ("scaling-keda.yaml", "scaling-hpa.yaml")


def wrong(found: Any, schema: Any, path: str = "") -> Iterator[str]:
    """Yield where an object does not follow a schema."""
    if isinstance(schema, Mapping):
        if not isinstance(found, Mapping):
            yield path
            return
        for key, value in found.items():
            if key in schema:
                yield from wrong(value, schema[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(schema, list):
        for number, each in enumerate(found):
            yield from wrong(each, schema[0], f"{path}[{number}]")
    elif type(found) is not schema:
        yield path


def scaled_objects() -> list[dict[str, Any]]:
    return of_kind(read("scaling-keda.yaml"), "ScaledObject")


def adapter_rules() -> list[dict[str, Any]]:
    text = the_only(read("scaling-hpa.yaml"), "ConfigMap")["data"]["config.yaml"]
    return list(yaml.safe_load(text)["externalRules"])


def test_keda_accepts_it() -> None:
    found = scaled_objects()
    assert len(found) == 2
    for each in found:
        assert list(wrong(each, SCALED_OBJECT)) == []
        assert each["apiVersion"] == "keda.sh/v1alpha1"
        for trigger in each["spec"]["triggers"]:
            assert trigger["type"] == "prometheus"
            # A fall-back works with this type alone.
            assert trigger["metricType"] == "AverageValue"
            assert float(trigger["metadata"]["threshold"]) > 0
            # Without a number nothing may be scaled down: null values count as failures.
            assert trigger["metadata"]["ignoreNullValues"] == "false"


def test_what_keda_would_refuse_is_found() -> None:
    (first, _) = scaled_objects()
    first["spec"]["minReplicas"] = 1
    first["spec"]["maxReplicaCount"] = "8"
    first["spec"]["triggers"][0]["metadata"]["threshold"] = 0.75
    assert sorted(wrong(first, SCALED_OBJECT)) == [
        ".spec.maxReplicaCount",
        ".spec.minReplicas",
        ".spec.triggers[0].metadata.threshold",
    ]


def queries() -> list[str]:
    found = [each["metricsQuery"] for each in adapter_rules()]
    for each in scaled_objects():
        found += [trigger["metadata"]["query"] for trigger in each["spec"]["triggers"]]
    return found


@pytest.mark.parametrize("query", queries())
def test_a_query_names_only_what_exists(query: str) -> None:
    assert problems(query, known_series()) == []


def test_both_examples_ask_the_same_and_scale_the_same() -> None:
    keda = {
        (
            each["spec"]["scaleTargetRef"]["name"],
            trigger["metadata"]["query"],
            trigger["metadata"]["threshold"],
        )
        for each in scaled_objects()
        for trigger in each["spec"]["triggers"]
    }
    asked = {each["name"]["as"]: each["metricsQuery"] for each in adapter_rules()}
    hpa = set()
    for each in of_kind(read("scaling-hpa.yaml"), "HorizontalPodAutoscaler"):
        for metric in each["spec"]["metrics"]:
            target = metric["external"]["target"]["averageValue"]
            threshold = str(int(target[:-1]) / 1000) if target.endswith("m") else target
            name = each["spec"]["scaleTargetRef"]["name"]
            hpa.add((name, asked.pop(metric["external"]["metric"]["name"]), threshold))
    assert keda == hpa
    assert asked == {}, "rules that no autoscaler uses"


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_scaled_is_the_example_fleet(name: str) -> None:
    fleet = {each["metadata"]["name"] for each in of_kind(read("fleet.yaml"), "Deployment")}
    scaled = {
        each["spec"]["scaleTargetRef"]["name"]
        for each in read(name)
        if "scaleTargetRef" in each.get("spec", {})
    }
    assert scaled == fleet
