"""Cuts what a client sends into frames, however it was cut on its way."""

from __future__ import annotations

from collections.abc import Iterator

from .frames import (
    DEFAULT_MAX_FRAME_BYTES,
    FRAME_HEADER_BYTES,
    PREFACE,
    ConnectionViolation,
    ErrorCode,
    read_frame_header,
)

Frame = tuple[int, int, int, bytes]
"""Type, flags, stream, payload."""


class FrameReader:
    """Keeps at most the beginning of one frame between two calls of ``read``."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._needed = len(PREFACE)
        """Bytes that ``_rest`` must have until there is something to read in it."""
        self._begun = False

    def read(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that are whole; raises :exc:`ConnectionViolation` at what cannot be one."""
        if self._rest:
            if len(self._rest) + len(data) < self._needed and self._begun:
                self._rest += data
                return
            data = b"".join((self._rest, data))
            self._rest.clear()
        at, end = 0, len(data)
        if not self._begun:
            if data[: len(PREFACE)] != PREFACE[:end]:
                raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "this is not HTTP/2")
            if end < len(PREFACE):
                self._rest += data
                return
            at, self._begun = len(PREFACE), True
        self._needed = FRAME_HEADER_BYTES
        while end - at >= FRAME_HEADER_BYTES:
            size, kind, flags, stream_id = read_frame_header(data, at)
            if size > DEFAULT_MAX_FRAME_BYTES:
                raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            start = at + FRAME_HEADER_BYTES
            if start + size > end:
                self._needed = FRAME_HEADER_BYTES + size
                break
            at = start + size
            yield kind, flags, stream_id, data[start:at]
        if at < end:
            self._rest += memoryview(data)[at:]


def unpadded(payload: bytes, padded: bool, skipped: int = 0) -> bytes:
    """Return what is in a frame that may be padded, without ``skipped`` bytes at its beginning."""
    first = int(padded) + skipped
    if len(payload) < first:
        raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, "a frame is too short")
    end = len(payload) - (payload[0] if padded else 0)
    if end < first:
        raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "more padding than frame")
    return payload[first:end]
