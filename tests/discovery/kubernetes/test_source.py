"""Pods, services and pools as sources: what the fleet has while the cluster changes, or cannot be asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.kubernetes import ApiServer, Refusal
from tests.support.kubernetes_answers import status_of
from tests.support.kubernetes_objects import endpoint, endpoint_slice, pod, pool
from tests.support.waiting import until
from vllm_pd_scheduler.config import ConfigError, parse_config
from vllm_pd_scheduler.discovery.source import Beside
from vllm_pd_scheduler.discovery.sources import Sources
from vllm_pd_scheduler.router import PDRouter

SELECTOR = {"selector": "app=vllm", "ports": [8000]}


class Fleet:
    """What a router knows of what one source tells."""

    def __init__(self, router: PDRouter) -> None:
        self.router = router

    @property
    def shown(self) -> dict[str, str]:
        """Role, address and whether it drains, of each instance."""
        return {
            each.id: f"{each.instance.role} {each.instance.host}:{each.instance.port}"
            + (" draining" if each.draining else "")
            for each in self.router.registry
        }

    def news(self) -> list[str]:
        """Return what was told of the source."""
        return [event.text for event in self.router.events.after(0) if event.kind == "discovery"]

    async def until(self, **expected: str) -> None:
        await until(lambda: self.shown == {key.replace("_", "-"): value for key, value in expected.items()})


Following = Callable[..., Any]


async def test_what_a_pool_has_beside_pods(server: ApiServer, kubeconfig: str) -> None:
    """Objectives and rewrites, until the configuration does not name the pool any more."""
    server.put("inferencepools", pool("chat", 8000, app="vllm"))
    objective = {"metadata": {"name": "batch"}, "spec": {"priority": -3, "poolRef": {"name": "chat"}}}
    server.put("inferenceobjectives", objective)
    rule = {"matches": [{"model": {"value": "chat"}}], "targets": [{"modelRewrite": "chat-v2"}]}
    server.put(
        "inferencemodelrewrites",
        {"metadata": {"name": "r"}, "spec": {"poolRef": {"name": "chat"}, "rules": [rule]}},
    )
    entry = {"type": "kubernetes", "namespace": "llm", "kubeconfig": kubeconfig, "pool": "chat"}
    router = PDRouter(parse_config({"discovery": [entry]}))
    beside = Beside(router.objectives, router.rewrites)
    sources = Sources(router.config, router.membership, time.monotonic, beside)
    await sources.follow()
    try:
        await until(lambda: router.objectives.priority("batch") == -3 and router.rewrites.active)
        assert router.rewrites.targets("chat") == ["chat-v2"]
        other = parse_config({"discovery": [{**entry, "pool": None, **SELECTOR}]})
        router.config.take(other, ["discovery"])
        await sources.follow()
        await until(lambda: router.objectives.priority("batch") == 0)
        assert not router.rewrites.active
    finally:
        await sources.stop()


@pytest.fixture
def follow(server: ApiServer, kubeconfig: str) -> Following:
    @asynccontextmanager
    async def following(**entry: Any) -> AsyncIterator[Fleet]:
        entry = {"type": "kubernetes", "namespace": "llm", "kubeconfig": kubeconfig, **entry}
        router = PDRouter(parse_config({"discovery": [entry]}))
        sources = Sources(router.config, router.membership, time.monotonic)
        sources.read()
        await sources.follow()
        try:
            yield Fleet(router)
        finally:
            await sources.stop()

    return following


class TestPods:
    async def test_they_come_and_go(self, server: ApiServer, follow: Following) -> None:
        server.put("pods", pod("p", "10.0.0.1", "prefill"))
        server.put("pods", pod("d", "10.0.0.2"))
        async with follow(**SELECTOR) as fleet:
            await fleet.until(p="prefill 10.0.0.1:8000", d="decode 10.0.0.2:8000")
            server.put("pods", pod("e", None))
            server.put("pods", pod("e", "10.0.0.3", ready=False))
            server.put("pods", pod("e", "10.0.0.3"))
            await until(lambda: "e" in fleet.shown)
            server.delete("pods", "d")  # it has a grace period, and is still ready
            await until(lambda: "d" not in fleet.shown)
            server.put("pods", pod("e", "10.0.0.3", ready=False))
            await fleet.until(p="prefill 10.0.0.1:8000")
            server.put("pods", pod("e", "10.0.0.3"))
            await until(lambda: "e" in fleet.shown)

    async def test_one_that_is_deleted_ends_what_it_has(self, server: ApiServer, follow: Following) -> None:
        server.put("pods", pod("d", "10.0.0.2"))
        async with follow(**SELECTOR) as fleet:
            await until(lambda: fleet.shown)
            registry = fleet.router.registry
            reservation = registry.work.reserve(registry.get("d"))
            server.delete("pods", "d")
            await fleet.until(d="decode 10.0.0.2:8000 draining")
            server.remove("pods", "d")
            server.put("pods", pod("e", "10.0.0.3"))
            await fleet.until(d="decode 10.0.0.2:8000 draining", e="decode 10.0.0.3:8000")
            reservation.release()
            fleet.router.registry.changes.note()
            await fleet.until(e="decode 10.0.0.3:8000")

    async def test_labels_that_change(self, server: ApiServer, follow: Following) -> None:
        server.put("pods", pod("a", "10.0.0.1", "prefill"))
        async with follow(**SELECTOR) as fleet:
            await fleet.until(a="prefill 10.0.0.1:8000")
            server.put("pods", pod("a", "10.0.0.1", "decode"))
            await fleet.until(a="decode 10.0.0.1:8000")
            server.put("pods", pod("a", "10.0.0.1", "both"))
            await until(lambda: set(fleet.shown) == {"a", "a.prefill"})
            server.put("pods", pod("a", "10.0.0.1", "nonsense"))
            await fleet.until()

    async def test_no_pods_are_a_word_too(self, follow: Following) -> None:
        async with follow(**SELECTOR) as fleet:
            await until(lambda: not fleet.router.membership.silent)
            assert fleet.shown == {}

    async def test_the_namespace_is_that_of_the_context(self, server: ApiServer, follow: Following) -> None:
        server.put("pods", pod("d", "10.0.0.2"))
        server.put("pods", pod("x", "10.0.0.9"), namespace="another")
        async with follow(namespace=None, **SELECTOR) as fleet:
            await fleet.until(d="decode 10.0.0.2:8000")

    async def test_many_changes_are_told_together(self, server: ApiServer, follow: Following) -> None:
        async with follow(**SELECTOR) as fleet:
            await until(lambda: server.watches)
            told = 0

            def count() -> None:
                nonlocal told
                told += 1

            fleet.router.registry.changes.subscribe(count)
            for number in range(500):
                server.put("pods", pod(f"d-{number}", f"10.0.{number >> 8}.{number & 255}"))
            await until(lambda: len(fleet.shown) == 500)
            assert told < 250


class TestServices:
    async def test_one_for_each_role(self, server: ApiServer, follow: Following) -> None:
        server.put("endpointslices", endpoint_slice("p-1", "vllm-p", endpoint("10.0.0.1", "p")))
        server.put("endpointslices", endpoint_slice("d-1", "vllm-d", endpoint("10.0.0.2", "d")))
        server.put("endpointslices", endpoint_slice("x-1", "another", endpoint("10.0.0.3", "x")))
        async with follow(services={"prefill": "vllm-p", "decode": "vllm-d"}) as fleet:
            await fleet.until(p="prefill 10.0.0.1:8000", d="decode 10.0.0.2:8000")
            ending = endpoint("10.0.0.2", "d", ready=False, serving=True, terminating=True)
            server.put("endpointslices", endpoint_slice("d-1", "vllm-d", ending, endpoint("10.0.0.4", "e")))
            await fleet.until(p="prefill 10.0.0.1:8000", e="decode 10.0.0.4:8000")
            server.remove("endpointslices", "d-1")
            await fleet.until(p="prefill 10.0.0.1:8000")


class TestPool:
    async def test_each_port_of_each_pod(self, server: ApiServer, follow: Following) -> None:
        server.put("inferencepools", pool("chat", 8000, 8001, app="vllm"))
        server.put("inferencepools", pool("another", 1, app="vllm"))
        server.put("pods", pod("d", "10.0.0.2"))
        server.put("pods", pod("p", "10.0.0.1", "prefill", annotations={"llm-d.ai/active-ports": "8001"}))
        async with follow(pool="chat") as fleet:
            await fleet.until(
                d_rank_0="decode 10.0.0.2:8000",
                d_rank_1="decode 10.0.0.2:8001",
                p_rank_1="prefill 10.0.0.1:8001",
            )
            server.put("inferencepools", pool("chat", 9000, app="vllm"))
            server.remove("pods", "p")
            await fleet.until(d="decode 10.0.0.2:9000")
            assert server.asked("list", "pods") == 1

    async def test_pods_of_the_host_network(self, server: ApiServer, follow: Following) -> None:
        server.put("inferencepools", pool("chat", 8000, 8001, app="vllm"))
        for name, port in (("a", "8000"), ("b", "8001")):
            server.put("pods", pod(name, "192.0.2.1", annotations={"llm-d.ai/active-ports": port}))
        async with follow(pool="chat") as fleet:
            await fleet.until(a_rank_0="decode 192.0.2.1:8000", b_rank_1="decode 192.0.2.1:8001")

    async def test_a_selector_that_changes(self, server: ApiServer, follow: Following) -> None:
        server.put("inferencepools", pool("chat", 8000, app="vllm"))
        server.put("pods", pod("d", "10.0.0.2"))
        server.put("pods", pod("e", "10.0.0.3", app="new", tier="gold"))
        async with follow(pool="chat") as fleet:
            await fleet.until(d="decode 10.0.0.2:8000")
            server.put("inferencepools", pool("chat", 8000, app="new", tier="gold"))
            await fleet.until(e="decode 10.0.0.3:8000")
            await until(lambda: server.watches == 4)  # pool, pods, objectives, rewrites

    async def test_one_that_is_not_there_yet(self, server: ApiServer, follow: Following) -> None:
        server.put("pods", pod("d", "10.0.0.2"))
        async with follow(pool="chat") as fleet:
            await until(fleet.news)
            assert fleet.router.membership.silent
            assert fleet.news() == [
                "there is no InferencePool chat in namespace llm; the instances that were known stay"
            ]
            server.put("inferencepools", pool("chat", 8000, app="vllm"))
            await fleet.until(d="decode 10.0.0.2:8000")
            assert [text.endswith("/llm/pool/chat: all is well again") for text in fleet.news()[1:]] == [True]

    async def test_one_that_is_deleted_leaves_its_pods(self, server: ApiServer, follow: Following) -> None:
        server.put("inferencepools", pool("chat", 8000, app="vllm"))
        server.put("pods", pod("d", "10.0.0.2"))
        server.put("pods", pod("e", "10.0.0.3"))
        async with follow(pool="chat") as fleet:
            await until(lambda: len(fleet.shown) == 2)
            server.remove("inferencepools", "chat")
            await until(fleet.news)
            server.delete("pods", "d")
            await fleet.until(e="decode 10.0.0.3:8000")

    @pytest.mark.parametrize(
        ("spec", "news"),
        [
            ({"selector": {"matchLabels": {}}, "targetPorts": [{"number": 1}]}, "selects no label"),
            ({"selector": {}, "targetPorts": [{"number": 1}]}, "selects no label"),
            ({"selector": {"app": "vllm"}, "targetPortNumber": 8000}, "there is no InferencePool chat"),
            ({}, "there is no InferencePool chat"),
        ],
    )
    async def test_one_that_makes_no_sense(
        self, server: ApiServer, follow: Following, spec: dict[str, Any], news: str
    ) -> None:
        server.put("inferencepools", {"metadata": {"name": "chat"}, "spec": spec})
        async with follow(pool="chat") as fleet:
            await until(fleet.news)
            assert news in fleet.news()[0]

    async def test_a_pool_of_none(self, server: ApiServer, follow: Following) -> None:
        server.put("inferencepools", pool("chat", 8000, app="vllm"))
        async with follow(pool="chat") as fleet:
            await until(lambda: not fleet.router.membership.silent)
            assert fleet.news() == []

    async def test_a_cluster_without_pools(self, server: ApiServer, follow: Following) -> None:
        server.kinds = {("v1", "pods")}
        async with follow(pool="chat") as fleet:
            await until(fleet.news)
            assert "inferencepools in namespace llm: 404: 404 page not found" in fleet.news()[0]


async def shut_down(server: ApiServer) -> None:
    await server.down()


async def forbid(server: ApiServer) -> None:
    server.forbidden = {("list", "pods"), ("watch", "pods")}
    server.expire()


async def overload(server: ApiServer) -> None:
    server.refuse_all = Refusal(429, status_of(429, "TooManyRequests", "later"), {"retry-after": "1"})
    server.expire()


async def break_down(server: ApiServer) -> None:
    server.refuse_all = Refusal(500, b"half a {")
    server.cut_watches()


@pytest.mark.parametrize("go_away", [shut_down, forbid, overload, break_down])
async def test_while_the_api_server_is_away_the_fleet_stays(
    server: ApiServer, follow: Following, go_away: Callable[[ApiServer], Awaitable[None]]
) -> None:
    server.put("pods", pod("d", "10.0.0.2"))
    async with follow(**SELECTOR) as fleet:
        await until(lambda: fleet.shown)
        membership = fleet.router.membership
        await go_away(server)
        await until(fleet.news)
        lost_at = time.monotonic()
        await asyncio.sleep(0.3)  # in which it is asked some ten times
        assert fleet.shown == {"d": "decode 10.0.0.2:8000"}
        assert len(fleet.news()) == 1
        assert "pods in namespace llm: " in fleet.news()[0]
        [age] = membership.ages(time.monotonic()).values()
        assert age >= time.monotonic() - lost_at
        server.refuse_all, server.forbidden = None, set()
        server.remove("pods", "d")
        server.put("pods", pod("e", "10.0.0.3"))
        if go_away is shut_down:
            await server.up()
        await fleet.until(e="decode 10.0.0.3:8000")
        await until(lambda: len(fleet.news()) == 2)
        assert fleet.news()[1].endswith("/llm/app=vllm:8000: all is well again")


async def test_a_kubeconfig_that_comes_later(server: ApiServer, follow: Following, tmp_path: Path) -> None:
    server.put("pods", pod("d", "10.0.0.2"))
    late = tmp_path / "late"
    for namespace in ("llm", None):
        async with follow(kubeconfig=str(late), namespace=namespace, **SELECTOR) as fleet:
            await until(fleet.news)
            assert f"{late} cannot be read: No such file or directory" in fleet.news()[0]
            server.kubeconfig(late)
            await fleet.until(d="decode 10.0.0.2:8000")
        late.unlink()


class TestConfiguration:
    @pytest.mark.parametrize(
        ("entry", "problem"),
        [
            ({}, 'give one of "selector", "pool" and "services"'),
            ({"pool": "a", "services": {"decode": "b"}}, 'give one of "selector", "pool" and "services"'),
            ({"selector": "a=b"}, '"selector" and "ports" belong together'),
            ({"pool": "a", "ports": [1]}, '"selector" and "ports" belong together'),
            ({"selector": "a=b", "ports": [1, 1]}, "ports: one is given twice"),
            ({"pool": "../nodes"}, "must be a name as Kubernetes has them"),
            ({"pool": "a", "namespace": "a/b"}, "must be a name as Kubernetes has them"),
            ({"services": {"enc": "a"}}, "prefill"),
            ({"pool": "a", "role_label": "a b"}, "must be the key of a label"),
            ({"pool": "a", "roles": {"decode": "d"}}, "must be a valid list"),
        ],
    )
    def test_what_is_refused(self, entry: dict[str, Any], problem: str) -> None:
        with pytest.raises(ConfigError, match=problem):
            parse_config({"discovery": [{"type": "kubernetes", **entry}]})

    @pytest.mark.parametrize(
        ("entry", "name"),
        [
            ({"pool": "chat"}, "kubernetes:pool/chat"),
            ({"pool": "chat", "namespace": "llm"}, "kubernetes:llm/pool/chat"),
            ({"pool": "chat", "namespace": "llm", "context": "eu"}, "kubernetes:eu/llm/pool/chat"),
            ({"selector": "app=vllm", "ports": [1, 2]}, "kubernetes:app=vllm:1,2"),
            ({"services": {"prefill": "p", "decode": "d"}}, "kubernetes:prefill=p,decode=d"),
        ],
    )
    def test_names(self, entry: dict[str, Any], name: str) -> None:
        [found] = parse_config({"discovery": [{"type": "kubernetes", **entry}]}).discovery
        assert found.label == name
