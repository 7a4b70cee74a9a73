"""Header blocks: how those of requests are read, and those of answers written (HPACK, RFC 7541)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hpack import Decoder, HPACKError

from .frames import ConnectionViolation, ErrorCode

MAX_LIST_BYTES = 16 << 10
"""Names and values of one header block, with 32 bytes for each, at most. Envoy's have some 500."""

MAX_BLOCK_BYTES = 32 << 10
"""Bytes of one header block, with those of its CONTINUATION frames."""

MAX_CONTINUATIONS = 8

MAX_BLOCKS = 256
"""Header blocks that are remembered. Envoy's for one method are all the same."""

MAX_REMEMBERED_BYTES = 1 << 10
"""A longer block is decoded each time that it comes."""

EMPTY_TABLE = b"\x20"
"""Begins the first block that is sent, and says that no dynamic table is used. So it does not matter which
size of it the peer allows; one that has lowered it must be told."""

_PSEUDO = frozenset({b":method", b":scheme", b":path", b":authority"})
_OF_A_CONNECTION = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)
_NAME = re.compile(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(rb"(?![ \t])[^\0\r\n]*(?<![ \t])")


class RequestHead:
    """The fields of a header block, and what is wrong with them.

    ``fields`` has the last of doubled names. ``problem`` is ``None`` if they are well-formed for a request,
    ``trailers_problem`` if they are so for trailers.
    """

    __slots__ = ("content_length", "fields", "problem", "trailers_problem")

    def __init__(self, fields: Iterable[tuple[bytes, bytes]]) -> None:
        listed = list(fields)
        self.fields: dict[bytes, bytes] = dict(listed)
        self.problem = _problem(listed, self.fields)
        self.trailers_problem = _problem_of_trailers(listed)
        length = self.fields.get(b"content-length", b"")
        self.content_length = int(length) if length.isdigit() and len(length) < 20 else None


def _problem_of_trailers(fields: list[tuple[bytes, bytes]]) -> str | None:
    if any(name.startswith(b":") for name, _ in fields):
        return "a pseudo-header field among trailers"
    return _problem_of_fields(fields)


def _problem(fields: list[tuple[bytes, bytes]], last: dict[bytes, bytes]) -> str | None:
    pseudo = [name for name, _ in fields if name.startswith(b":")]
    if [name for name, _ in fields[: len(pseudo)]] != pseudo:
        return "a pseudo-header field after others"
    if len(set(pseudo)) < len(pseudo) or not _PSEUDO.issuperset(pseudo):
        return "a pseudo-header field that is doubled or unknown"
    if b":method" not in last or not last.get(b":path") or b":scheme" not in last:
        return "a pseudo-header field is missing"
    length = last.get(b"content-length")
    if length is not None and (not length.isdigit() or len(length) >= 20):
        return "a content-length that is no number"
    return _problem_of_fields(fields)


def _problem_of_fields(fields: list[tuple[bytes, bytes]]) -> str | None:
    for name, value in fields:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            return "a field with letters that it must not have"
        if name in _OF_A_CONNECTION or (name == b"te" and value != b"trailers"):
            return "a field that is about the connection"
    return None


class HeaderBlocks:
    """Reads the header blocks of a connection.

    We allow no dynamic table, by a setting that holds once the peer has acknowledged it (``table_is_gone``).
    From then on a block means the same whenever it comes, so those that were decoded are remembered.
    """

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=MAX_LIST_BYTES)
        self._known: dict[bytes, RequestHead] = {}

    def table_is_gone(self) -> None:
        """Record that the peer knows that it may have no dynamic table."""
        self._decoder.max_allowed_table_size = 0

    def read(self, block: bytes) -> RequestHead:
        """Return the fields of a block; raises :exc:`~.frames.ConnectionViolation` if it is none."""
        known = self._known.get(block)
        if known is not None:
            return known
        before = self._decoder.header_table_size
        try:
            fields = self._decoder.decode(block, raw=True)
            head = RequestHead((bytes(name), bytes(value)) for name, value in fields)
        except (HPACKError, IndexError, ValueError) as error:
            large = "larger than" in str(error)
            code = ErrorCode.ENHANCE_YOUR_CALM if large else ErrorCode.COMPRESSION_ERROR
            raise ConnectionViolation(code, f"header block: {error}") from None
        if before == self._decoder.header_table_size == 0 and len(block) <= MAX_REMEMBERED_BYTES:
            if len(self._known) >= MAX_BLOCKS:
                self._known.clear()
            self._known[block] = head
        return head


class Assembly:
    """Puts together a header block that comes in several frames: HEADERS and CONTINUATION."""

    __slots__ = ("_block", "_frames", "flags", "stream_id")

    def __init__(self, stream_id: int, flags: int, block: bytes) -> None:
        self.stream_id = stream_id
        self.flags = flags
        self._block = bytearray(block)
        self._frames = 0

    def add(self, block: bytes) -> None:
        """Add the next frame's; raises :exc:`~.frames.ConnectionViolation` if it becomes too much."""
        self._block += block
        self._frames += 1
        if self._frames > MAX_CONTINUATIONS or len(self._block) > MAX_BLOCK_BYTES:
            raise ConnectionViolation(ErrorCode.ENHANCE_YOUR_CALM, "a header block is too long")

    def whole(self) -> bytes:
        """Return the block."""
        return bytes(self._block)


def write_block(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a block that means the same on every connection: literals, without a table."""
    return b"".join(b"\0" + _string(name) + _string(value) for name, value in fields)


def _string(value: bytes) -> bytes:
    size = len(value)
    if size < 127:
        return bytes((size,)) + value
    written, rest = bytearray((127,)), size - 127
    while rest > 127:
        written.append(rest & 0x7F | 0x80)
        rest >>= 7
    written.append(rest)
    return bytes(written) + value
