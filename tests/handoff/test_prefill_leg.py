"""What P answers to a prefill: read up to a limit, and passed on only as far as it can be."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from msgspec.structs import replace

from tests.support.connectors import LEGS, PEER, attempt
from tests.support.given import give
from tests.support.raw_server import Peer, raw_server
from vllm_pd_scheduler.connectors import AscendLayerwiseConnector, Attempt
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.handoff import prefill_leg
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer, PrefillFailed
from vllm_pd_scheduler.handoff.prefill_leg import MAX_ANSWER_BYTES, HttpPrefill, largest_answer
from vllm_pd_scheduler.instance_http.pool import ConnectionPool
from vllm_pd_scheduler.models import InstanceRole, PDInstance

JSON = b"application/json"


class Instance:
    """A P that answers as it is told."""

    def __init__(self) -> None:
        self.answer = b""
        self.endless = b""
        self.port = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        writer.write(self.answer)
        try:
            while self.endless:
                writer.write(self.endless)
                await writer.drain()
        except OSError:
            pass
        writer.close()

    def says(
        self, body: bytes, content_type: bytes = JSON, status: bytes = b"200 OK", more: bytes = b""
    ) -> None:
        self.answer = b"HTTP/1.1 %s\r\ncontent-length: %d\r\ncontent-type: %s\r\n%s\r\n%s" % (
            status,
            len(body),
            content_type,
            more,
            body,
        )


@pytest_asyncio.fixture
async def instance() -> AsyncIterator[Instance]:
    made = Instance()
    server = await asyncio.start_server(made, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    server.close()


async def prefill(instance: Instance, body: bytes = b"{}", host: str = "127.0.0.1") -> PrefillAnswer:
    endpoint = Endpoint(PDInstance("p0", InstanceRole.PREFILL, host, instance.port))
    give(endpoint, address=f"127.0.0.1:{instance.port}")
    async with ConnectionPool() as pool:
        return await HttpPrefill(pool, None, 10.0)(endpoint, "/v1/completions", {}, body, attempt())


class TestSize:
    def test_it_is_in_proportion_to_the_request(self) -> None:
        assert largest_answer(b"") == 1 << 20
        assert largest_answer(b"x" * (1 << 20)) == 9 << 20
        assert largest_answer(b"x" * (64 << 20)) == MAX_ANSWER_BYTES == 16 << 20

    async def test_up_to_it_an_answer_is_whole(self, instance: Instance) -> None:
        instance.says(b"x" * largest_answer(b"{}"))
        assert len((await prefill(instance)).body) == largest_answer(b"{}")

    async def test_a_larger_one_is_a_failure(self, instance: Instance) -> None:
        instance.says(b"x" * (largest_answer(b"{}") + 1))
        with pytest.raises(PrefillFailed, match="unreadable"):
            await prefill(instance)

    async def test_one_without_end(self, instance: Instance) -> None:
        instance.answer, instance.endless = b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536
        with pytest.raises(PrefillFailed, match="unreadable"):
            await prefill(instance)

    async def test_one_that_is_compressed(self, instance: Instance) -> None:
        instance.says(b"x", more=b"content-encoding: gzip\r\n")
        with pytest.raises(PrefillFailed, match="unreadable"):
            await prefill(instance)


class TestContentType:
    @pytest.mark.parametrize(
        ("said", "kept"),
        [
            (b"application/json", "application/json"),
            (b"text/plain; charset=utf-8", "text/plain; charset=utf-8"),
            (b"", "application/json"),
            (b"text/\xff", "application/json"),
            (b"text/\xc3\xbc", "application/json"),
            (b"x" * 5000, "application/json"),
        ],
    )
    async def test_it_is_one_that_a_header_can_carry(
        self, instance: Instance, said: bytes, kept: str
    ) -> None:
        instance.says(b"{}", said, status=b"400 Bad Request")
        assert await prefill(instance) == PrefillAnswer(400, kept, b"{}")


class TestHeaders:
    """What a client needs with an error of P's."""

    ALLOWED = b"access-control-allow-origin: https://app.example\r\nvary: Origin\r\n"

    async def test_they_are_kept(self, instance: Instance) -> None:
        instance.says(
            b"{}", status=b"401 Unauthorized", more=self.ALLOWED + b"x-other: a\r\nset-cookie: a\r\n"
        )
        told = {"access-control-allow-origin": "https://app.example", "vary": "Origin"}
        assert (await prefill(instance)).headers == told

    @pytest.mark.parametrize("value", [b"", b"\xff", b"\xc3\xbc", b"x" * 5000], ids=repr)
    async def test_but_no_nonsense(self, instance: Instance, value: bytes) -> None:
        instance.says(b"{}", status=b"400 Bad Request", more=b"www-authenticate: %s\r\n" % value)
        assert (await prefill(instance)).headers == {}

    async def test_nor_those_of_an_answer_that_no_client_gets(self, instance: Instance) -> None:
        instance.says(b"{}", more=self.ALLOWED)
        assert (await prefill(instance)).headers == {}


