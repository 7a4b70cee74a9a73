"""Requests whose connection ends, or never was: which are sent once more, and what the others say."""

from __future__ import annotations

import asyncio
import errno
import os
import resource

import pytest

from tests.support.exchanges import ANSWER, CHUNKED, HALF, OK, one, post, waits
from tests.support.raw_server import RawServer, raw_server
from tests.support.waiting import until
from vllm_pd_scheduler.instance_http import pool as pool_module
from vllm_pd_scheduler.instance_http.errors import (
    AnswerRefused,
    ConnectionLost,
    NotConnected,
    NotHttp,
    RequestFailed,
    TimedOut,
)
from vllm_pd_scheduler.instance_http.exchange import Answer, Destination
from vllm_pd_scheduler.instance_http.pool import ConnectionPool

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")


class TestRepeat:
    """A connection that the instance closes while a request is on its way there."""

    async def test_one_that_met_an_idle_connection_being_closed_is_sent_once_more(
        self, pool: ConnectionPool, server: RawServer
    ) -> None:
        peer = await one(pool, server)
        peer.close()
        sent = post(pool, server.to, b"again")  # before the event loop could see the end
        other = await server.accept()
        assert (await other.request()).endswith(b"again")
        await other.say(ANSWER)
        assert (await sent).status == 200

    async def test_but_not_twice(self, pool: ConnectionPool, server: RawServer) -> None:
        peer = await one(pool, server)
        peer.close()
        sent = post(pool, server.to, b"again")
        other = await server.accept()
        await other.request()
        other.close()
        with pytest.raises(ConnectionLost, match="without an answer"):
            await sent
        assert len(server.peers) == 2

    @pytest.mark.parametrize("how", ["close", "reset"])
    @pytest.mark.parametrize("said", [b"", b"H", HALF])
    async def test_one_that_was_read_is_not_sent_again(
        self, pool: ConnectionPool, server: RawServer, how: str, said: bytes
    ) -> None:
        """Its prompt may have ended the engine."""
        peer = await one(pool, server)
        sent = post(pool, server.to, b"poison")
        await peer.request()
        await peer.say(said)
        getattr(peer, how)()
        with pytest.raises(ConnectionLost):
            await sent
        with pytest.raises(BlockingIOError):
            server._listener.accept()

    @pytest.mark.parametrize("how", ["close", "reset"])
    async def test_nor_one_that_arrived_and_was_not_read(
        self, pool: ConnectionPool, server: RawServer, how: str
    ) -> None:
        """That nobody has read it cannot be seen from here."""
        peer = await one(pool, server)
        sent = post(pool, server.to, b"poison")
        await until(lambda: waits(peer))
        getattr(peer, how)()
        with pytest.raises(ConnectionLost):
            await sent
        with pytest.raises(BlockingIOError):
            server._listener.accept()

    @pytest.mark.parametrize("read", [True, False])
    async def test_nor_one_on_a_new_connection(
        self, pool: ConnectionPool, server: RawServer, read: bool
    ) -> None:
        sent = post(pool, server.to)
        peer = await server.accept()
        await (peer.request() if read else until(lambda: waits(peer)))
        peer.close()
        with pytest.raises(ConnectionLost):
            await sent
        assert len(server.peers) == 1

    async def test_one_whose_caller_has_left_is_not(self, pool: ConnectionPool, server: RawServer) -> None:
        peer = await one(pool, server)
        peer.close()
        post(pool, server.to).cancel()
        await until(lambda: not pool._open)
        with pytest.raises(BlockingIOError):
            server._listener.accept()

    async def test_an_end_that_was_seen_is_no_matter(self, pool: ConnectionPool, server: RawServer) -> None:
        peer = await one(pool, server)
        peer.close()
        await until(lambda: not pool._open)
        await one(pool, server)


