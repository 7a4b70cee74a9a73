"""What the peer may send: windows that grow as what came is read, and no sooner."""

from __future__ import annotations

from .frames import (
    DEFAULT_WINDOW_BYTES,
    ConnectionViolation,
    ErrorCode,
    StreamViolation,
    window_update_frame,
)
from .output import Output
from .stream import Stream

STREAM_WINDOW_BYTES = 256 << 10
"""What a peer may send on a stream before somebody reads it."""

CONNECTION_WINDOW_BYTES = 16 << 20
"""What it may send on all streams of a connection together."""


class Credit:
    """The receive windows of a connection and of its streams. Updates are for half a window."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._window = CONNECTION_WINDOW_BYTES
        self._owed = 0
        output.control(window_update_frame(0, CONNECTION_WINDOW_BYTES - DEFAULT_WINDOW_BYTES))

    def take(self, size: int) -> None:
        """Count content that has come, on whatever stream."""
        self._window -= size
        if self._window < 0:
            raise ConnectionViolation(ErrorCode.FLOW_CONTROL_ERROR, "more was sent than the window")

    def take_on(self, stream: Stream, size: int) -> None:
        """Count content that has come on a stream, and was not read yet."""
        stream.window -= size
        stream.unread += size
        if stream.window < 0:
            raise StreamViolation(stream.id, ErrorCode.FLOW_CONTROL_ERROR)

    def give(self, size: int) -> None:
        """Give the connection's window back what was read, or dropped."""
        self._owed += size
        if self._owed >= CONNECTION_WINDOW_BYTES // 2:
            self._output.control(window_update_frame(0, self._owed))
            self._window += self._owed
            self._owed = 0

    def give_on(self, stream: Stream, size: int) -> None:
        """Give both windows back what was read on a stream."""
        stream.unread -= size
        self.give(size)
        if stream.peer_ended:
            return
        stream.owed += size
        if stream.owed >= STREAM_WINDOW_BYTES // 2:
            self._output.control(window_update_frame(stream.id, stream.owed))
            stream.window += stream.owed
            stream.owed = 0

    def expect(self, stream: Stream, size: int) -> None:
        """Let the peer send ``size`` bytes on a stream at once: somebody takes them as they come."""
        more = size - stream.window
        if more > 0 and not stream.peer_ended:
            self._output.control(window_update_frame(stream.id, more))
            stream.window += more
            stream.owed -= more
