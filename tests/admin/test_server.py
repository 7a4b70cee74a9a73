"""The admin interface over HTTP."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import aiohttp
import pytest
import pytest_asyncio

from tests.support.admin import NEW, Admin, D, P
from vllm_pd_scheduler.admin import AdminServer
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.router import PDRouter


@pytest_asyncio.fixture
async def admin() -> AsyncIterator[Admin]:
    found = Admin()
    await found.serve()
    yield found
    await found.client.close()


class TestInstances:
    async def test_one(self, admin: Admin) -> None:
        admin.healthy("d0")
        endpoint = admin.router.registry.get("d0")
        admin.router.registry.scraped(endpoint, MetricsSnapshot(0.0, 3.0, 2.0, 0.5, 0.02), 0)
        admin.router.registry.work.reserve(endpoint)
        status, body = await admin.ask("GET", "/instances/d0")
        assert status == 200
        expected = {
            "id": "d0",
            "role": "decode",
            "host": "10.0.0.1",
            "port": 8200,
            "address": "10.0.0.1:8200",
            "state": "healthy",
            "reason": None,
            "in_flight": 1,
            "waiting": 3.0,
            "requests": 6.0,
            "kv_cache_usage": 0.5,
            "latency": 0.02,
            "models": None,
            "address_age": None,
        }
        assert {key: body[key] for key in expected} == expected

    async def test_which_models_it_serves_and_how_old_its_address_is(self, admin: Admin) -> None:
        registry = admin.router.registry
        registry.models.listed(registry.get("d0"), frozenset({"base", "adapter"}))
        registry.resolved(registry.get("d0"), "10.0.0.1", time.monotonic() - 100.0)
        _, body = await admin.ask("GET", "/instances/d0")
        assert body["models"] == ["adapter", "base"]
        assert body["address_age"] >= 100.0

    async def test_one_that_is_ejected(self, admin: Admin) -> None:
        admin.healthy("d0")
        registry = admin.router.registry
        registry.add(PDInstance("d1", InstanceRole.DECODE, "10.0.0.9", 80))
        admin.healthy("d1")
        for _ in range(3):
            registry.ends.failed(registry.get("d0"), "decode: reset", 0.0)
        _, body = await admin.ask("GET", "/instances/d0")
        assert (body["state"], body["reason"]) == ("unhealthy", "ejected: decode: reset")
        _, page = await admin.ask("GET", "/metrics")
        states = [
            line
            for line in str(page).splitlines()
            if line.startswith('pd_scheduler_instance_state{instance="d0"')
        ]
        assert [line for line in states if line.endswith(" 1.0")] == [
            'pd_scheduler_instance_state{instance="d0",role="decode",state="ejected"} 1.0'
        ]

    async def test_all_or_those_of_a_role(self, admin: Admin) -> None:
        async def ids(query: str = "") -> list[str]:
            status, body = await admin.ask("GET", f"/instances{query}")
            assert status == 200
            return [each["id"] for each in body["instances"]]

        assert await ids() == ["p0", "d0"]
        assert await ids("?role=prefill") == ["p0"]
        assert await ids("?role=decode") == ["d0"]
        assert (await admin.ask("GET", "/instances?role=both"))[0] == 400

    async def test_no_key_is_shown(self, admin: Admin) -> None:
        for path in ("/instances", "/instances/d0", "/metrics"):
            assert "sk-secret" not in str(await admin.ask("GET", path))

    async def test_add_drain_remove(self, admin: Admin) -> None:
        status, body = await admin.ask("POST", "/instances", NEW)
        assert (status, body["id"], body["state"]) == (201, "d1", "starting")
        assert body["reason"] == "not probed yet"
        admin.healthy("d1")
        status, body = await admin.ask("POST", "/instances/d1/drain?force=true")
        assert (status, body["state"]) == (202, "draining")
        assert admin.router.registry.routable(InstanceRole.DECODE) == ()
        assert await admin.ask("DELETE", "/instances/d1") == (204, "")
        assert (await admin.ask("GET", "/instances/d1"))[0] == 404

    async def test_doubles(self, admin: Admin) -> None:
        assert await admin.ask("POST", "/instances", {**NEW, "id": "d0"}) == (
            409,
            {"error": "the id 'd0' is taken"},
        )
        status, body = await admin.ask("POST", "/instances", {**NEW, "host": "10.0.0.1", "port": 8200})
        assert (status, body["error"]) == (409, "10.0.0.1:8200 is already the decode instance 'd0'")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"role": "both"}, "role: must be 'prefill', 'decode' or 'encode'"),
            ({"role": None}, "role: must be 'prefill', 'decode' or 'encode'"),
            ({"port": 0}, "port: must be greater than or equal to 1"),
            ({"port": "80"}, "port: must be a valid integer"),
            ({"host": "http://h"}, "host: must be an IP address or a DNS name, without scheme or port"),
            ({"id": "../x"}, "id: "),
            ({"weight": 5}, "weight: unknown key"),
            (
                {"api_key": {"env": "PD_TEST_NOT_SET"}},
                "api_key: environment variable PD_TEST_NOT_SET is not set",
            ),
            ({"api_key": {"file": "/etc/hostname"}}, "api_key: must be one that the configuration names"),
            ({"api_key": "sk-inline"}, "api_key: must be"),
            ({"tls": True}, "tls: needs instance_tls"),
        ],
    )
    async def test_what_cannot_be_added(self, admin: Admin, change: dict[str, Any], message: str) -> None:
        status, body = await admin.ask("POST", "/instances", {**NEW, **change})
        assert status == 400
        assert body["error"].startswith(message)
        assert "sk-inline" not in body["error"]
        assert len(admin.router.get_instances()) == 2

    async def test_everything_that_is_wrong_is_said_at_once(self, admin: Admin) -> None:
        status, body = await admin.ask("POST", "/instances", {"id": "d1", "port": 0})
        assert status == 400
        keys = {problem.split(":")[0] for problem in body["error"].split("; ")}
        assert keys == {"host", "port", "role"}

    @pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b'"d1"', b"null"])
    async def test_bodies_that_are_none(self, admin: Admin, body: bytes) -> None:
        for method, path in (("POST", "/instances"), ("PUT", "/strategy")):
            status, answer = await admin.ask(method, path, body)
            assert status == 400
            assert answer["error"]
            assert not answer["error"].startswith(":"), "a path before the colon, or none"

    async def test_a_form_that_a_web_page_could_send(self, admin: Admin) -> None:
        status, body = await admin.ask("POST", "/instances", NEW, **{"content-type": "text/plain"})
        assert (status, "content-type" in body["error"]) == (415, True)
        assert len(admin.router.get_instances()) == 2

    async def test_a_key_from_the_environment(self, admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PD_TEST_KEY", "sk-other")
        status, body = await admin.ask("POST", "/instances", {**NEW, "api_key": {"env": "PD_TEST_KEY"}})
        assert status == 201
        assert "sk-other" not in str(body)
        assert admin.router.registry.get("d1").instance.api_key == "sk-other"

    async def test_unknown_ids(self, admin: Admin) -> None:
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/drain")):
            status, body = await admin.ask(method, f"/instances/nobody{path}")
            assert (status, body) == (404, {"error": "no instance has the id 'nobody'"})


class TestStrategy:
    async def test_read_and_change(self, admin: Admin) -> None:
        status, body = await admin.ask("GET", "/strategy")
        assert (status, body["strategy"]) == (200, "least_load")
        assert body["available"][:3] == ["round_robin", "least_load", "weighted"]
        status, body = await admin.ask("PUT", "/strategy", {"strategy": "weighted"})
        assert (status, body["strategy"]) == (200, "weighted")
        assert admin.router.scheduler.strategies.name == "weighted"

    @pytest.mark.parametrize(
        "body",
        [
            {"strategy": "fastest"},
            {"strategy": 5},
            {},
            {"strategy": "weighted", "more": 1},
            {"strategy": None},
            {"strategy": ""},
            {"prefill_strategy": "fastest"},
            {"prefill_strategy": "weighted", "decode_strategy": "fastest"},
            {"decode_strategy": None},
            {"strategy": "vllm_pd_scheduler.strategies.weighted:Weighted"},
            {"decode_strategy": "vllm_pd_scheduler.strategies.weighted:Weighted"},
        ],
    )
    async def test_what_it_cannot_be(self, admin: Admin, body: dict[str, Any]) -> None:
        status, answer = await admin.ask("PUT", "/strategy", body)
        assert status == 400
        assert answer["error"]
        assert admin.router.scheduler.strategies.name == "least_load"

    async def test_errors_name_the_key_and_what_there_is(self, admin: Admin) -> None:
        _, answer = await admin.ask("PUT", "/strategy", {"decode_strategy": "fastest"})
        assert answer["error"].startswith("decode_strategy: unknown strategy 'fastest'; choose one of")
        _, answer = await admin.ask("PUT", "/strategy", {"strategy": "low_latency"})
        assert answer["error"].endswith('is a preset: give "preset": "low_latency" in the configuration')
        _, answer = await admin.ask("PUT", "/strategy", {})
        assert answer["error"].startswith('give "strategy" for both roles, ')
        with mock.patch("vllm_pd_scheduler.strategies.Weighted.__init__", side_effect=RuntimeError("odd")):
            status, answer = await admin.ask("PUT", "/strategy", {"strategy": "weighted"})
        assert (status, answer) == (400, {"error": "strategy 'weighted' cannot be made: RuntimeError: odd"})

    async def test_each_role_of_its_own(self, admin: Admin) -> None:
        for body, prefill, decode in (
            ({"prefill_strategy": "slo"}, "slo", "least_load"),
            ({"decode_strategy": "weighted"}, "slo", "weighted"),
            ({"strategy": "session"}, "session", "session"),
            ({"strategy": "slo", "decode_strategy": "power_of_two"}, "slo", "power_of_two"),
            ({"prefill_strategy": "weighted", "decode_strategy": "slo"}, "weighted", "slo"),
        ):
            status, found = await admin.ask("PUT", "/strategy", body)
            assert (status, found["prefill_strategy"], found["decode_strategy"]) == (200, prefill, decode)
            assert found["strategy"] == (prefill if prefill == decode else f"{prefill}/{decode}")
            assert await admin.ask("GET", "/strategy") == (200, found)
            assert admin.router.scheduler.strategies.names == {P: prefill, D: decode}

    async def test_the_next_request_has_its_prefixes_read(self, admin: Admin) -> None:
        assert not admin.router.scheduler.reads_prefixes
        await admin.ask("PUT", "/strategy", {"prefill_strategy": "prefix_cache"})
        assert admin.router.scheduler.reads_prefixes
        await admin.ask("PUT", "/strategy", {"prefill_strategy": "least_load"})
        assert not admin.router.scheduler.reads_prefixes

    async def test_a_dotted_path_of_the_configuration(self) -> None:
        name = "vllm_pd_scheduler.strategies.weighted:Weighted"
        admin = Admin(strategy=name)
        await admin.serve()
        assert (await admin.ask("PUT", "/strategy", {"strategy": "round_robin"}))[0] == 200
        status, body = await admin.ask("PUT", "/strategy", {"strategy": name})
        assert (status, body["strategy"]) == (200, name)
        await admin.client.close()


class TestShadow:
    async def test_set_read_and_unset(self, admin: Admin) -> None:
        assert await admin.ask("GET", "/shadow") == (200, {"strategy": None})
        status, found = await admin.ask("PUT", "/shadow", {"strategy": "slo"})
        nothing = {"agreed": 0, "differed": 0, "failed": 0}
        nothing |= {"live_predicted_seconds": None, "shadow_predicted_seconds": None}
        expected = {"strategy": "slo", "microseconds_per_pick": None, "differences": []}
        assert (status, found) == (200, {**expected, "prefill": nothing, "decode": nothing})
        assert admin.router.scheduler.reads_prefixes
        assert admin.router.scheduler.strategies.name == "least_load"
        assert await admin.ask("DELETE", "/shadow") == (204, "")
        assert await admin.ask("DELETE", "/shadow") == (204, "")
        assert await admin.ask("GET", "/shadow") == (200, {"strategy": None})
        assert not admin.router.scheduler.reads_prefixes

    @pytest.mark.parametrize("name", [None, "", 5, "fastest", "vllm_pd_scheduler.strategies.slo:Slo"])
    async def test_what_it_cannot_be(self, admin: Admin, name: Any) -> None:
        await admin.ask("PUT", "/shadow", {"strategy": "weighted"})
        status, found = await admin.ask("PUT", "/shadow", {"strategy": name})
        assert (status, found["error"].split(": ")[0]) == (400, "strategy")
        assert (await admin.ask("GET", "/shadow"))[1]["strategy"] == "weighted"

    async def test_what_it_found(self, admin: Admin) -> None:
        await admin.ask("POST", "/instances", NEW)
        admin.healthy("d0", "d1")
        await admin.ask("PUT", "/shadow", {"strategy": "predicted_latency"})
        scheduler, registry = admin.router.scheduler, admin.router.registry
        registry.work.reserve(registry.get("d0"))
        request = RequestContext("/v1/completions", prompt_tokens=100.0)
        scheduler.compare_shadow(InstanceRole.DECODE, request, registry.get("d0"))
        scheduler.compare_shadow(InstanceRole.DECODE, request, registry.get("d1"))
        _, found = await admin.ask("GET", "/shadow")
        assert (found["decode"]["agreed"], found["decode"]["differed"]) == (1, 1)
        assert found["decode"]["live_predicted_seconds"] > found["decode"]["shadow_predicted_seconds"]
        assert found["microseconds_per_pick"] > 0
        (difference,) = found["differences"]
        assert (difference["role"], difference["live"], difference["shadow"]) == ("decode", "d0", "d1")
        _, page = await admin.ask("GET", "/metrics")
        labels = 'outcome="differed",role="decode",strategy="predicted_latency"'
        assert f"pd_scheduler_shadow_picks_total{{{labels}}} 1.0" in page
        await admin.ask("DELETE", "/shadow")
        assert "pd_scheduler_shadow" not in (await admin.ask("GET", "/metrics"))[1]


class TestProbes:
    async def test_alive_and_ready(self, admin: Admin) -> None:
        assert await admin.ask("GET", "/healthz") == (200, {"status": "ok"})
        assert await admin.ask("GET", "/readyz") == (503, {"error": "no decode instance can serve"})
        admin.healthy("d0")
        assert await admin.ask("GET", "/readyz") == (200, {"status": "ready"})
        admin.ready = False
        assert await admin.ask("GET", "/readyz") == (503, {"error": "draining"})
        assert await admin.ask("GET", "/healthz") == (200, {"status": "ok"})

    async def test_metrics(self, admin: Admin) -> None:
        status, page = await admin.ask("GET", "/metrics")
        assert status == 200
        assert 'pd_scheduler_instance_state{instance="d0",role="decode",state="starting"} 1.0' in page


class TestToken:
    @pytest_asyncio.fixture
    async def guarded(self) -> AsyncIterator[Admin]:
        found = Admin()
        await found.serve(token="s3cret-ü")
        yield found
        await found.client.close()

    async def test_needed_for_all_but_the_probes(self, guarded: Admin) -> None:
        calls = [("GET", "/strategy"), ("PUT", "/strategy"), ("GET", "/instances"), ("POST", "/instances")]
        calls += [("GET", "/instances/d0"), ("DELETE", "/instances/d0"), ("POST", "/instances/d0/drain")]
        calls += [("GET", "/shadow"), ("PUT", "/shadow"), ("DELETE", "/shadow")]
        calls += [("GET", "/metrics"), ("GET", "/nowhere"), ("GET", "/healthz/")]
        for method, path in calls:
            status, body = await guarded.ask(method, path)
            assert (status, body["error"][:10]) == (401, "this needs"), path
        assert len(guarded.router.get_instances()) == 2
        assert (await guarded.ask("GET", "/healthz"))[0] == 200
        assert (await guarded.ask("GET", "/readyz"))[0] == 503

    async def test_given(self, guarded: Admin) -> None:
        for value in ("Bearer s3cret-ü", "bearer s3cret-ü"):
            assert (await guarded.ask("GET", "/strategy", authorization=value))[0] == 200

    @pytest.mark.parametrize(
        "value", ["", "Bearer", "Bearer ", "Bearer s3cret", "s3cret-ü", "Basic s3cret-ü", "Bearer s3cret-ü2"]
    )
    async def test_wrong(self, guarded: Admin, value: str) -> None:
        assert (await guarded.ask("GET", "/strategy", authorization=value))[0] == 401

    async def test_bytes_that_are_no_text(self, guarded: Admin) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", guarded.client.port)
        writer.write(b"GET /strategy HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
        assert b" 401 " in await reader.readline()
        writer.close()


class TestShell:
    async def test_errors_are_json(self, admin: Admin) -> None:
        assert await admin.ask("GET", "/nowhere") == (
            404,
            {"error": "GET /nowhere: Not Found; GET / lists what there is"},
        )
        async with admin.client.request("PATCH", "/strategy") as response:
            assert response.status == 405
            assert response.headers["allow"] == "GET,HEAD,PUT"
            assert await response.json() == {"error": "PATCH /strategy: Method Not Allowed"}

    async def test_a_fault_of_our_own(self, admin: Admin, caplog: pytest.LogCaptureFixture) -> None:
        with mock.patch(
            "vllm_pd_scheduler.admin.strategy_api.strategy_names", side_effect=RuntimeError("odd")
        ):
            status, body = await admin.ask("GET", "/strategy")
        assert (status, body) == (500, {"error": "the scheduler has failed: its log says where"})
        assert "GET /strategy failed" in caplog.text
        assert "odd" in caplog.text

    async def test_a_body_without_end(self, admin: Admin) -> None:
        status, body = await admin.ask("POST", "/instances", b" " * (2 << 20))
        assert (status, list(body)) == (413, ["error"])

    async def test_one_that_cannot_listen_leaves_nothing_running(self, unused_tcp_port: int) -> None:
        """A worker that shall be the first tries again each second for as long as another has the port."""
        router = PDRouter(SchedulerConfig())
        other = await asyncio.start_server(lambda *_: None, "127.0.0.1", unused_tcp_port)
        async with other:
            before = asyncio.all_tasks()
            with pytest.raises(OSError, match="in use"):
                await AdminServer(router, is_ready=lambda: True).start("127.0.0.1", unused_tcp_port)
            assert asyncio.all_tasks() == before

    async def test_start_and_stop(self, unused_tcp_port: int) -> None:
        server = AdminServer(PDRouter(SchedulerConfig()), is_ready=lambda: True)
        other = AdminServer(PDRouter(SchedulerConfig()), is_ready=lambda: True)
        await server.start("127.0.0.1", unused_tcp_port)
        try:
            url = f"http://127.0.0.1:{unused_tcp_port}/healthz"
            async with aiohttp.ClientSession() as session, session.get(url) as response:
                assert response.status == 200
            with pytest.raises(OSError, match="in use"):
                await other.start("127.0.0.1", unused_tcp_port)
        finally:
            await server.stop()
            await other.stop()
        with pytest.raises(OSError, match="Connect call failed"):
            await asyncio.open_connection("127.0.0.1", unused_tcp_port)
