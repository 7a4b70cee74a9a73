"""The HTTP server at which D ask for prefills: what it answers, and where D are told that it is."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.processes import unused_ports
from vllm_pd_scheduler.admin.metaserver import MAX_CALL_BYTES, Metaserver, url_for
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.router import PDRouter


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
        ("POST", "/v1/metaserver/guessed", b"x" * (MAX_CALL_BYTES + 1), 413),
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
