"""The chart's Role against an API server that counts what the scheduler asks for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.helm import NAMESPACE, ToolMissing, rendered
from tests.support.kubernetes import KINDS, OLD_OBJECTIVES, ApiServer, endpoint, endpoint_slice, pod, pool
from tests.support.kubernetes_schema import the_only
from tests.support.waiting import until
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.discovery.sources import Sources
from vllm_pd_scheduler.router import PDRouter

BY_NAME = {"inferenceobjectives", "inferencemodelrewrites"}
"""What is read of a pool besides, where the cluster has it."""


def granted(entry: dict[str, Any]) -> set[tuple[str, str, str]]:
    """API groups, resources and verbs of the Role for a source."""
    try:
        found = rendered({"config": {"discovery": [entry]}})
    except ToolMissing as error:
        pytest.skip(str(error))
    return {
        (group, resource, verb)
        for rule in the_only(found, "Role")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.mark.parametrize(
    "keys",
    [
        {"selector": "app=vllm", "ports": [8000]},
        {"pool": "chat"},
        {"services": {"prefill": "p", "decode": "d"}},
    ],
    ids=["pods", "pool", "services"],
)
async def test_it_is_what_a_source_needs_and_no_more(keys: dict[str, Any], tmp_path: Path) -> None:
    entry = {"type": "kubernetes", "namespace": NAMESPACE, **keys}
    async with ApiServer() as server:
        server.put("pods", pod("d", "10.0.0.1", role="decode"))
        server.put("inferencepools", pool("chat", {"app": "vllm"}, [8000]))
        server.put("endpointslices", endpoint_slice("d-1", "d", [endpoint("10.0.0.1")]))
        kubeconfig = server.kubeconfig(tmp_path / "kubeconfig", namespace=NAMESPACE)
        router = PDRouter(parse_config({"discovery": [{**entry, "kubeconfig": kubeconfig}]}))
        sources = Sources(router.config, router.membership, time.monotonic)
        sources.read()
        await sources.follow()
        try:

            async def found() -> bool:
                return bool(list(router.registry))

            await until(found)
        finally:
            await sources.stop()
        asked = {(_group(plural), plural, verb) for verb, plural, _ in server.requests}
    assert asked <= granted(entry)
    unused = {(group, plural) for group, plural, _ in granted(entry)} - {each[:2] for each in asked}
    besides = {(_group(plural), plural) for plural in BY_NAME} | {(_group_of(OLD_OBJECTIVES[0]), OLD_OBJECTIVES[1])}
    assert unused <= (besides if "pool" in keys else set())


def _group(plural: str) -> str:
    return _group_of(KINDS[plural][0])


def _group_of(version: str) -> str:
    return version.rpartition("/")[0]
