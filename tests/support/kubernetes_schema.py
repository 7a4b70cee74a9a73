"""Holds objects to the schemas of Kubernetes, and to the rules of its `restricted` pods."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

CORE = (
    "v1",
    "apps/v1",
    "autoscaling/v2",
    "networking.k8s.io/v1",
    "policy/v1",
    "rbac.authorization.k8s.io/v1",
)
"""API versions of Kubernetes itself. The others have their schemas in clusters only."""

VERSION = "1.37.0"


_accepted: set[str] = set()
"""Objects that have been checked."""


@cache
def _validate() -> Any:
    """Return the validator, which from then on reads each of its files once; skip the test without it."""
    utils = pytest.importorskip("kubernetes_validate.utils")
    utils.schema_contents = cache(utils.schema_contents)
    return utils.validate


def check_schema(found: list[dict[str, Any]]) -> None:
    """Fail if an object of Kubernetes itself has an unknown field or a wrong value."""
    validate = _validate()
    for each in found:
        text = json.dumps(each, sort_keys=True)
        if each["apiVersion"] in CORE and text not in _accepted:
            validate(each, VERSION, strict=True)
            _accepted.add(text)


def pods(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the `spec` of each pod that the objects lead to."""
    for each in found:
        if each["kind"] == "Pod":
            yield each["spec"]
        elif each["kind"] == "Deployment":
            yield each["spec"]["template"]["spec"]
        elif each["kind"] == "LeaderWorkerSet":
            group = each["spec"]["leaderWorkerTemplate"]
            yield from (group[f"{which}Template"]["spec"] for which in ("leader", "worker"))


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all containers of a pod, those that run before the others first."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


def of_kind(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the objects of a kind."""
    return [each for each in found if each["kind"] == kind]


def the_only(found: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Return the object of a kind of which there is one."""
    (one,) = of_kind(found, kind)
    return one
