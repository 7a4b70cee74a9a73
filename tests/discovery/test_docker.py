"""A Docker engine as a source, by its API on a socket: what is made of it, and of its faults."""

import asyncio
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from docker.context import ContextAPI

from tests.support.certificates import make_certificates
from tests.support.docker_api import DockerApi, container, docker_api
from tests.support.followed import Followed
from tests.support.waiting import until
from vllm_pd_scheduler.config import ConfigError, TlsConfig, parse_config
from vllm_pd_scheduler.discovery.docker import engine, source

Follow = Callable[..., Any]


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pd-") as made:  # a socket's path must be short
        yield Path(made)


@pytest_asyncio.fixture
async def api(directory: Path) -> AsyncIterator[DockerApi]:
    async with docker_api(directory / "sock") as running:
        yield running


@pytest_asyncio.fixture
async def follow(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Follow]:
    monkeypatch.setattr(engine, "CALL_S", 0.5)
    for name, seconds in {"SETTLE_S": 0.01, "SOONEST_S": 0.02, "LOOK_S": 0.1}.items():
        monkeypatch.setattr(source, name, seconds)
    started: list[Followed] = []

    async def start(more: dict[str, Any] | None = None, **settings: Any) -> Followed:
        entry = {"type": "docker", "host": f"unix://{directory}/sock", **settings}
        started.append(Followed(entry, **(more or {})))
        return await started[-1].start()

    yield start
    for each in started:
        await each.sources.stop()


