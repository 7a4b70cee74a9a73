"""What P answers to a prefill: read up to a limit, and passed on only as far as it can be."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from vllm_pd_scheduler.fleet.endpoint import Endpoint
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
    endpoint.address = f"127.0.0.1:{instance.port}"
    async with ConnectionPool() as pool:
        return await HttpPrefill(pool, None, 10.0)(endpoint, "/v1/completions", {}, body)


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
