"""Requests on connections: what is sent, what comes back, and who ends it when."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket

import pytest
import uvloop

from tests.support.exchanges import ANSWER, OK, PATH, one, post
from tests.support.raw_server import RawServer, raw_server
from tests.support.sockets import gives_up_after
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.instance_http.errors import (
    ConnectionLost,
    NotConnected,
)
from vllm_pd_scheduler.instance_http.exchange import Destination, post_head
from vllm_pd_scheduler.instance_http.pool import ConnectionPool

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")


class TestRequest:
    async def test_it_is_these_bytes(self, pool: ConnectionPool, server: RawServer) -> None:
        sent = post(pool, server.to, b"\x00body", **{"x-request-id": "1", "origin": "a\tb"})
        peer = await server.accept()
        assert await peer.request() == (
            b"POST /v1/completions HTTP/1.1\r\nhost: %s\r\nx-request-id: 1\r\norigin: a\tb\r\n"
            b"content-length: 5\r\n\r\n\x00body" % server.to[0].encode()
        )
        await peer.say(OK % b"content-type: text/plain\r\n")
        answer = await sent
        assert (answer.status, answer.body, answer.header("content-type")) == (200, b"ok", "text/plain")

    @pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 16) + 1, 3 << 20])
    async def test_any_size_goes_both_ways(self, pool: ConnectionPool, server: RawServer, size: int) -> None:
        body = random.Random(size).randbytes(size)
        for turn in range(2):
            sent = post(pool, server.to, body, limit=size)
            peer = server.peers[0] if turn else await server.accept()
            request = await peer.request()
            assert request.endswith(b"\r\n\r\n" + body)
            await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + body)
            assert (await sent).body == body

    @pytest.mark.parametrize(
        "text", ["a\r\nx-other: b", "a\nb", "a\rb", "a\0b", "a\r\n\r\nPOST / HTTP/1.1"], ids=repr
    )
    def test_none_of_its_parts_becomes_another(self, text: str) -> None:
        for parts in ((PATH, "h", {"x": text}), (PATH, "h", {text: "x"}), (text, "h", {}), (PATH, text, {})):
            with pytest.raises(ValueError, match="has a character that ends it"):
                post_head(*parts, 0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="has a character that ends it"):
            post_head("/a HTTP/1.0", "h", {}, 0)
        with pytest.raises(ValueError, match="ascii"):
            post_head(PATH, "h", {"x": "\u00e9"}, 0)

    async def test_ipv6(self, pool: ConnectionPool) -> None:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
        async with raw_server("::1") as server:
            assert server.to[0].startswith("[::1]:")
            await one(pool, server)

    async def test_a_name_with_an_address_at_which_nobody_listens(
        self, pool: ConnectionPool, server: RawServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def two(host: str, port: int, *args: object, **kwargs: object) -> list[object]:
            stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
            return [(*stream, ("127.0.0.99", port)), (*stream, ("127.0.0.1", port))]

        monkeypatch.setattr(socket, "getaddrinfo", two)
        name = "localhost" if isinstance(asyncio.get_running_loop(), uvloop.Loop) else "two.example"
        sent = post(pool, (f"{name}:{server.port}", None))  # uvloop looks names up by itself
        peer = await server.accept()
        await peer.request()
        await peer.say(ANSWER)
        assert (await sent).status == 200

    async def test_its_connection_looks_after_its_peer(self, pool: ConnectionPool, server: RawServer) -> None:
        await one(pool, server)
        (connection,) = pool._idle[server.to]
        used = connection._transport.get_extra_info("socket")
        with socket.socket(fileno=os.dup(used.fileno())) as copy:
            assert copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert gives_up_after(copy) == (13, 12)


class TestCancel:
    async def test_the_instance_sees_the_end_of_the_connection(
        self, pool: ConnectionPool, server: RawServer
    ) -> None:
        sent = post(pool, server.to)
        peer = await server.accept()
        await peer.request()
        sent.cancel()
        assert await peer.ended()
        await until(lambda: not pool._open)
        await one(pool, server)

    async def test_on_a_connection_that_was_used(self, pool: ConnectionPool, server: RawServer) -> None:
        peer = await one(pool, server)
        sent = post(pool, server.to)
        await peer.request()
        sent.cancel()
        assert await peer.ended()

    async def test_while_it_connects(self, pool: ConnectionPool, server: RawServer) -> None:
        for rounds in range(6):
            sent = post(pool, server.to)
            for _ in range(rounds):
                await asyncio.sleep(0)
            sent.cancel()
        await until(lambda: not pool._connecting and not pool._open)

    async def test_when_the_answer_has_just_come(self, pool: ConnectionPool, server: RawServer) -> None:
        """The connection may have its next request by then, which is not ended."""
        peer = await one(pool, server)
        sent = post(pool, server.to)
        await peer.request()
        (connection,) = pool._open
        sent.cancel()
        connection.data_received(ANSWER)
        following = post(pool, server.to, b"next")
        other = peer if connection._exchange is not None else await server.accept()
        assert (await other.request()).endswith(b"next")
        await other.say(ANSWER)
        assert (await following).status == 200

    async def test_the_pool_is_closed(self, server: RawServer, deaf: Destination) -> None:
        pool = ConnectionPool()
        idle = await one(pool, server)
        waiting = [post(pool, server.to), post(pool, server.to), post(pool, deaf)]
        await idle.request()
        await (await server.accept()).request()
        await asyncio.wait_for(pool.close(), HUNG_S)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        kinds = [type(each) for each in outcomes]
        assert kinds == [ConnectionLost, ConnectionLost, NotConnected]


async def test_nothing_is_left_to_the_garbage_collector(pool: ConnectionPool, server: RawServer) -> None:
    peer = await one(pool, server)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            sent = post(pool, server.to)
            await peer.request()
            await peer.say(ANSWER)
            await sent
        del sent
        assert gc.collect() == 0
    finally:
        gc.enable()
