"""One request and the answer to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from msgspec import Struct

from .errors import RequestFailed, TimedOut

Destination = tuple[str, str | None]
"""``host:port``, and the DNS name that the certificate must be for; ``None`` for plain HTTP."""


class Answer(Struct, frozen=True, gc=False):
    """An answer with its whole body. Of a header that came more than once, the first counts."""

    status: int
    headers: dict[bytes, bytes]
    """By name in lower case."""
    body: bytes

    def header(self, name: str) -> str:
        """Return the value of a header, the empty string if there is none."""
        return self.headers.get(name.encode("ascii"), b"").decode("latin-1")


class Exchange:
    """A request, from the moment that somebody wants its answer until ``answer`` is done.

    Whoever works on it says in ``stop`` how that is ended. It is called once if ``answer`` is cancelled or
    the time is over.
    """

    __slots__ = ("_timer", "answer", "body", "head", "limit", "name", "repeated", "sent", "stop", "to")

    def __init__(
        self, to: Destination, head: bytes, body: bytes, limit: int, timeout: float, name: bytes = b""
    ) -> None:
        loop = asyncio.get_running_loop()
        self.to = to
        self.head = head
        self.body = body
        self.limit = limit
        """Bytes that the body of the answer may have."""
        self.name = name
        """What the instance may repeat in its answer."""
        self.repeated = False
        """Whether it was sent before, on a connection that was being closed."""
        self.sent: Callable[[], object] | None = None
        """Called when a connection has taken the request, if somebody wants to know."""
        self.stop: Callable[[], object] | None = None
        self.answer: asyncio.Future[Answer] = loop.create_future()
        self.answer.add_done_callback(self._ended)
        self._timer = loop.call_later(timeout, self._expire, timeout)

    def succeed(self, answer: Answer) -> None:
        """Give the answer to whoever still wants it."""
        self.stop = None
        if not self.answer.done():
            self.answer.set_result(answer)

    def fail(self, error: RequestFailed) -> None:
        """Tell whoever still wants the answer that there is none."""
        self.stop = None
        if not self.answer.done():
            self.answer.set_exception(error)

    def _expire(self, timeout: float) -> None:
        if not self.answer.done():
            self.answer.set_exception(TimedOut(f"no answer within {timeout:g} s"))

    def _ended(self, _: asyncio.Future[Answer]) -> None:
        self._timer.cancel()
        stop, self.stop = self.stop, None
        if stop is not None:
            stop()


def post_head(path: str, host: str, headers: Mapping[str, str], length: int) -> bytes:
    """Return the head of a POST. Raises :exc:`ValueError` if one of its parts would become several."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\n{lines}content-length: {length}\r\n\r\n"
    ends = len(headers) + 4
    if head.count("\r") != ends or head.count("\n") != ends or "\0" in head or " " in path:
        raise ValueError("a header, the path or the host has a character that ends it")
    return head.encode("ascii")
