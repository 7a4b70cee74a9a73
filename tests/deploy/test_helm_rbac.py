"""The chart's Role against an API server that counts what the scheduler asks for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.helm import NAMESPACE, ToolMissing, rendered
from tests.support.kubernetes import KINDS, OLD_OBJECTIVES, ApiServer
from tests.support.kubernetes_objects import endpoint, endpoint_slice, pod, pool
from tests.support.kubernetes_schema import the_only
from tests.support.waiting import until
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.discovery.sources import Sources
from vllm_pd_scheduler.router import PDRouter


def _group(version: str) -> str:
    return version.rpartition("/")[0]


OF_A_POOL = {
    (_group(version), plural)
    for version, plural in (
        OLD_OBJECTIVES,
        *((KINDS[plural][0], plural) for plural in ("inferenceobjectives", "inferencemodelrewrites")),
    )
}
"""What is read besides by who wants priorities and rewrites."""


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
        server.put("inferencepools", pool("chat", 8000, app="vllm"))
        server.put(
            "endpointslices",
            endpoint_slice("d-1", "d", endpoint("10.0.0.1", "d")),
        )
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
        asked = {(_group(KINDS[plural][0]), plural, verb) for verb, plural, _ in server.requests}
    assert asked <= granted(entry)
    unused = {each[:2] for each in granted(entry)} - {each[:2] for each in asked}
    assert unused <= (OF_A_POOL if "pool" in keys else set())
