"""Messages in a stream of bytes: each has a flag and its length before it."""

from __future__ import annotations

from .status import CallError, StatusCode

PREFIX_BYTES = 5


class TooLarge(CallError):
    """A message of ``size`` bytes is over the limit."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(
            StatusCode.RESOURCE_EXHAUSTED, f"a message of {size} bytes: at most {limit} are read"
        )
        self.size = size


class MessageReader:
    """Finds the messages in the content of one call.

    ``limit`` is the size of the largest one, in bytes. What is fed is not read further than to the end of the
    message that is asked for. ``consumed`` counts what was read, until somebody sets it back. Of a message
    that has not come whole, ``begun`` is the size, until somebody sets it back, and ``missing`` what it still
    needs.
    """

    __slots__ = ("_at", "_limit", "_message", "_unread", "begun", "consumed", "missing")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._unread = b""
        self._at = 0
        """Where the first message in ``_unread`` begins."""
        self._message: bytearray | None = None
        self.begun = 0
        self.missing = 0
        self.consumed = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is no part of a message."""
        return self._at == len(self._unread) and self._message is None

    def feed(self, data: bytes) -> None:
        """Add content."""
        if self._message is not None and self.missing:
            part = data if len(data) <= self.missing else data[: self.missing]
            at = len(self._message) - self.missing
            self._message[at : at + len(part)] = part
            self.missing -= len(part)
            self.consumed += len(part)
            data = data[len(part) :]
        if self._at < len(self._unread):
            data = self._unread[self._at :] + data
        self._unread, self._at = data, 0

    def take(self) -> bytes | bytearray | None:
        """Return the next message; ``None`` if it has not come.

        Raises :exc:`CallError` if it is compressed or too large.
        """
        if self._message is not None:
            if self.missing:
                return None
            message, self._message = self._message, None
            return message
        unread, start = self._unread, self._at + PREFIX_BYTES
        if len(unread) < start:
            return None
        size = int.from_bytes(unread[start - 4 : start], "big")
        self._check(unread[start - PREFIX_BYTES], size)
        end = start + size
        if len(unread) < end:
            self._begin(size, unread[start:])
            return None
        self.consumed += PREFIX_BYTES + size
        self._at = end
        if end == len(unread):
            self._unread, self._at = b"", 0
        return unread[start:end]

    def _check(self, flag: int, size: int) -> None:
        if flag == 1:
            raise CallError(StatusCode.UNIMPLEMENTED, "compressed messages are not read")
        if flag:
            raise CallError(StatusCode.INTERNAL, "a message has an unknown flag")
        if size > self._limit:
            raise TooLarge(size, self._limit)

    def _begin(self, size: int, first: bytes) -> None:
        """Read a message as it comes; ``first`` is what there is of it."""
        self.begun = size
        self._message = bytearray(size)  # one that grows would be moved again and again
        self._message[: len(first)] = first
        self.missing = size - len(first)
        self.consumed += PREFIX_BYTES + len(first)
        self._unread, self._at = b"", 0


def prefix(size: int) -> bytes:
    """Return what comes before a message of ``size`` bytes."""
    return b"\0" + size.to_bytes(4, "big")
