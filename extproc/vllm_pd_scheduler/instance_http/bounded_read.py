"""Read an instance's answer up to a limit: what it sends is bounded by us, never by it."""

from __future__ import annotations

import aiohttp


class AnswerTooLarge(aiohttp.ClientPayloadError):
    """An answer has more bytes than it may have; ``args[0]`` says how many that is, for people."""


class AnswerEncoded(aiohttp.ClientPayloadError):
    """An answer is compressed, which nobody asked for: a few bytes of it could be any number."""


async def read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Return the body of an answer, ``limit`` bytes at most. How long it may take is the caller's to say.

    Raises :exc:`AnswerTooLarge` and :exc:`AnswerEncoded`, both an :exc:`aiohttp.ClientError`, as are the
    errors of the connection; it is closed then, so that nothing more comes.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        response.close()
        raise AnswerEncoded(f"its encoding is {encoding[:40]!r}, where none was asked for")
    chunks: list[bytes] = []
    left = limit
    while left >= 0 and (chunk := await response.content.readany()):
        chunks.append(chunk)
        left -= len(chunk)
    if left < 0:
        response.close()
        raise AnswerTooLarge(f"it has more than {limit} bytes")
    return b"".join(chunks)
