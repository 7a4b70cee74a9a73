"""A list and a watch, and how they end: what is known in the end is what there is."""

from __future__ import annotations

import asyncio

import pytest

from tests.discovery.kubernetes.watching import Heard, followed, names, until_names
from tests.support.kubernetes import CUT, END, ApiServer, Refusal
from tests.support.kubernetes_answers import line, status_of
from tests.support.kubernetes_objects import pod
from tests.support.waiting import until
from vllm_pd_scheduler.discovery.kubernetes import api as api_module
from vllm_pd_scheduler.discovery.kubernetes import watch as module
from vllm_pd_scheduler.discovery.kubernetes.api import Api
from vllm_pd_scheduler.discovery.kubernetes.objects import Pod
from vllm_pd_scheduler.discovery.kubernetes.pods import PODS
from vllm_pd_scheduler.discovery.kubernetes.watch import ListWatch


class TestWhatHappens:
    async def test_events(self, pods: ListWatch[Pod], server: ApiServer, heard: Heard) -> None:
        assert names(pods) == {"p1", "p2"}
        server.put("pods", pod("p3"))
        await until_names(pods, "p1", "p2", "p3")
        server.put("pods", pod("p1", ip="10.9.9.9"))
        await until(lambda: pods.objects["p1"].ip == "10.9.9.9")
        server.remove("pods", "p2")
        await until_names(pods, "p1", "p3")
        assert server.asked("list") == 1
        assert heard.reasons == []

    async def test_labels_that_change(self, pods: ListWatch[Pod], server: ApiServer) -> None:
        server.put("pods", pod("p1", app="other"))
        await until_names(pods, "p2")
        server.put("pods", pod("other"))
        await until_names(pods, "p2", "other")

    async def test_pages(self, api: Api, server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "PAGE", 3)
        for number in range(10):
            server.put("pods", pod(f"p{number}"))
        watch = ListWatch(api, PODS, "llm", Heard())
        await followed(watch, lambda: watch.listed)
        assert len(watch.objects) == 10
        assert server.asked("list") == 4

    async def test_an_event_of_more_than_64_kib(self, pods: ListWatch[Pod], server: ApiServer) -> None:
        server.put("pods", pod("p1", ip="10.9.9.9", annotations={"long": "x" * 900_000}))
        server.put("pods", pod("p3"))
        await until_names(pods, "p1", "p2", "p3")
        assert pods.objects["p1"].ip == "10.9.9.9"

    async def test_events_of_other_kinds_and_empty_lines(
        self, pods: ListWatch[Pod], server: ApiServer, heard: Heard
    ) -> None:
        server.send(b'\n{"type":"NEWS","object":{}}\n')
        server.put("pods", pod("p3"))
        await until_names(pods, "p1", "p2", "p3")
        assert heard.reasons == []

    async def test_a_pod_of_an_earlier_name(self, pods: ListWatch[Pod], server: ApiServer) -> None:
        before = pods.objects["p1"].metadata.uid
        server.remove("pods", "p1")
        server.put("pods", pod("p1"))
        await until(lambda: "p1" in pods.objects and pods.objects["p1"].metadata.uid != before)


class TestTheEndOfAWatch:
    """It goes on where it was; what happened meanwhile is not missed."""

    @pytest.mark.parametrize("how", [END, CUT])
    async def test_in_good_order_or_not(
        self, pods: ListWatch[Pod], server: ApiServer, heard: Heard, how: object
    ) -> None:
        await until(lambda: heard.lives)  # it has run for a while
        for number in range(3, 6):
            server.send(how)
            server.put("pods", pod(f"p{number}"))
            server.remove("pods", f"p{number - 2}")
            await until_names(pods, f"p{number - 1}", f"p{number}")
            lives = heard.lives
            await until(lambda: heard.lives > lives)  # noqa: B023
        assert server.asked("list") == 1
        assert heard.reasons == []

    async def test_by_the_time_limit_with_a_bookmark(
        self, api: Api, server: ApiServer, heard: Heard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "WATCH_S", (1, 1))
        watch = ListWatch(api, PODS, "llm", heard)
        server.put("endpointslices", {"metadata": {"name": "s"}})  # a version that no event of pods has
        await followed(watch, lambda: server.asked("watch") == 3)
        versions = [each[2]["resourceVersion"] for each in server.requests if each[0] == "watch"]
        assert versions == ["101"] * 3
        assert server.asked("list") == 1

    async def test_in_half_a_line(self, pods: ListWatch[Pod], server: ApiServer, heard: Heard) -> None:
        await until(lambda: heard.lives)
        half = line({"type": "DELETED", "object": pod("p1")})[:-20]
        server.send(half, END)
        await until(lambda: server.asked("watch") == 2)
        assert names(pods) == {"p1", "p2"}
        assert heard.reasons == []

    async def test_at_once_each_time(self, api: Api, server: ApiServer, heard: Heard) -> None:
        """No hot loop: what has 200 for an answer and nothing more is a fault too."""

        async def end() -> None:
            while True:
                server.end_watches()
                await asyncio.sleep(0)

        ending = asyncio.ensure_future(end())
        watch = ListWatch(api, PODS, "llm", heard)
        await followed(watch, lambda: heard.reasons)
        assert heard.reasons == ["pods in namespace llm: the watch ends at once"]
        ending.cancel()


