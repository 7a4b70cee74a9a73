"""Instances with TLS: who is trusted."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.certificates import make_certificates
from tests.support.exchanges import ANSWER, post
from tests.support.raw_server import RawServer
from vllm_pd_scheduler.instance_http.errors import (
    NotConnected,
    RequestFailed,
)
from vllm_pd_scheduler.instance_http.exchange import Destination
from vllm_pd_scheduler.instance_http.pool import ConnectionPool

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")


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
