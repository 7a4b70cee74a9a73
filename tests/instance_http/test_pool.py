"""Requests to a real server that a test plays by hand: what is sent, how often, and what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import random
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop

from tests.support.certificates import make_certificates
from tests.support.raw_server import Peer, RawServer, raw_server
from tests.support.sockets import gives_up_after
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.instance_http import pool as pool_module
from vllm_pd_scheduler.instance_http.connection import _idle_time
from vllm_pd_scheduler.instance_http.errors import (
    AnswerRefused,
    ConnectionLost,
    NotConnected,
    NotHttp,
    RequestFailed,
    TimedOut,
)
from vllm_pd_scheduler.instance_http.exchange import Answer, Destination, post_head
from vllm_pd_scheduler.instance_http.pool import IDLE_S, MAX_IDLE, ConnectionPool

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")

PATH = "/v1/completions"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n%s\r\nok"
ANSWER = OK % b""
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n"
HALF = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """The scheduler runs on uvloop, a script's calls on asyncio's own loop."""
    made: asyncio.AbstractEventLoopPolicy = request.param()
    return made


@pytest_asyncio.fixture
async def server() -> AsyncIterator[RawServer]:
    async with raw_server() as made:
        yield made


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[ConnectionPool]:
    async with ConnectionPool() as made:
        yield made


@pytest.fixture
def deaf() -> Iterator[Destination]:
    """A server whose queue of new connections is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield "{}:{}".format(*listener.getsockname()), None


@pytest.fixture(autouse=True)
def no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The event loop logs what nobody has taken care of."""
    with caplog.at_level(logging.WARNING):
        yield
        gc.collect()
    assert not caplog.records, caplog.text


def post(
    pool: ConnectionPool,
    to: Destination,
    body: bytes = b"{}",
    limit: int = 100,
    timeout: float = HUNG_S,
    **headers: str,
) -> asyncio.Future[Answer]:
    return pool.post(to, PATH, headers, body, limit=limit, timeout=timeout)


async def one(pool: ConnectionPool, server: RawServer, answer: bytes = ANSWER) -> Peer:
    """Have a request answered on a new connection; return that connection."""
    sent = post(pool, server.to)
    peer = await server.accept()
    await peer.request()
    await peer.say(answer)
    assert (await sent).body == b"ok"
    return peer


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

    @pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 16) + 1, 20 << 20])
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


class TestReuse:
    async def test_the_one_used_last_is_used_first(self, pool: ConnectionPool, server: RawServer) -> None:
        sent = [post(pool, server.to) for _ in range(3)]
        peers = [await server.accept() for _ in range(3)]
        for peer in peers:
            await peer.request()
            await peer.say(ANSWER)
            await asyncio.sleep(0.01)
        await asyncio.gather(*sent)
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

    async def test_not_when_the_answer_came_before_the_request_had_gone_out(
        self, pool: ConnectionPool, server: RawServer
    ) -> None:
        sent = post(pool, server.to, b"x" * (64 << 20))
        peer = await server.accept()
        await until(lambda: _waits(peer))
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
        await until(lambda: _waits(peer))
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
        await (peer.request() if read else until(lambda: _waits(peer)))
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


def _waits(peer: Peer) -> bool:
    try:
        return bool(peer.connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


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
        sent = post(pool, server.to, timeout=0.05)
        peer = await server.accept()
        await peer.request()
        with pytest.raises(TimedOut, match=r"no answer within 0\.05 s"):
            await sent
        assert await peer.ended()

    async def test_an_answer_without_end(self, pool: ConnectionPool, server: RawServer) -> None:
        sent = post(pool, server.to, timeout=0.2)
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


class TestTls:
    @pytest_asyncio.fixture
    async def secured(self, tmp_path: Path) -> AsyncIterator[Secured]:
        made = Secured(tmp_path)
        async with await asyncio.start_server(made.answer, "127.0.0.1", 0, ssl=made.context) as server:
            made.port = server.sockets[0].getsockname()[1]
            yield made

    async def test_it_is_used_again(self, secured: Secured) -> None:
        async with ConnectionPool(secured.made.client_context()) as pool:
            for body in (b"one", b"x" * (1 << 20), b"three"):
                assert (await post(pool, secured.to(), body)).body == b"%d" % len(body)
            assert secured.connections == 1

    @pytest.mark.parametrize("who", ["another name", "another authority", "the system's authorities"])
    async def test_one_that_is_not_trusted(self, secured: Secured, who: str, tmp_path: Path) -> None:
        context = None if who.startswith("the") else secured.made.client_context()
        if who == "another authority":
            (tmp_path / "other").mkdir()
            context = make_certificates(tmp_path / "other").client_context()
        async with ConnectionPool(context) as pool:
            with pytest.raises(NotConnected) as caught:
                await post(pool, secured.to("vllm.example" if who == "another name" else "localhost"))
        assert isinstance(caught.value.cause, ssl.SSLCertVerificationError)
        assert secured.requests == 0

    async def test_one_that_wants_a_certificate(self, secured: Secured) -> None:
        secured.context.load_verify_locations(secured.made.ca)
        secured.context.verify_mode = ssl.CERT_REQUIRED
        async with ConnectionPool(secured.made.client_context()) as pool:
            with pytest.raises(RequestFailed):
                await post(pool, secured.to())
        assert secured.requests == 0
        async with ConnectionPool(secured.made.client_context(secured.made.client)) as pool:
            assert (await post(pool, secured.to())).status == 200

    async def test_one_that_speaks_in_clear(self, server: RawServer, secured: Secured) -> None:
        async with ConnectionPool(secured.made.client_context()) as pool:
            sent = post(pool, (server.to[0], "localhost"))
            peer = await server.accept()
            await peer.say(ANSWER)
            with pytest.raises(NotConnected):
                await sent


class Secured:
    """A server with TLS that answers with the number of bytes it got."""

    def __init__(self, directory: Path) -> None:
        self.made = make_certificates(directory)
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(self.made.server["cert"], self.made.server["key"])
        self.port = 0
        self.connections = 0
        self.requests = 0

    def to(self, name: str = "localhost") -> Destination:
        return f"127.0.0.1:{self.port}", name

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(head.rpartition(b"content-length: ")[2])
                body = await reader.readexactly(size)
                self.requests += 1
                text = b"%d" % len(body)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()