class TestContainers:
    async def test_ranks_where_a_sidecar_cannot_be_told_one(self, api: DockerApi, follow: Follow) -> None:
        api.containers = [container("d0"), container("d1", data_parallel_size="2")]
        fleet = await follow({"prefill_leg": "sidecar"})
        await fleet.until("d0")
        assert "a sidecar cannot be told a rank" in fleet.left_out[0]

    async def test_labels_are_read(self, api: DockerApi, follow: Follow) -> None:
        api.containers = [
            container("vllm-p", "prefill", port="8100", networks={"llm": "172.20.0.3"}),
            container("vllm-d", "decode", model="chat, chat-lora ,", revision="v2", data_parallel_size="4"),
            container("db", None),
        ]
        fleet = await follow()
        await fleet.until("vllm-p", "vllm-d")
        p, d = fleet["vllm-p"], fleet["vllm-d"]
        assert (p.role, p.host, p.port, p.models, p.revision) == ("prefill", "172.20.0.3", 8100, None, None)
        assert (d.role, d.host, d.port) == ("decode", "172.20.0.2", 8000)
        assert (d.models, d.revision) == ({"chat", "chat-lora"}, "v2")
        assert (p.data_parallel_size, d.data_parallel_size) == (1, 4)
        assert fleet.router.membership.sources("vllm-d") == (f"docker:{api.url}",)

    @pytest.mark.parametrize(
        ("odd", "why"),
        [
            (container("odd", "both"), "label vllm-pd.role must be prefill, decode or encode, not 'both'"),
            (container("odd", ""), "label vllm-pd.role must be prefill, decode or encode, not ''"),
            (container("odd", port="http"), "label vllm-pd.port must be a port, not 'http'"),
            (container("odd", port="0"), "label vllm-pd.port must be a port, not '0'"),
            (container("odd", port="٣"), "label vllm-pd.port must be a port"),
            (container("odd", port="9" * 5000), "label vllm-pd.port must be a port"),
            (container("odd", model=" ,"), "label vllm-pd.model names no model"),
            (container("odd", data_parallel_size="0"), "label vllm-pd.data-parallel-size must be a number"),
            (container("odd", data_parallel_size="65"), "must be a number up to 64, not '65'"),
            (container("odd", revision=""), "label vllm-pd.revision is empty"),
            (container("odd", revision="v" * 129), "revision: "),
            (container("odd", networks={}), "it has no address in any network"),
            (container("odd", networks={"a": "10.0.0.1", "b": "10.0.1.1"}), "it has an address in 'a', 'b'"),
            (container("odd", networks={"a": ""}), "it has no address in any network"),
            (container("odd", networks={"a": "0.0.0.0"}), "host: "),
            (container("odd", mode="container:abc", networks={}), "it has the network of another container"),
            (container("n" * 200), "id: must be 1 to 128 letters"),
            ({"Id": 7}, "an entry of the engine's list makes no sense"),
            ({"Id": "x", "Labels": {"vllm-pd.role": "decode"}, "NetworkSettings": {}}, "it has no address"),
            ({"Id": "x", "Labels": None}, "label vllm-pd.role must be"),
            ("x", "an entry of the engine's list makes no sense"),
        ],
    )
    async def test_one_that_makes_no_sense_is_told_once_and_the_others_stay(
        self, api: DockerApi, follow: Follow, odd: Any, why: str
    ) -> None:
        good = container("good", networks={"llm": "172.20.0.9"})
        api.containers = [odd, good]
        fleet = await follow()
        await fleet.until("good")
        await fleet.until_event(why)
        assert " is left out: " in fleet.left_out[0]
        calls = len(api.calls)
        await until(lambda: len(api.calls) > calls + 3)
        await fleet.until_event(why)
        api.set(good)
        await until(lambda: not fleet.left_out)

    async def test_one_of_several_networks(self, api: DockerApi, follow: Follow) -> None:
        both = {"front": "10.0.0.1", "llm": "10.1.0.1"}
        api.containers = [
            container("a", networks=both),
            container("b", networks={"front": "10.0.0.2"}),
            container("c", networks={"llm": "10.1.0.3"}),
        ]
        fleet = await follow(network="llm")
        await fleet.until("a", "c")
        assert fleet["a"].host == "10.1.0.1"
        await fleet.until_event("container b is left out: it has no address in network 'llm', but in 'front'")

    async def test_an_ipv6_network(self, api: DockerApi, follow: Follow) -> None:
        found = container("a", networks={"llm": ""})
        found["NetworkSettings"]["Networks"]["llm"]["GlobalIPv6Address"] = "2001:db8::2"
        api.containers = [found]
        fleet = await follow()
        await fleet.until("a")
        assert fleet["a"].host == "2001:db8::2"

    async def test_the_network_of_the_host(self, api: DockerApi, follow: Follow) -> None:
        api.containers = [container("a", mode="host", networks={"host": ""}, port="8100")]
        fleet = await follow(network="llm")
        await fleet.until("a")
        assert (fleet["a"].host, fleet["a"].port) == ("127.0.0.1", 8100)
        other = await follow(address="gpu1.example", name="gpu1")
        await other.until("gpu1.a")
        assert other["gpu1.a"].host == "gpu1.example"

    async def test_published_ports(self, api: DockerApi, follow: Follow) -> None:
        def port(**keys: Any) -> dict[str, Any]:
            return {"IP": "0.0.0.0", "PrivatePort": 8000, "PublicPort": 18000, "Type": "tcp", **keys}

        api.containers = [
            container("a", ports=[port(IP="::"), port()]),
            container("b", ports=[port(IP="192.168.1.4", PublicPort=18001), port(PrivatePort=8001)]),
            container("c", ports=[port(Type="udp"), {"PrivatePort": 8000, "Type": "tcp"}]),
        ]
        fleet = await follow(published=True, address="192.168.1.5")
        await fleet.until("a", "b")
        assert (fleet["a"].host, fleet["a"].port) == ("192.168.1.5", 18000)
        assert (fleet["b"].host, fleet["b"].port) == ("192.168.1.4", 18001)
        await fleet.until_event("container c is left out: its port 8000 is not published")

    async def test_keys_and_names_of_certificates(
        self, api: DockerApi, follow: Follow, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FLEET_KEY", "sesame")
        api.containers = [container("a")]
        fleet = await follow({"instance_tls": {}}, api_key={"env": "FLEET_KEY"}, server_name="vllm.example")
        await fleet.until("a")
        assert (fleet["a"].api_key, fleet["a"].tls_name) == ("sesame", "vllm.example")
        monkeypatch.delenv("FLEET_KEY")
        api.set(container("b"))
        await fleet.until_event(
            "environment variable FLEET_KEY is not set; the instances that were known stay"
        )
        assert fleet.ids == {"a"}


class TestChanges:
    async def test_containers_come_and_go(self, api: DockerApi, follow: Follow) -> None:
        fleet = await follow()
        await fleet.sources.first_words()
        a, b = container("a", networks={"llm": "10.0.0.1"}), container("b", networks={"llm": "10.0.0.2"})
        for names in (("a", "b"), ("b",), (), ("a",)):
            api.set(*(each for each in (a, b) if each["Names"][1][1:] in names))
            await fleet.until(*names)
        assert not any("well again" in text for text in fleet.events)

    async def test_one_that_is_asked_to_stop_drains_before_it_is_gone(
        self, api: DockerApi, follow: Follow, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(source, "LOOK_S", 60)
        api.containers = [container("a")]
        fleet = await follow()
        await fleet.until("a")
        monkeypatch.setattr(source, "SETTLE_S", 60)  # so that no list has told it
        lists = api.calls.count("/containers/json")
        api.tell("kill", "a", signal="15")
        await fleet.until()
        assert api.calls.count("/containers/json") == lists

    async def test_who_has_stopped_before_the_first_list_does_not_make_it_empty(
        self, api: DockerApi, follow: Follow, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(source, "SETTLE_S", 0.2)
        api.containers = [container("a"), container("b", networks={"llm": "10.0.0.2"})]
        api.past = [api.event("kill", "gone", signal="15"), api.event("kill", "b", signal="15")]
        fleet = await follow()
        changes: list[set[str]] = []
        fleet.router.registry.changes.subscribe(lambda: changes.append(fleet.ids))
        for _ in range(2):
            await fleet.sources.first_words()
            await fleet.until("a")
            await fleet.sources.follow()  # as a reload does
        assert set() not in changes

    async def test_one_that_runs_anew_serves_again(self, api: DockerApi, follow: Follow) -> None:
        api.containers = [container("a")]
        fleet = await follow()
        await fleet.until("a")
        await until(lambda: api.listeners)
        for signal in ("2", "3", "9", "15", "SIGTERM"):
            api.tell("kill", "a", signal=signal)
            await fleet.until()
            lists = api.calls.count("/containers/json")
            await until(lambda: api.calls.count("/containers/json") > lists + 1)  # noqa: B023
            assert fleet.ids == set()  # although it is listed: it runs until it has stopped
            api.tell("die", "a")
            api.containers = [container("a", networks={"llm": "172.20.0.7"})]
            api.tell("start", "a")
            await fleet.until("a")
        assert fleet["a"].host == "172.20.0.7"

    async def test_a_signal_stops_who_says_that_it_does(self, api: DockerApi, follow: Follow) -> None:
        api.containers = [container("a"), container("b", networks={"llm": "10.0.0.2"})]
        api.stop_signals = {"b": "SIGUSR1"}
        fleet = await follow()
        await fleet.until("a", "b")
        await until(lambda: api.listeners)
        for name in ("a", "b"):
            api.tell("kill", name, signal="1")
            api.tell("kill", name, signal="nonsense")
            api.tell("kill", name, signal="10")
        await fleet.until("a")

    @pytest.mark.parametrize("change", [{"state": "paused"}, {"health": "unhealthy"}, {"health": "starting"}])
    async def test_one_that_cannot_serve_drains(
        self, api: DockerApi, follow: Follow, change: dict[str, str]
    ) -> None:
        api.containers = [container("a")]
        fleet = await follow()
        await fleet.until("a")
        api.set(container("a", **change))  # type: ignore[arg-type]
        await fleet.until()
        api.set(container("a", health="healthy"))
        await fleet.until("a")

    async def test_a_network_that_is_left(self, api: DockerApi, follow: Follow) -> None:
        api.containers = [container("a")]
        fleet = await follow()
        await fleet.until("a")
        api.containers = [container("a", networks={})]
        api.tell("disconnect", "a", kind="network")
        await fleet.until()

    async def test_what_nobody_tells_of_is_seen_at_the_next_look(
        self, api: DockerApi, follow: Follow
    ) -> None:
        fleet = await follow()
        await fleet.sources.first_words()
        api.set(container("a"), quiet=True)
        await fleet.until("a")
        assert fleet.age() < 30


class TestFaults:
    @pytest.mark.parametrize(
        ("fault", "said"),
        [
            ("500", "it answers 500: out of order"),
            ("half", "its answer makes no sense"),
            ("nonsense", "its list of containers makes no sense"),
            ("hangs", "no answer within 0.5 s"),
        ],
    )
    async def test_what_was_known_stays_and_it_is_said_once(
        self, api: DockerApi, follow: Follow, fault: str, said: str
    ) -> None:
        api.containers = [container("a")]
        fleet = await follow()
        await fleet.until("a")
        api.fault = fault
        api.hang_up()
        await fleet.until_event(f"docker:{api.url}: {said}; the instances that were known stay")
        calls = len(api.calls)
        await until(lambda: len(api.calls) > calls + 2)
        await fleet.until_event("the instances that were known stay")
        assert fleet.ids == {"a"}
        api.fault = None
        api.containers = [container("b")]
        await fleet.until("b")
        await fleet.until_event("all is well again")

    async def test_no_engine_and_then_there_is_one(self, directory: Path, follow: Follow) -> None:
        fleet = await follow()
        await fleet.until_event("No such file or directory; the instances")
        assert fleet.router.membership.silent
        async with docker_api(directory / "sock") as api:
            api.containers = [container("a")]
            await fleet.until("a")
        await fleet.until_event("the instances that were known stay", 2)
        assert fleet.ids == {"a"}

    async def test_events_that_end_are_asked_for_again_from_the_last_one_on(
        self, api: DockerApi, follow: Follow
    ) -> None:
        api.containers = [container("a")]
        fleet = await follow()
        await fleet.until("a")
        await until(lambda: api.listeners)
        api.tell("pause", "x")
        await until(lambda: len(api.calls) > 4)
        api.hang_up()
        await until(lambda: len(api.since) == 2)
        assert api.since[1] == "1700000000.001000001"
        assert not any("stay" in text for text in fleet.events)
        await until(lambda: api.listeners)
        api.tell("kill", "a", signal="15")
        await fleet.until()

    @pytest.mark.parametrize("fault", ["403", "nonsense"])
    async def test_without_events_the_containers_are_listed_all_the_same(
        self, api: DockerApi, follow: Follow, fault: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        api.events_fault = fault
        fleet = await follow()
        with caplog.at_level(logging.WARNING):
            for name in ("a", "b"):
                api.set(container(name), quiet=True)
                await fleet.until(name)
            await until(lambda: api.calls.count("/events") > 3)
        assert caplog.text.count("its containers are listed every") == 1
        assert not any("stay" in text for text in fleet.events)

    async def test_following_ends_also_in_the_moment_of_an_event(
        self, api: DockerApi, follow: Follow, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A cancellation that comes together with an event is not lost: a reload would wait for ever."""
        monkeypatch.setattr(source, "LOOK_S", 60)
        told: list[asyncio.Event] = []

        class Seen(asyncio.Event):
            def __init__(self) -> None:
                super().__init__()
                told.append(self)

        fleet = await follow()
        await fleet.sources.stop()
        with monkeypatch.context() as patched:
            patched.setattr(source.asyncio, "Event", Seen)
            await fleet.sources.follow()
            await until(lambda: api.listeners)
            await fleet.sources.first_words()
            await asyncio.sleep(0.1)
        for each in told:
            each.set()
        await asyncio.sleep(0)  # now both are there at once
        async with asyncio.timeout(5):
            await fleet.sources.stop()

    async def test_following_ends_at_once_while_the_engine_hangs(
        self, api: DockerApi, follow: Follow
    ) -> None:
        api.fault = "hangs"
        fleet = await follow()
        await until(lambda: api.calls)
        async with asyncio.timeout(5):
            await fleet.sources.stop()
        api.fault = None
        fleet = await follow()
        await until(lambda: api.listeners)
        async with asyncio.timeout(5):
            await fleet.sources.stop()
        await until(lambda: not api.listeners)


class TestSettings:
    @pytest.mark.parametrize(
        ("entry", "said"),
        [
            ({"host": "gpu1:2375"}, "host: must be unix:///PATH or tcp://HOST:PORT"),
            ({"host": "ssh://gpu1"}, "host: must be unix:///PATH or tcp://HOST:PORT"),
            ({"host": "tcp://gpu1:2375/x"}, "host: must be unix:///PATH or tcp://HOST:PORT"),
            ({"host": "tcp://[::1"}, "host: must be unix:///PATH or tcp://HOST:PORT"),
            ({"host": "unix:///a", "context": "b"}, 'give either "host" or "context"'),
            ({"tls": {"ca": "a", "cert": "b", "key": "c"}}, '"tls" needs a "host"'),
            ({"published": True, "network": "llm"}, 'give either "network" or "published"'),
            ({"address": "http://a"}, "address: must be an IP address or a DNS name"),
            ({"name": "a b"}, "name: must be 1 to 128 letters"),
            ({"tls": {"ca": "a"}, "host": "tcp://a:1"}, "tls.cert: missing"),
        ],
    )
    def test_that_make_no_sense(self, entry: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_config({"discovery": [{"type": "docker", **entry}]})
        assert said in caught.value.problems[0]
        assert caught.value.problems[0].startswith("discovery[0]")

    def test_a_missing_sdk_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vllm_pd_scheduler.config.sources.find_spec", lambda _: None)
        with pytest.raises(ConfigError, match=r"the Docker SDK is not installed: .*pip install.*docker"):
            parse_config({"discovery": [{"type": "docker"}]})

    async def test_where_the_command_docker_would_look(
        self, api: DockerApi, follow: Follow, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        api.containers = [container("a")]
        monkeypatch.setenv("DOCKER_HOST", api.url)
        fleet = await follow(host=None)
        await fleet.until("a")
        assert fleet.router.membership.sources("a") == ("docker",)

    async def test_no_engine_there(
        self, follow: Follow, monkeypatch: pytest.MonkeyPatch, directory: Path
    ) -> None:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{directory}/none")
        fleet = await follow(host=None)
        await fleet.until_event(f"docker: unix://{directory}/none: No such file or directory; the instances")

    async def test_a_context(
        self, api: DockerApi, follow: Follow, monkeypatch: pytest.MonkeyPatch, directory: Path
    ) -> None:
        monkeypatch.setenv("DOCKER_CONFIG", str(directory))
        (directory / "config.json").write_text(
            "{}"
        )  # without it the SDK has its contexts in the directory here
        ContextAPI.create_context("gpu1", host=api.url)
        api.containers = [container("a")]
        fleet = await follow(host=None, context="gpu1")
        await fleet.until("a")
        missing = await follow(host=None, context="gpu2")
        await missing.until_event("docker:gpu2: there is no context 'gpu2'; the instances")

    async def test_tls(self, directory: Path, follow: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
        known = make_certificates(directory)
        server = TlsConfig(**known.server, client_ca=known.ca).context()
        async with docker_api(directory / "none", server) as api:
            api.containers = [container("a", mode="host")]
            ours, stranger = ({"ca": known.ca, **each} for each in (known.client, known.stranger))
            fleet = await follow(host=api.url, tls=ours)
            await fleet.until("a")
            assert fleet["a"].host == "localhost"
            refused = await follow(host=api.url, tls=stranger)
            await refused.until_event("the instances that were known stay")
            assert refused.ids == set()
            (directory / "own").mkdir()
            for name, path in {"ca": known.ca, **known.client}.items():
                shutil.copy(path, directory / "own" / f"{name}.pem")
            monkeypatch.setenv("DOCKER_HOST", api.url)
            monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
            monkeypatch.setenv("DOCKER_CERT_PATH", str(directory / "own"))
            from_environment = await follow(host=None)
            await from_environment.until("a")
            for each in (fleet, refused, from_environment):
                await each.sources.stop()
