"""As much of HTTP/1.1 as a benchmark needs, at as little cost: both ends are ours, so nothing is checked."""

import re

HEAD_END = b"\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
"""The end of a chunked message. No message of the benchmarks has these bytes in its content."""
CHUNKED = -1

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def content_length(head: bytes) -> int:
    """Return the length of the body that follows this head, or :data:`CHUNKED`."""
    found = _LENGTH.search(head)
    if found:
        return int(found[1])
    return CHUNKED if b"\r\ntransfer-encoding: chunked" in head.lower() else 0


def joined(chunks: bytes) -> bytes:
    """Return the content of a complete chunked body."""
    parts: list[bytes] = []
    at = 0
    while True:
        line_end = chunks.index(b"\r\n", at)
        size = int(chunks[at:line_end], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(chunks[line_end + 2 : line_end + 2 + size])
        at = line_end + 2 + size + 2


def head(first_line: str, **headers: object) -> bytes:
    """Return the head of a message; ``content_length=5`` is a header ``content-length: 5``."""
    lines = [first_line, *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + HEAD_END
