"""A list and a watch, and all that can go wrong with them: what is known in the end is what there is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.kubernetes import CUT, END, ApiServer, Refusal, line, pod, status_of, too_large
from tests.support.waiting import until
from vllm_pd_scheduler.discovery.kubernetes import api as api_module
from vllm_pd_scheduler.discovery.kubernetes import watch as module
from vllm_pd_scheduler.discovery.kubernetes.api import Api
from vllm_pd_scheduler.discovery.kubernetes.credentials import Credentials
from vllm_pd_scheduler.discovery.kubernetes.objects import Pod
from vllm_pd_scheduler.discovery.kubernetes.pods import PODS
from vllm_pd_scheduler.discovery.kubernetes.watch import ListWatch


class Heard:
    """Who listens to a watch."""

    def __init__(self) -> None:
        self.changes = 0
        self.lives = 0
        self.reasons: list[str] = []

    def changed(self) -> None:
        self.changes += 1

    def alive(self) -> None:
        self.lives += 1

    def lost(self, reason: str) -> None:
        self.reasons.append(reason)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest_asyncio.fixture
async def pods(api: Api, server: ApiServer, heard: Heard) -> AsyncIterator[ListWatch[Pod]]:
    """A watch that has begun, of a server with two pods that it is about, and one that it is not."""
    server.put("pods", pod("p1"))
    server.put("pods", pod("p2"))
    server.put("pods", pod("other", app="other"))
    watch = ListWatch(api, PODS, "llm", heard, labels="app=vllm")
    following = asyncio.ensure_future(watch.follow())
    await until(lambda: server.watches)
    yield watch
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


def names(watch: ListWatch[Pod]) -> set[str]:
    return set(watch.objects)


async def until_names(watch: ListWatch[Pod], *expected: str) -> None:
    await until(lambda: names(watch) == set(expected))


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


async def followed(watch: ListWatch[Pod], condition: Callable[[], object | Awaitable[object]]) -> None:
    """Follow until something is so."""
    following = asyncio.ensure_future(watch.follow())
    try:
        await until(condition)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 5), st.integers(1, 9), st.booleans()),
        st.tuples(st.just("remove"), st.integers(0, 5)),
        st.sampled_from(
            [("end",), ("cut",), ("half",), ("compact",), ("gone",), ("refuse",), ("mute",), ("let",)]
        ),
    ),
    max_size=25,
)


def take(server: ApiServer, step: tuple[object, ...]) -> None:
    match step:
        case ("put", number, ip, ours):
            server.put("pods", pod(f"p{number}", ip=f"10.0.0.{ip}", app="vllm" if ours else "other"))
        case ("remove", number) if f"p{number}" in server.names("pods"):
            server.remove("pods", f"p{number}")
        case ("end",):
            server.end_watches()
        case ("cut",):
            server.cut_watches()
        case ("half",):
            server.send(b'{"type":"DELETED","object":{"meta', CUT)
        case ("compact",):
            server.compact()
            server.end_watches()
        case ("gone",):
            server.expire()
        case ("refuse",):
            server.refusals.append(Refusal(503, b"", {"retry-after": "0"}))
        case ("mute",):
            server.mute = True


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_whatever_happens_what_is_known_is_what_there_is(
    steps: list[tuple[object, ...]], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "SILENCE_S", 0.1)
    monkeypatch.setattr(module, "PAGE", 2)
    asyncio.run(live_through(steps, tmp_path_factory))


async def live_through(steps: list[tuple[object, ...]], tmp_path_factory: pytest.TempPathFactory) -> None:
    async with ApiServer() as server:
        path = server.kubeconfig(tmp_path_factory.mktemp("kubeconfig") / "config")
        async with Api(Credentials(path)) as api:
            watch = ListWatch(api, PODS, "llm", Heard(), labels="app=vllm")
            following = asyncio.ensure_future(watch.follow())
            for step in steps:
                take(server, step)
                if step == ("let",):
                    await asyncio.sleep(0.01)
            server.mute = False

            def same() -> bool:
                found = {name: each.ip for name, each in watch.objects.items()}
                all_pods = [server.get("pods", name) for name in server.names("pods")]
                there = {
                    each["metadata"]["name"]: each["status"]["podIP"]
                    for each in all_pods
                    if each["metadata"]["labels"]["app"] == "vllm"
                }
                return watch.listed and found == there

            await until(same)
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
