"""One stream of a connection: what each side may still send, and what we still have to."""

from __future__ import annotations

from collections import deque

MAX_FORGOTTEN = 10_000


class Stream:
    """Both directions of a stream. It is closed when both have ended, or one side has reset it."""

    __slots__ = (
        "answered",
        "content_length",
        "id",
        "owed",
        "peer_ended",
        "pending",
        "send_window",
        "trailers",
        "unread",
        "window",
    )

    def __init__(self, stream_id: int, window: int, send_window: int) -> None:
        self.id = stream_id
        self.window = window
        """Bytes that the peer may send."""
        self.owed = 0
        """Bytes that were read and not granted anew. Less than 0: granted in advance."""
        self.unread = 0
        """Bytes that have come and were not read."""
        self.peer_ended = False
        self.content_length: int | None = None
        """Bytes of content that must still come, if the peer has said so."""
        self.answered = False
        """Whether anything was sent on it."""
        self.send_window = send_window
        """Bytes that we may send; less than 0 when the peer has lowered its initial window."""
        self.pending: deque[memoryview] = deque()
        """Content that waits for the windows, or for the transport."""
        self.trailers: bytes | None = None
        """Header block that ends the stream after what is pending."""


class ForgottenStreams:
    """Those that are over for us and not for the peer: what still comes on them is dropped.

    Of more than ``MAX_FORGOTTEN`` the first ones are no longer known.
    """

    def __init__(self) -> None:
        self._ids: dict[int, None] = {}

    def __contains__(self, stream_id: int) -> bool:
        return stream_id in self._ids

    def add(self, stream_id: int) -> None:
        """Remember a stream."""
        if len(self._ids) >= MAX_FORGOTTEN:
            del self._ids[next(iter(self._ids))]
        self._ids[stream_id] = None

    def discard(self, stream_id: int) -> None:
        """Nothing more comes on a stream."""
        self._ids.pop(stream_id, None)