async def test_without_a_listener_it_goes_to_the_address_that_is_known(instance: Instance) -> None:
    """Not to a name, which nobody may be able to resolve just now."""
    instance.says(b"{}")
    assert (await prefill(instance, host="no-such-name.invalid")).status == 200


class TestRequest:
    """What P gets of a client's headers."""

    async def sent(
        self, headers: dict[str, str], listener: bool = False, key: str | None = None
    ) -> list[bytes]:
        async with raw_server() as server, ConnectionPool() as pool:
            endpoint = Endpoint(PDInstance("p0", InstanceRole.PREFILL, "10.0.0.1", 1, key), server.to[0])
            url = f"http://{server.to[0]}" if listener else None
            prefill = asyncio.ensure_future(
                HttpPrefill(pool, url, 10.0)(endpoint, "/v1/completions", headers, b"{}", attempt())
            )
            peer = await server.accept()
            request = await peer.request()
            await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            assert (await prefill).body == b"{}"
        return request.removesuffix(b"\r\n\r\n{}").split(b"\r\n")[2:]

    async def test_only_those_that_mean_something_there(self) -> None:
        given = {
            ":path": "/v1/completions",
            "x-request-id": "1",
            "cookie": "a",
            "x-pd-id": "1",
            "origin": "o",
        }
        assert await self.sent(given) == [
            b"x-request-id: 1",
            b"origin: o",
            b"content-type: application/json",
            b"content-length: 2",
        ]

    @pytest.mark.parametrize("value", ["a\r\nx: b", "a\nb", "a\rb", "a\0b", "\u00fc", "a\x7f"], ids=repr)
    async def test_none_that_could_become_another(self, value: str) -> None:
        headers = await self.sent({"x-request-id": value, "content-type": value, "tracestate": "a\tb"})
        assert headers == [b"tracestate: a\tb", b"content-type: application/json", b"content-length: 2"]

    async def test_the_instances_own_key(self) -> None:
        assert b"authorization: Bearer k" in await self.sent({"authorization": "Bearer client"}, key="k")

    async def test_through_the_listener_a_header_names_the_instance(self) -> None:
        headers = await self.sent({}, listener=True)
        (named,) = [line for line in headers if line.startswith(b"x-gateway-destination-endpoint: ")]
        assert named.partition(b": ")[2].startswith(b"127.0.0.1:")
        assert not any(b"x-gateway" in line for line in await self.sent({}))


