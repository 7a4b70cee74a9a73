"""Envoy's question whether it may try again, and the new prefill that some requests need for that."""

import unittest
from typing import Any

from vllm_pd_scheduler.envoy.retries import RetryCheck
from vllm_pd_scheduler.routing.attempts import Retry
from vllm_pd_scheduler.rpc import CallError, StatusCode


class Stream:
    """A call with some metadata, of one message."""

    connection = None

    def __init__(self, message: bytes = b"", **metadata: str) -> None:
        self._metadata = {"x-pd-id": "r-1", "x-envoy-attempt-count": "2"}
        self._metadata |= {name.replace("_", "-"): value for name, value in metadata.items()}
        self._message = message
        self.written: list[bytes] = []

    def metadata(self, name: str) -> str | None:
        return self._metadata.get(name)

    async def read(self) -> bytes:
        return self._message

    async def write(self, data: bytes) -> None:
        self.written.append(data)


class RetryCheckTest(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.answer = Retry.ALLOWED
        self.begun: tuple[bytes, str] | None = (b',"bootstrap_room":7}', "p0")
        self.asked: list[tuple[str, str, bytes]] = []

        async def again(*asked: Any) -> tuple[bytes, str] | None:
            self.asked.append(asked)
            return self.begun

        self.in_vain = False
        check = RetryCheck(lambda *_: self.answer, again, lambda _: self.in_vain, 1 << 20)
        self.method = check.methods()["/vllm_pd_scheduler.Retries/Allowed"]
        self.begins = check._begins
        self.check = check._check

    async def said(self, stream: Stream) -> bytes:
        await self.check(stream)  # type: ignore[arg-type]
        (written,) = stream.written
        return written

    async def test_of_most_requests_nothing_more_is_asked(self) -> None:
        self.assertEqual(await self.said(Stream()), b"")
        self.answer = Retry.LAST
        self.assertEqual(await self.said(Stream()), b"\x08\x01")
        self.assertEqual(self.asked, [])

    async def test_a_new_prefill(self) -> None:
        self.answer = Retry.LAST
        said = await self.said(Stream(b"{}", x_pd_host="10.0.0.2:1"))
        self.assertEqual(said, b'\x08\x01\x12\x14,"bootstrap_room":7}\x1a\x02p0')
        self.assertEqual(self.asked, [("r-1", "10.0.0.2:1", b"{}")])

    async def test_a_long_text_has_a_long_length(self) -> None:
        self.begun = b"x" * 300, "p0"
        said = await self.said(Stream(b"{}", x_pd_host="10.0.0.2:1"))
        self.assertEqual(said, b"\x12\xac\x02" + b"x" * 300 + b"\x1a\x02p0")

    async def test_nobody_prefills_it(self) -> None:
        self.begun = None
        self.assertEqual(await self.said(Stream(b"{}", x_pd_host="10.0.0.2:1")), b"")

    async def test_what_may_not_be_tried_again_gets_no_prefill(self) -> None:
        self.answer = Retry.LOST
        with self.assertRaises(CallError):
            await self.check(Stream(b"{}", x_pd_host="10.0.0.2:1"))  # type: ignore[arg-type]
        self.assertEqual(self.asked, [])

    async def test_a_request_of_another_scheduler(self) -> None:
        """An error that Envoy's filter does not know: one more attempt, as without a scheduler."""
        self.answer = Retry.UNKNOWN
        with self.assertRaises(CallError) as raised:
            await self.check(Stream(b"{}", x_pd_host="10.0.0.2:1"))  # type: ignore[arg-type]
        self.assertIs(raised.exception.code, StatusCode.NOT_FOUND)
        self.assertEqual(self.asked, [])

    async def test_an_answer_that_begins(self) -> None:
        stream = Stream()
        await self.begins(stream)  # type: ignore[arg-type]
        self.assertEqual(stream.written, [b""])
        self.in_vain = True
        with self.assertRaises(CallError):
            await self.begins(stream)  # type: ignore[arg-type]

    def test_a_message_may_be_as_long_as_a_body(self) -> None:
        self.assertGreater(self.method.max_bytes, 1 << 20)
