"""An answer as it comes in, piece by piece, and what it may not be."""

from __future__ import annotations

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from .errors import AnswerRefused, NotHttp, RequestFailed
from .exchange import Answer

MAX_HEAD_BYTES = 1 << 16
"""Of all headers of an answer, with those of interim answers and trailers; also of all else that is no body
and has no end yet. vLLM's own have some 200."""
_CHUNK_FRAMING = 32
"""Bytes around each part of a body that do not count."""
_HEADER_OVERHEAD = 32
"""Bytes that a header counts beyond its own: so there are at most 2,048."""


class AnswerReader:
    """Reads one HTTP/1.1 answer to a POST; its body may have ``limit`` bytes.

    Reads nothing but one answer: the next one needs a reader of its own, so that nothing of this one can
    become part of it. Such a reader takes 1 µs.
    """

    __slots__ = (
        "_chunks",
        "_framing",
        "_head_left",
        "_headers",
        "_interim",
        "_left",
        "_limit",
        "_parser",
        "_problem",
        "_status",
        "began",
        "complete",
        "ends_with_connection",
        "reusable",
    )

    def __init__(self, limit: int) -> None:
        self.began = False
        """Whether any byte has come."""
        self.complete = False
        """Whether all of it has come."""
        self.ends_with_connection = False
        """Whether it is complete as soon as the connection ends."""
        self.reusable = False
        """Whether the connection can be used again after it."""
        self._limit = self._left = limit
        self._head_left = MAX_HEAD_BYTES
        self._framing = 0
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._chunks: list[bytes] = []
        self._interim = False
        self._problem: RequestFailed | None = None
        self._parser: HttpResponseParser | None = HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Read the next piece. Raises :exc:`RequestFailed` for what cannot be an answer that is wanted."""
        assert self._parser is not None
        self.began = True
        self._framing += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if self.complete:
                self.reusable = False  # something came after it
            else:
                self._refuse(NotHttp(f"its answer is not HTTP/1.1: {error}"))
        if not self.complete and self._framing > MAX_HEAD_BYTES:
            self._refuse(_too_many_headers())
        self._framing = max(0, self._framing)
        if self._problem is not None:
            raise self._problem

    def close(self) -> None:
        """Read no more. Must be called at the end: the parser and this reader refer to each other."""
        self._parser = None

    def answer(self) -> Answer:
        """Return what was read."""
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        return Answer(self._status, self._headers, body)

    def on_message_begin(self) -> None:
        """Called by the parser, like all below."""
        if self.complete:
            raise ValueError("a second answer")  # makes the parser stop

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header or a trailer."""
        self._head_left -= len(name) + len(value) + _HEADER_OVERHEAD
        if self._head_left < 0:
            self._refuse(_too_many_headers())
        elif not self._status:
            self._headers.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        """Look at the headers of an answer, or of an interim one."""
        assert self._parser is not None
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self._interim = True
            self._headers.clear()
            if status == 101:
                self._refuse(NotHttp("it changes to another protocol"))
            return
        self._status = status
        encoding = self._headers.get(b"content-encoding", b"").strip().lower()
        length = self._headers.get(b"content-length")
        coding = self._headers.get(b"transfer-encoding")
        if encoding not in (b"", b"identity"):
            self._refuse(AnswerRefused(f"its encoding is {encoding[:40]!r}, where none was asked for"))
        elif coding is not None and coding.lower() != b"chunked":
            self._refuse(NotHttp(f"its transfer-encoding is {coding[:40]!r}"))
        elif length is not None and int(length) > self._limit:
            self._refuse(_too_large(self._limit))
        self.ends_with_connection = length is None and coding is None

    def on_body(self, data: bytes) -> None:
        """Take a part of the body."""
        self._framing -= len(data) + _CHUNK_FRAMING
        self._left -= len(data)
        if self._left >= 0:
            self._chunks.append(data)
        else:
            self._refuse(_too_large(self._limit))

    def on_message_complete(self) -> None:
        """Take the end of an answer, or of an interim one."""
        assert self._parser is not None
        if self._interim:
            self._interim = False
        else:
            self.complete = True
            self.reusable = self._parser.should_keep_alive()

    def _refuse(self, error: RequestFailed) -> None:
        """Remember the first thing that is wrong; the parser goes on to the end of the piece."""
        self._problem = self._problem or error


def _too_large(limit: int) -> AnswerRefused:
    return AnswerRefused(f"it has more than {limit} bytes")


def _too_many_headers() -> NotHttp:
    return NotHttp(f"its headers have more than {MAX_HEAD_BYTES} bytes")