class TestLeaving:
    """A client that leaves: its prefill may go on for a moment, since only the answer says what to free."""

    @asynccontextmanager
    async def left(
        self, wanted: bool, of: Attempt | None = None
    ) -> AsyncIterator[tuple[Peer, HttpPrefill, list[PrefillAnswer]]]:
        unwanted: list[PrefillAnswer] = []
        async with raw_server() as server, ConnectionPool() as pool:
            endpoint = Endpoint(PDInstance("p0", InstanceRole.PREFILL, "10.0.0.1", 1), server.to[0])
            take = None if wanted else lambda _, answer, __: unwanted.append(answer)
            leg = HttpPrefill(pool, None, 10.0, take)
            prefill = asyncio.ensure_future(leg(endpoint, "/v1/completions", {}, b"{}", of or attempt()))
            peer = await server.accept()
            await peer.request()
            prefill.cancel()
            with pytest.raises(asyncio.CancelledError):
                await prefill
            yield peer, leg, unwanted

    async def test_an_answer_that_comes_soon_is_given_to_who_frees_it(self) -> None:
        async with self.left(wanted=False) as (peer, leg, unwanted):
            await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            await leg.close()
            assert [answer.body for answer in unwanted] == [b"{}"]

    async def test_after_that_p_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prefill_leg, "LINGER_S", 0.05)
        async with self.left(wanted=False) as (peer, leg, unwanted):
            assert await peer.ended()
            await leg.close()
            assert unwanted == []

    async def test_a_p_that_breaks_meanwhile(self) -> None:
        async with self.left(wanted=False) as (peer, leg, unwanted):
            peer.reset()
            await leg.close()
            assert unwanted == []

    async def test_a_p_that_writes_to_d_is_told_at_once(self) -> None:
        """D's blocks may be another prompt's soon."""
        to_d = attempt(AscendLayerwiseConnector(), replace(LEGS, decode=PEER))
        async with self.left(wanted=False, of=to_d) as (peer, leg, unwanted):
            assert await peer.ended()
            assert unwanted == []
            await leg.close()

    async def test_without_anybody_who_frees_it_p_is_told_at_once(self) -> None:
        async with self.left(wanted=True) as (peer, _, _):
            assert await peer.ended()


class TestHung:
    """An instance that hangs: what waits there was delivered, and is given up."""

    @pytest.mark.parametrize("listener", [False, True], ids=["straight", "listener"])
    async def test_what_waits_there_ends_and_nothing_else(self, listener: bool) -> None:
        async with raw_server() as server, ConnectionPool() as pool:
            leg = HttpPrefill(pool, f"http://{server.to[0]}" if listener else None, 3600.0)
            hung, other = (
                Endpoint(PDInstance(name, InstanceRole.PREFILL, "10.0.0.1", 1), server.to[0])
                for name in ("p0", "p1")
            )
            legs = [asyncio.ensure_future(leg(each, "/", {}, b"{}", attempt())) for each in (hung, other)]
            peers = [await server.accept() for _ in legs]
            for peer in peers:
                await peer.request()
            leg.give_up(hung)
            with pytest.raises(PrefillFailed, match="hung") as failed:
                await legs[0]
            assert failed.value.lost
            assert await peers[0].ended()
            await peers[1].say(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            assert (await legs[1]).body == b"{}"
            leg.give_up(other)  # nothing is left there


class TestAnswersTwice:
    """A P that gives the answer to the request before: its hand-off is of another prompt."""

    async def second(self, first: str, second: str, answered: str) -> PrefillAnswer:
        """Send two requests with these ids on one connection; return the answer to the second."""
        async with raw_server() as server, ConnectionPool() as pool:
            leg = HttpPrefill(pool, None, 10.0)
            p0 = Endpoint(PDInstance("p0", InstanceRole.PREFILL, "10.0.0.1", 1), server.to[0])
            peer = None
            for sent, told in ((first, first), (second, answered)):
                prefill = asyncio.ensure_future(leg(p0, "/", {"x-request-id": sent}, b"{}", attempt()))
                peer = peer or await server.accept()
                await peer.request()
                body = b'{"id":"chatcmpl-%s"}' % told.encode()
                await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
                answer = await prefill
            return answer

    async def test_it_is_not_taken(self) -> None:
        with pytest.raises(PrefillFailed, match="reset") as failed:
            await self.second("a" * 36, "b" * 36, "a" * 36)
        assert failed.value.lost

    @pytest.mark.parametrize(
        ("first", "second", "answered"),
        [
            ("a" * 36, "b" * 36, "b" * 36),
            ("a" * 36, "a" * 36, "a" * 36),
            ("a" * 36, "b" * 36, "an id of its own"),
            ("a" * 16, "a" * 16 + '"', "a" * 16 + '\\"'),
            ("a" * 16, "a" * 300, "a" * 300),
            ("1", "2", "1"),
        ],
        ids=["its own", "the same", "no echo", "escaped", "long", "short"],
    )
    async def test_no_client_can_make_others_look_so(self, first: str, second: str, answered: str) -> None:
        assert (await self.second(first, second, answered)).status == 200
