"""Connections that are used again, and those that are not."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.support.exchanges import ANSWER, OK, one, post, waits
from tests.support.raw_server import Peer, RawServer, raw_server
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.instance_http import pool as pool_module
from vllm_pd_scheduler.instance_http.connection import _idle_time
from vllm_pd_scheduler.instance_http.errors import ConnectionLost, RequestFailed
from vllm_pd_scheduler.instance_http.exchange import Answer
from vllm_pd_scheduler.instance_http.pool import IDLE_S, MAX_IDLE, ConnectionPool

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")


def _named(name: str) -> bytes:
    """An answer like vLLM's, which repeats what the request is called."""
    body = b'{"id":"%s"}' % name.encode()
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


class TestReuse:
    async def test_the_one_used_last_is_used_first(self, pool: ConnectionPool, server: RawServer) -> None:
        sent = [post(pool, server.to) for _ in range(3)]
        peers = [await server.accept() for _ in range(3)]
        for number, peer in enumerate(peers, 1):
            await peer.request()
            await peer.say(ANSWER)
            await until(lambda number=number: sum(each.done() for each in sent) == number)
        again = post(pool, server.to, b"again")
        assert (await peers[2].request()).endswith(b"again")
        both = post(pool, server.to, b"both")
        assert (await peers[1].request()).endswith(b"both")
        for peer in (peers[2], peers[1]):
            await peer.say(ANSWER)
        await asyncio.gather(again, both)

    async def test_destinations_have_their_own(self, pool: ConnectionPool, server: RawServer) -> None:
        await one(pool, server)
        async with raw_server() as other:
            await one(pool, other)
        assert len(server.peers) == 1

    @pytest.mark.parametrize(
        "answer",
        [
            OK % b"connection: close\r\n",
            b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
            ANSWER + b"more",
            ANSWER + ANSWER,
            OK % b"keep-alive: timeout=0\r\n",
        ],
        ids=["close", "HTTP/1.0", "more", "two answers", "no time"],
    )
    async def test_not_after_such_an_answer(
        self, pool: ConnectionPool, server: RawServer, answer: bytes
    ) -> None:
        peer = await one(pool, server, answer)
        await one(pool, server)
        assert await peer.ended()

    async def test_not_when_more_comes_later(self, pool: ConnectionPool, server: RawServer) -> None:
        peer = await one(pool, server)
        await peer.say(ANSWER)
        assert await peer.ended()
        await one(pool, server)

    async def test_not_when_more_has_come_that_the_loop_has_not_read(
        self, pool: ConnectionPool, server: RawServer
    ) -> None:
        """It would be taken for the answer to the next request."""
        peer = await one(pool, server)
        peer.connection.send(ANSWER.replace(b"ok", b"no"))
        sent = post(pool, server.to)
        other = await server.accept()
        await other.request()
        await other.say(ANSWER)
        assert (await sent).body == b"ok"
        assert await peer.ended()

    async def test_not_when_the_answer_came_before_the_request_had_gone_out(
        self, pool: ConnectionPool, server: RawServer
    ) -> None:
        sent = post(pool, server.to, b"x" * (64 << 20))
        peer = await server.accept()
        await until(lambda: waits(peer))
        await peer.say(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        assert (await sent).status == 413
        await one(pool, server)

    async def test_not_for_longer_than_the_instance_keeps_it(
        self, pool: ConnectionPool, server: RawServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool.idle_s = 0.0
        monkeypatch.setattr(pool_module, "_SWEEP_S", 3600.0)
        peer = await one(pool, server)
        await one(pool, server)
        assert await peer.ended()

    async def test_what_is_idle_for_too_long_is_closed(
        self, pool: ConnectionPool, server: RawServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool.idle_s = 0.05
        monkeypatch.setattr(pool_module, "_SWEEP_S", 0.01)
        peer = await one(pool, server)
        assert await peer.ended()
        await until(lambda: not pool._idle and not pool._open)
        await until(lambda: pool._sweeping is None)

    @pytest.mark.parametrize(
        ("said", "seconds"),
        [
            (b"", 4.0),
            (b"timeout=5", 4.0),
            (b"timeout=5, max=100", 4.0),
            (b"max=100, timeout=10", 8.0),
            (b"TIMEOUT=1", 0.8),
            (b"timeout=600", 60.0),
            (b"timeout=-1", 4.0),
            (b"timeout=x", 4.0),
            (b"notimeout=1", 4.0),
        ],
        ids=repr,
    )
    def test_how_long_that_is(self, said: bytes, seconds: float) -> None:
        assert _idle_time(Answer(200, {b"keep-alive": said}, b""), IDLE_S) == pytest.approx(seconds)

    async def test_no_more_are_kept_than_so_many(
        self, pool: ConnectionPool, server: RawServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pool_module, "MAX_IDLE", 2)
        assert MAX_IDLE > 2
        sent = [post(pool, server.to) for _ in range(4)]
        peers = [await server.accept() for _ in range(4)]
        for peer in peers:
            await peer.request()
            await peer.say(ANSWER)
        await asyncio.gather(*sent)
        await until(lambda: len(pool._open) == 2)
        assert len(pool._idle[server.to]) == 2

    async def test_one_that_gives_the_answer_before_once_more(
        self, pool: ConnectionPool, server: RawServer
    ) -> None:
        """A hand-off of another prompt would be a wrong text."""
        first, second = "a" * 36, "b" * 36
        sent = post(pool, server.to, name=first.encode())
        peer = await server.accept()
        await peer.request()
        await peer.say(_named(first))
        await sent
        sent = post(pool, server.to, name=second.encode())
        await peer.request()
        await peer.say(_named(first))
        with pytest.raises(ConnectionLost, match="twice"):
            await sent
        assert await peer.ended()

    @pytest.mark.parametrize(
        ("first", "second", "answered"),
        [
            ("a" * 36, "b" * 36, "b" * 36),
            ("a" * 36, "a" * 36, "a" * 36),
            ("a" * 36, "b" * 36, "c" * 36),  # it has names of its own
            ("a" * 36, "b" * 36 + "a" * 36, "b" * 36 + "a" * 36),
            ("", "b" * 36, "c"),
            ("a" * 36, "", "a" * 36),
        ],
    )
    async def test_others_are_taken(
        self, pool: ConnectionPool, server: RawServer, first: str, second: str, answered: str
    ) -> None:
        sent = post(pool, server.to, name=first.encode())
        peer = await server.accept()
        await peer.request()
        await peer.say(_named(first))
        await sent
        sent = post(pool, server.to, name=second.encode())
        await peer.request()
        await peer.say(_named(answered))
        assert answered.encode() in (await sent).body

    async def test_no_connection_has_two_requests_at_once(
        self, pool: ConnectionPool, server: RawServer
    ) -> None:
        """Whatever becomes of requests, whoever gets an answer gets its own."""
        chance = random.Random(7)

        async def play(peer: Peer) -> None:
            try:
                while True:
                    _, _, body = (await peer.request()).partition(b"\r\n\r\n")
                    assert not peer._unread, "a second request before the answer to the first"
                    await asyncio.sleep(chance.random() * 0.003)
                    length = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n" % len(body)
                    match chance.randrange(8):
                        case 0:
                            await peer.say(length + b"connection: close\r\n\r\n" + body)
                        case 1:
                            await peer.say(length + b"\r\n" + body[:1])
                            return
                        case 2:
                            return
                        case 3:
                            await peer.say(length + b"\r\n" + body)
                            return
                        case 4:
                            await peer.say(length + b"\r\n" + body + b"more")
                        case _:
                            await peer.say(length + b"\r\n")
                            await peer.say(body)
            except (AssertionError, OSError) as error:
                if "second" in str(error):
                    raise
            finally:
                peer.close()

        async def serve() -> None:
            async with asyncio.TaskGroup() as group:
                while True:
                    group.create_task(play(await server.accept()))

        outcomes: list[str] = []

        async def ask(number: int) -> None:
            for turn in range(30):
                body = f"{number} {turn}".encode()
                sent = post(pool, server.to, body)
                if chance.randrange(10) == 0:
                    await asyncio.sleep(chance.random() * 0.003)
                    sent.cancel()
                try:
                    assert (await sent).body == body
                    outcomes.append("answered")
                except (RequestFailed, asyncio.CancelledError) as error:
                    outcomes.append(type(error).__name__)

        serving = asyncio.ensure_future(serve())
        async with asyncio.timeout(HUNG_S):
            await asyncio.gather(*(ask(number) for number in range(12)))
        assert len(outcomes) == 360
        assert outcomes.count("answered") > 150
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
