"""The HTTP server at which D ask for prefills: what it answers, and where D are told that it is."""

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any
from unittest import mock

import aiohttp
import pytest
import pytest_asyncio

from tests.support.asked import AskedCase
from tests.support.processes import unused_ports
from tests.support.routing import decode_body
from vllm_pd_scheduler.admin import metaserver
from vllm_pd_scheduler.admin.metaserver import MAX_CALL_BYTES, Metaserver, url_for
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.routing.decode_first import Called


@pytest_asyncio.fixture
async def url() -> AsyncIterator[str]:
    (port,) = unused_ports(1)
    server = Metaserver(PDRouter(SchedulerConfig()).decode_first)
    await server.start("127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    await server.stop()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/metaserver/guessed", b"{}", 404),
        ("POST", "/v1/metaserver/guessed", b"\xff", 404),
        ("POST", "/v1/metaserver/", b"{}", 404),
        ("POST", "/v1/metaserver", b"{}", 404),
        ("POST", "/metrics", b"", 404),
        ("GET", "/v1/metaserver/guessed", None, 405),
        ("GET", "/healthz", None, 404),
        ("POST", "/v1/metaserver/guessed", b"x" * (MAX_CALL_BYTES + 1), 404),
    ],
)
async def test_what_is_no_call(url: str, method: str, path: str, body: bytes | None, status: int) -> None:
    async with aiohttp.ClientSession() as session, session.request(method, url + path, data=body) as response:
        assert response.status == status
        assert "error" in await response.json()


@pytest.mark.parametrize(
    ("settings", "decode", "expected"),
    [
        ({}, "10.0.0.2", None),
        ({"metaserver_port": 9005}, "127.0.0.1", "http://127.0.0.1:9005"),
        ({"metaserver_port": 9005, "metaserver_host": "0.0.0.0"}, "127.0.0.1", "http://127.0.0.1:9005"),
        ({"metaserver_port": 9005, "metaserver_host": "::"}, "127.0.0.1", "http://127.0.0.1:9005"),
        ({"metaserver_port": 9005, "metaserver_host": "10.0.0.5"}, "10.0.0.2", "http://10.0.0.5:9005"),
        ({"metaserver_port": 9005, "metaserver_host": "fd00::5"}, "fd00::2", "http://[fd00::5]:9005"),
        ({"metaserver_port": 9005, "metaserver_url": "https://a.b:1"}, "10.0.0.2", "https://a.b:1"),
    ],
)
def test_where_d_are_told_that_it_is(settings: dict[str, Any], decode: str, expected: str | None) -> None:
    found = url_for(SchedulerConfig(**settings))
    assert (None if found is None else found(decode)) == expected


def test_with_tls() -> None:
    tls = {"self_signed": True}
    found = url_for(SchedulerConfig(metaserver_port=9005, metaserver_tls=tls))  # type: ignore[arg-type]
    assert found is not None
    assert found("127.0.0.1") == "https://127.0.0.1:9005"


HEAD = b"POST /v1/metaserver/%s HTTP/1.1\r\nhost: a\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        HEAD % b"x" + b"content-length: 1000\r\n\r\n{",
        HEAD % b"x" + b"content-length: 4\r\ncontent-encoding: gzip\r\n\r\nabcd",
        HEAD % b"x" + b"content-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n4\r\nabcd\r\n",
        HEAD % b"x" + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
        HEAD % b"\xff" + b"ho st: a\r\n\r\n",
    ],
)
async def test_a_stranger_is_answered_at_once_and_fills_no_log(
    url: str, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Its body is not waited for."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(sent)
    assert (await reader.readline()).split()[1] in (b"400", b"404")
    writer.transport.abort()
    await asyncio.sleep(0)
    assert [record for record in caplog.records if record.exc_info] == []


class CallTest(AskedCase):
    CONFIG: Mapping[str, Any] = {"connector": "ascend-layerwise", "metaserver_callers": "any"}

    async def asyncSetUp(self) -> None:
        (self.port,) = unused_ports(1)
        self.server = Metaserver(self.first)
        await self.server.start("127.0.0.1", self.port)
        self.addAsyncCleanup(self.server.stop)

    async def say(self, more: bytes, *, leaves: bool = False) -> bytes:
        """Send what comes after the head of a call for a request; return the status."""
        self.forward = await self.begun()
        url = decode_body(self.forward)["kv_transfer_params"]["metaserver"]
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(HEAD % url.rpartition("/")[2].encode() + more)
        await writer.drain()
        if leaves:
            writer.write_eof()
        status = (await reader.readline()).split()
        writer.transport.abort()
        return status[1] if status else b""

    async def test_a_body_that_cannot_be_read_is_no_call(self) -> None:
        """D may try again."""
        zipped = gzip.compress(b"{}")
        length = b"content-length: %d\r\n"
        for more, leaves, expected in (
            (length % 1000 + b"\r\n{", False, b"408"),
            (length % 1000 + b"\r\n{", True, b""),
            (length % (MAX_CALL_BYTES + 1) + b"\r\n" + b"x" * (MAX_CALL_BYTES + 1), False, b"413"),
            (b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\nzz\r\n", False, b"400"),
        ):
            read_s = 0.05 if expected == b"408" else 30.0
            with (
                self.subTest(more[:60]),
                mock.patch.object(metaserver, "READ_S", read_s),
                self.assertNoLogs(level=logging.ERROR),
            ):
                self.assertEqual(await self.say(more, leaves=leaves), expected)
                self.assertEqual(self.refused, [])
                self.assertEqual(self.call(self.forward), Called.ACCEPTED)
                await self.settled()
                self.forward.release()
        self.assertEqual((len(self.first), self.memory.used), (0, 0))
        more = length % len(zipped) + b"content-encoding: gzip\r\n\r\n" + zipped
        self.assertEqual(await self.say(more), b"400", "nothing is unpacked")
