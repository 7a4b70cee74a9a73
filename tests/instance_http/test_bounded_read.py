"""Reading an answer up to a limit, from a real server."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest
import pytest_asyncio

from vllm_pd_scheduler.instance_http.bounded_read import AnswerEncoded, AnswerTooLarge, read_at_most
from vllm_pd_scheduler.instance_http.session import open_session

Read = Callable[..., "asyncio.Future[bytes]"]


class Sender:
    """Sends what it is told to each client, then ``endless`` until the client has gone."""

    def __init__(self) -> None:
        self.answer = b""
        self.endless = b""
        self.sent = 0
        self.gone = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self.answer)
        try:
            while self.endless:
                writer.write(self.endless)
                self.sent += len(self.endless)
                await writer.drain()
        except OSError:
            self.gone.set()
        writer.close()


@pytest.fixture
def sender() -> Sender:
    return Sender()


@pytest_asyncio.fixture
async def read(sender: Sender) -> AsyncIterator[Read]:
    server = await asyncio.start_server(sender, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with open_session() as session:

        async def read(limit: int) -> bytes:
            async with session.get(url) as response:
                return await read_at_most(response, limit)

        yield read  # type: ignore[misc]
    server.close()


def answer(body: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", *headers, b"", body])


CHUNKED = b"transfer-encoding: chunked"


class TestLimit:
    @pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 100_000])
    @pytest.mark.parametrize("chunked", [False, True])
    async def test_up_to_it_all_is_read_and_beyond_nothing(
        self, sender: Sender, read: Read, size: int, chunked: bool
    ) -> None:
        body = b"x" * size
        if chunked:
            parts = [body[start : start + 7] for start in range(0, size, 7)]
            wire = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
            sender.answer = answer(wire, CHUNKED)
        else:
            sender.answer = answer(body, b"content-length: %d" % size)
        if size <= 100:
            assert await read(100) == body
        else:
            with pytest.raises(AnswerTooLarge, match="more than 100 bytes"):
                await read(100)

    @pytest.mark.parametrize("framing", [b"connection: close", b"content-length: 100000000000"])
    async def test_an_answer_without_end(self, sender: Sender, read: Read, framing: bytes) -> None:
        """The connection is closed then: nothing more is sent than the limit and what is under way."""
        sender.answer, sender.endless = answer(b"", framing), b"x" * 65536
        with pytest.raises(AnswerTooLarge):
            await read(1 << 20)
        await asyncio.wait_for(sender.gone.wait(), 10)
        assert sender.sent < 32 << 20

    async def test_a_connection_that_ends_early(self, sender: Sender, read: Read) -> None:
        sender.answer = answer(b"half", b"content-length: 8")
        with pytest.raises(aiohttp.ClientPayloadError):
            await read(100)


class TestEncoding:
    @pytest.mark.parametrize("encoding", [b"gzip", b"GZIP", b"deflate", b"br", b"gzip, identity", b"\xff"])
    async def test_none_was_asked_for(self, sender: Sender, read: Read, encoding: bytes) -> None:
        bomb = gzip.compress(b"\0" * (1 << 20))
        sender.answer = answer(bomb, b"content-encoding: " + encoding, b"content-length: %d" % len(bomb))
        with pytest.raises(AnswerEncoded):
            await read(1 << 22)

    @pytest.mark.parametrize("encoding", [b"identity", b"Identity", b""])
    async def test_none_at_all(self, sender: Sender, read: Read, encoding: bytes) -> None:
        sender.answer = answer(b"text", b"content-encoding: " + encoding, b"content-length: 4")
        assert await read(100) == b"text"

    async def test_whoever_catches_a_clients_errors_catches_these(self) -> None:
        assert issubclass(AnswerTooLarge, aiohttp.ClientError)
        assert issubclass(AnswerEncoded, aiohttp.ClientError)