class TestFailure:
    @pytest.mark.parametrize(
        ("answer", "error", "words"),
        [
            (b"", ConnectionLost, "it closed the connection without an answer"),
            (b"HTTP", ConnectionLost, "it closed the connection in its answer"),
            (HALF, ConnectionLost, "it closed the connection in its answer"),
            (b"\x16\x03\x01\x02", NotHttp, "its answer is not HTTP/1.1: "),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 101\r\n\r\n", AnswerRefused, "it has more than 100 bytes"),
        ],
        ids=["nothing", "little", "half", "TLS", "too much"],
    )
    async def test_what_it_says(
        self,
        pool: ConnectionPool,
        server: RawServer,
        answer: bytes,
        error: type[RequestFailed],
        words: str,
    ) -> None:
        sent = post(pool, server.to)
        peer = await server.accept()
        await peer.request()
        await peer.say(answer)
        if error is ConnectionLost:
            peer.close()
        with pytest.raises(error, match=words):
            await sent
        if error is not ConnectionLost:
            assert await peer.ended()
        await until(lambda: not pool._open)

    @pytest.mark.parametrize("answer", [OK % b"x: y\r\n", CHUNKED], ids=["a length", "chunks"])
    @pytest.mark.parametrize("how", ["close", "reset"])
    async def test_cut_anywhere_it_is_lost(
        self, pool: ConnectionPool, server: RawServer, answer: bytes, how: str
    ) -> None:
        """On connections that are new and on those that were used. Nobody waits for ever."""
        for end in range(len(answer)):
            peer = await one(pool, server)
            sent = post(pool, server.to)
            await peer.request()
            await peer.say(answer[:end])
            getattr(peer, how)()
            with pytest.raises(ConnectionLost):
                await sent
        sent = post(pool, server.to)
        peer = await server.accept()
        await peer.request()
        await peer.say(answer)
        assert (await sent).body == b"ok"
        assert len(server.peers) == len(answer) + 1

    async def test_cut_and_late_pieces_make_the_same_answer(
        self, pool: ConnectionPool, server: RawServer
    ) -> None:
        for answer in (OK % b"x: y\r\n", CHUNKED, b"HTTP/1.1 100 Continue\r\n\r\n" + ANSWER):
            sent = post(pool, server.to)
            peer = server.peers[-1] if server.peers else await server.accept()
            await peer.request()
            for at in range(len(answer)):
                await peer.say(answer[at : at + 1])
                await asyncio.sleep(0)
            assert (await sent).body == b"ok"
        assert len(server.peers) == 1

    async def test_nobody_listens(self, pool: ConnectionPool) -> None:
        async with raw_server() as server:
            to = server.to
        with pytest.raises(NotConnected) as caught:
            await post(pool, to)
        assert isinstance(caught.value.cause, ConnectionRefusedError)
        assert caught.value.cause.errno == errno.ECONNREFUSED

    async def test_nobody_takes_the_connection(
        self, pool: ConnectionPool, deaf: Destination, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pool_module, "CONNECT_TIMEOUT_S", 0.2)
        with pytest.raises(NotConnected, match=r"no connection within 0\.2 s"):
            await post(pool, deaf)

    async def test_a_name_that_nobody_has(self, pool: ConnectionPool) -> None:
        for name in ("no-such-name.invalid", "-bad-", "x" * 300):
            with pytest.raises(NotConnected):
                await post(pool, (f"{name}:1", None))

    async def test_no_answer_in_time(self, pool: ConnectionPool, server: RawServer) -> None:
        sent = post(pool, server.to, timeout=0.5)
        peer = await server.accept()
        await peer.request()
        with pytest.raises(TimedOut, match=r"no answer within 0\.5 s"):
            await sent
        assert await peer.ended()

    async def test_an_answer_without_end(self, pool: ConnectionPool, server: RawServer) -> None:
        sent = post(pool, server.to, timeout=0.5)
        peer = await server.accept()
        await peer.request()
        await peer.say(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        with pytest.raises(TimedOut):
            await sent
        assert await peer.ended()

    async def test_no_connection_in_time(self, pool: ConnectionPool, deaf: Destination) -> None:
        with pytest.raises(TimedOut):
            await post(pool, deaf, timeout=0.05)
        await until(lambda: not pool._connecting)

    @pytest.mark.parametrize("how", ["close", "speak"])
    async def test_an_instance_that_does_not_wait_for_the_request(
        self, pool: ConnectionPool, server: RawServer, how: str
    ) -> None:
        """Nothing was sent there, or it is lost: which of both depends on who is faster."""
        sent = post(pool, server.to)
        peer = await server.accept()
        if how == "close":
            peer.close()
        else:
            await peer.say(ANSWER)
        (outcome,) = await asyncio.gather(sent, return_exceptions=True)
        lost = isinstance(outcome, (NotConnected, ConnectionLost))
        assert lost or (how == "speak" and isinstance(outcome, Answer))

    async def test_no_file_descriptor_left(self, pool: ConnectionPool, server: RawServer) -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        next_one = os.dup(0)
        os.close(next_one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_one, limits[1]))
        try:
            with pytest.raises(NotConnected) as caught:
                await post(pool, server.to)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert isinstance(caught.value.cause, OSError)
        assert caught.value.cause.errno == errno.EMFILE