class TestExpired:
    async def test_as_an_event(self, pods: ListWatch[Pod], server: ApiServer, heard: Heard) -> None:
        await until(lambda: heard.lives)
        server.end_watches()
        server.remove("pods", "p1")
        server.put("pods", pod("p3"))
        server.compact()
        await until_names(pods, "p2", "p3")
        assert heard.reasons == []

    async def test_as_a_status(self, pods: ListWatch[Pod], server: ApiServer, heard: Heard) -> None:
        await until(lambda: heard.lives)
        server.refusals.append(Refusal(410, status_of(410, "Gone", "gone")))
        server.remove("pods", "p1")
        server.end_watches()
        await until_names(pods, "p2")
        await until(lambda: server.asked("list") == 2)
        assert heard.reasons == []

    async def test_between_two_pages(
        self, api: Api, server: ApiServer, heard: Heard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "PAGE", 1)
        server.put("pods", pod("p1"))
        server.put("pods", pod("p2"))
        get, pages = api.get, 0

        async def compacting(path: str, parameters: dict[str, str]) -> bytes:
            nonlocal pages
            pages += 1
            if pages == 2:
                server.compact()
            return await get(path, parameters)

        monkeypatch.setattr(api, "get", compacting)
        watch = ListWatch(api, PODS, "llm", heard)
        await followed(watch, lambda: watch.listed)
        assert names(watch) == {"p1", "p2"}
        assert heard.reasons == []

    async def test_again_and_again(self, pods: ListWatch[Pod], server: ApiServer, heard: Heard) -> None:
        server.compacted = 10**9
        server.end_watches()
        await until(lambda: heard.reasons)
        assert "410 Expired: too old resource version" in heard.reasons[0]
        assert names(pods) == {"p1", "p2"}
        server.compacted = 0
        server.put("pods", pod("p3"))
        await until_names(pods, "p1", "p2", "p3")


class TestSilence:
    async def test_a_watch_that_tells_nothing_is_begun_anew(
        self, pods: ListWatch[Pod], server: ApiServer, heard: Heard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(api_module, "SILENCE_S", 0.2)
        server.end_watches()
        server.mute = True
        await until(lambda: server.asked("watch") >= 2)
        server.put("pods", pod("p3"))
        await until_names(pods, "p1", "p2", "p3")
        assert server.asked("list") > 1
        assert heard.reasons == []

    async def test_bookmarks_are_life(
        self, pods: ListWatch[Pod], server: ApiServer, heard: Heard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(api_module, "SILENCE_S", 2.0)
        server.bookmark_s = 0.1
        server.end_watches()
        await until(lambda: heard.lives > 25)
        assert server.asked("list") == 1

    async def test_an_answer_that_does_not_come(
        self, pods: ListWatch[Pod], server: ApiServer, heard: Heard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def never(*_: object) -> bytes:
            raise TimeoutError

        monkeypatch.setattr(api_module, "read_at_most", never)
        server.expire()
        await until(lambda: heard.reasons == ["pods in namespace llm: the API server does not answer"])
        assert names(pods) == {"p1", "p2"}


async def test_a_server_that_is_away(pods: ListWatch[Pod], server: ApiServer, heard: Heard) -> None:
    await until(lambda: heard.lives)
    for away in range(1, 3):
        await server.down()
        await until(lambda: len(heard.reasons) == away)  # noqa: B023
        assert "the API server cannot be asked: Cannot connect to host" in heard.reasons[-1]
        server.remove("pods", f"p{away}")
        server.put("pods", pod(f"p{away + 2}"))
        await server.up()
        await until_names(pods, f"p{away + 1}", f"p{away + 2}")
        lives = heard.lives
        await until(lambda: heard.lives > lives)  # noqa: B023


class TestOptional:
    async def test_a_kind_that_is_not_there(
        self, api: Api, server: ApiServer, heard: Heard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "ABSENT_S", 0.05)
        server.kinds.clear()
        watch = ListWatch(api, PODS, "llm", heard, optional=True)
        following = asyncio.ensure_future(watch.follow())
        await until(lambda: server.asked("list") > 2)
        assert heard.reasons == []
        assert heard.changes
        server.kinds.add(("v1", "pods"))
        server.put("pods", pod("p1"))
        await until_names(watch, "p1")
        server.kinds.clear()  # as while an API server starts
        server.expire()
        await until(lambda: heard.reasons)
        assert names(watch) == {"p1"}
        following.cancel()
