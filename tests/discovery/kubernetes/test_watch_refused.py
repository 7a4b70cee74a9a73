"""A list and a watch that are refused, or answered with nonsense: the reason is told, what is known stays."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.discovery.kubernetes.watching import Heard, followed, names, until_names
from tests.support.kubernetes import ApiServer, Refusal
from tests.support.kubernetes_answers import line, status_of, too_large
from tests.support.kubernetes_objects import pod
from tests.support.waiting import until
from vllm_pd_scheduler.discovery.kubernetes import api as api_module
from vllm_pd_scheduler.discovery.kubernetes import watch as module
from vllm_pd_scheduler.discovery.kubernetes.api import Api
from vllm_pd_scheduler.discovery.kubernetes.objects import Pod
from vllm_pd_scheduler.discovery.kubernetes.pods import PODS
from vllm_pd_scheduler.discovery.kubernetes.watch import ListWatch

REFUSALS = {
    "401 Unauthorized": Refusal(401, status_of(401, "Unauthorized", "Unauthorized")),
    "403 Forbidden": Refusal(403, status_of(403, "Forbidden", "pods is forbidden: …")),
    "404: 404 page not found": Refusal(404, b"404 page not found\n"),
    "429 TooManyRequests": Refusal(429, status_of(429, "TooManyRequests", "later"), {"retry-after": "1"}),
    "500 InternalError": Refusal(500, status_of(500, "InternalError", "etcd")),
    "503: upstream connect error": Refusal(503, b"upstream connect error"),
    "504 Timeout": Refusal(504, too_large(10**9, 1), {"retry-after": "1"}),
    "502: <html>": Refusal(502, b"<html>\n<body>bad gateway</body></html>"),
    "301: ": Refusal(301, b"", {"location": "http://127.0.0.1:1/"}),
    "404: ": Refusal(404, b"\xff\xfe"),
    "list makes no sense: Input data was truncated": Refusal(200, b'{"kind":"PodList","metadata":{"resou'),
    "list makes no sense: JSON is malformed": Refusal(200, b"<html>"),
    "list makes no sense: Expected `object`": Refusal(200, b"[]"),
    "list makes no sense: Expected `array | null`": Refusal(200, {"metadata": {}, "items": {}}),
}


class TestRefused:
    """What was known stays, the reason is told once, and it goes on when the server does."""

    @pytest.mark.parametrize("reason", REFUSALS)
    async def test_once_it_ran(
        self, pods: ListWatch[Pod], server: ApiServer, heard: Heard, reason: str
    ) -> None:
        server.refuse_all = REFUSALS[reason]
        server.expire()
        asked = len(server.requests)
        await until(lambda: len(server.requests) > asked + 4)
        assert server.asked("watch") == 1
        assert names(pods) == {"p1", "p2"}
        told = [each for each in heard.reasons if reason in each]
        assert len(told) == 1, heard.reasons
        assert told[0].startswith("pods in namespace llm: ")
        server.remove("pods", "p1")
        server.refuse_all = None
        await until_names(pods, "p2")
        lives = heard.lives
        await until(lambda: heard.lives > lives)

    @pytest.mark.parametrize("reason", REFUSALS)
    async def test_from_the_start(self, api: Api, server: ApiServer, heard: Heard, reason: str) -> None:
        server.refuse_all = REFUSALS[reason]
        watch = ListWatch(api, PODS, "llm", heard)
        await followed(watch, lambda: len(server.requests) > 4)
        assert not watch.listed
        assert heard.changes == heard.lives == 0
        assert len(heard.reasons) == 1

    async def test_by_an_event(self, pods: ListWatch[Pod], server: ApiServer, heard: Heard) -> None:
        server.send(line({"type": "ERROR", "object": status_of(500, "InternalError", "etcd")}))
        await until(lambda: heard.reasons == ["pods in namespace llm: 500 InternalError: etcd"])
        server.put("pods", pod("p3"))
        await until_names(pods, "p1", "p2", "p3")

    async def test_a_watch_that_alone_is_forbidden(
        self, pods: ListWatch[Pod], server: ApiServer, heard: Heard
    ) -> None:
        """Then the list is asked for again, and that is enough to see what changes."""
        server.forbidden = {("watch", "pods")}
        server.end_watches()
        server.put("pods", pod("p3"))
        await until(lambda: server.asked("list") > 4)
        await until_names(pods, "p1", "p2", "p3")
        assert len(heard.reasons) == 1
        assert 'cannot watch resource "pods" in API group "" in the namespace "llm"' in heard.reasons[0]

    async def test_a_pause_is_as_long_as_the_server_asks(
        self, pods: ListWatch[Pod], server: ApiServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slept: list[float] = []
        sleep = asyncio.sleep

        async def noted(seconds: float) -> None:
            slept.append(seconds)
            await sleep(0)

        monkeypatch.setattr(api_module, "MAX_RETRY_AFTER_S", 60.0)
        monkeypatch.setattr(module.asyncio, "sleep", noted)
        server.refusals.extend(
            [
                Refusal(429, b"", {"retry-after": "7"}),
                Refusal(429, status_of(429, "TooManyRequests", "", details={"retryAfterSeconds": 9})),
                Refusal(429, b"", {"retry-after": "86400"}),
                Refusal(429, b"", {"retry-after": "Sat, 01 Jan 2028 00:00:00 GMT"}),
            ]
        )
        server.end_watches()
        await until(lambda: not server.refusals)
        assert [each for each in slept if each >= 1] == [7, 9, 60]


class TestNonsense:
    """An object that makes no sense leaves the others."""

    async def test_in_an_event(
        self, pods: ListWatch[Pod], server: ApiServer, heard: Heard, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                server.put("pods", {**pod("p1"), "status": {"podIP": 7}})
            server.put("pods", {**pod("p4"), "status": []})
            server.put("pods", pod("p3"))
            await until_names(pods, "p1", "p2", "p3")
            assert pods.objects["p1"].ip == "10.0.0.1"
            server.expire()
            await until(lambda: server.asked("list") == 2)
            server.put("pods", pod("p5"))
            await until_names(pods, "p1", "p2", "p3", "p5")
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 2, lines
        assert lines[0] == (
            "pods in namespace llm: 'p1' makes no sense and is left as it was:"
            " Expected `str | null`, got `int` - at `$.status.podIP`"
        )
        assert heard.reasons == []
        server.put("pods", pod("p1", ip="10.7.7.7"))
        await until(lambda: pods.objects["p1"].ip == "10.7.7.7")
        server.remove("pods", "p4")

    async def test_in_a_list(self, api: Api, server: ApiServer, heard: Heard) -> None:
        bad = {"metadata": {"name": "p2"}, "status": {"podIP": 7}}
        items = [pod("p1"), bad, {}, 7, None, {"metadata": {}}, pod("p3")]
        server.refusals.append(Refusal(200, {"metadata": {"resourceVersion": "100"}, "items": items}))
        watch = ListWatch(api, PODS, "llm", heard)
        await followed(watch, lambda: watch.listed)
        assert names(watch) == {"p1", "p3"}
        assert heard.reasons == []

    @pytest.mark.parametrize(
        "sent",
        [
            b"half a line\n",
            b'{"type":"ADDED"}\n',
            b'{"type":"DELETED","object":{}}\n',
            b'{"type":"BOOKMARK","object":7}\n',
            b'{"type":"ERROR","object":7}\n',
            b"\xff\xfe\n",
            b"[" * 100_000 + b"\n",
        ],
    )
    async def test_a_line_that_is_no_event(
        self, pods: ListWatch[Pod], server: ApiServer, heard: Heard, sent: bytes
    ) -> None:
        server.send(sent)
        await until(lambda: server.asked("list") == 2)
        assert "the API server's watch makes no sense" in heard.reasons[0]
        assert names(pods) == {"p1", "p2"}
        server.put("pods", pod("p3"))
        await until_names(pods, "p1", "p2", "p3")

    async def test_a_line_that_does_not_end(
        self, pods: ListWatch[Pod], server: ApiServer, heard: Heard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(api_module, "MAX_LINE_BYTES", 1 << 20)
        server.send(*[b"x" * (1 << 18)] * 8)
        await until(lambda: heard.reasons)
        assert "a line of more than 1048576 bytes" in heard.reasons[0]

    async def test_an_answer_that_is_compressed(
        self, pods: ListWatch[Pod], server: ApiServer, heard: Heard
    ) -> None:
        server.refusals.extend([Refusal(200, b"x", {"content-encoding": "gzip"})] * 2)
        server.expire()
        await until(lambda: heard.reasons)
        assert names(pods) == {"p1", "p2"}
