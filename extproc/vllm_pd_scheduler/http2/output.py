"""What a connection has to send: control frames at once, content as the peer's windows allow."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from .budget import Budget
from .frames import (
    DATA,
    DEFAULT_MAX_FRAME_BYTES,
    DEFAULT_WINDOW_BYTES,
    ENABLE_PUSH,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    MAX_MAX_FRAME_BYTES,
    MAX_WINDOW_BYTES,
    ConnectionViolation,
    ErrorCode,
    StreamViolation,
    frame_header,
    headers_frame,
)
from .stream import Stream

MOST_FRAME_BYTES = 64 << 10
"""Frames that we send are no larger, whatever the peer allows: others wait for no longer than one takes."""

TURN_BYTES = 64 << 10
"""What one stream sends before it is another one's turn."""

MAX_HELD_FRAMES = 1000
"""Frames beside content that are kept for a peer that does not read. It can ask for as many as it likes."""

_EARNED_PER_BYTE = 1 / 4096


class Output:
    """The bytes to send, and the streams whose content waits for a window.

    While ``held`` is set, the transport takes nothing: content waits then too.
    """

    def __init__(self, budget: Budget) -> None:
        self.buffers: list[bytes | memoryview] = []
        self.held = False
        self.window = DEFAULT_WINDOW_BYTES
        self.initial_window = DEFAULT_WINDOW_BYTES
        self.max_frame = DEFAULT_MAX_FRAME_BYTES
        self._budget = budget
        self._held_frames = 0
        self._waiting: dict[int, Stream] = {}
        """Those that have content, and whose own windows are open."""

    def control(self, frame: bytes) -> None:
        """Add a frame that has no content."""
        self.buffers.append(frame)
        if self.held:
            self._held_frames += 1

    def hold(self, held: bool) -> None:
        """Say whether the transport takes nothing."""
        self.held = held
        self._held_frames = 0

    def require_read(self) -> None:
        """Raise :exc:`ConnectionViolation` if the peer does not read what it asks for."""
        if self._held_frames > MAX_HELD_FRAMES:
            raise ConnectionViolation(ErrorCode.ENHANCE_YOUR_CALM, "what was asked for is not read")

    def content(self, stream: Stream, parts: Sequence[bytes | memoryview]) -> bool:
        """Add content of a stream; return whether all of it can go now."""
        size = sum(map(len, parts))
        if (
            not stream.pending
            and size <= stream.send_window
            and size <= self.window
            and size <= self.max_frame
            and not self.held
        ):
            stream.send_window -= size
            self.window -= size
            self.buffers.append(frame_header(size, DATA, 0, stream.id))
            self.buffers.extend(parts)
            return True
        stream.pending.extend(memoryview(part) for part in parts if part)
        self._wait(stream)
        return False

    def end(self, stream: Stream, trailers: bytes) -> bool:
        """End a stream by a header block, after its content; return whether it can go now."""
        if stream.pending:
            stream.trailers = trailers
            return False
        self.control(headers_frame(stream.id, trailers, end_stream=True))
        return True

    def drop(self, stream: Stream) -> None:
        """Forget what a stream had to send."""
        stream.pending.clear()
        self._waiting.pop(stream.id, None)

    def pump(self, limit: int) -> list[Stream]:
        """Add up to about ``limit`` bytes of waiting content, from each stream in turn.

        Return the streams that have no more.
        """
        done: list[Stream] = []
        while limit > 0 and self.can_pump:
            stream = self._waiting.pop(next(iter(self._waiting)))
            limit -= self._send(stream, min(limit, TURN_BYTES))
            if not stream.pending:
                done.append(stream)
            else:
                self._wait(stream)
        return done

    @property
    def can_pump(self) -> bool:
        """Whether :meth:`pump` would send something."""
        return not self.held and self.window > 0 and bool(self._waiting)

    def _wait(self, stream: Stream) -> None:
        if stream.pending and stream.send_window > 0:
            self._waiting[stream.id] = stream

    def _send(self, stream: Stream, limit: int) -> int:
        """Add content of a stream that waits, frame by frame; return how many bytes."""
        total = 0
        while stream.pending and total < limit:
            size = min(self.window, stream.send_window, self.max_frame, limit - total)
            if size <= 0:
                break
            parts: list[memoryview] = []
            taken = 0
            while stream.pending and taken < size:
                part = stream.pending[0][: size - taken]
                taken += len(part)
                parts.append(part)
                if len(part) == len(stream.pending[0]):
                    stream.pending.popleft()
                else:
                    stream.pending[0] = stream.pending[0][len(part) :]
            self.buffers.append(frame_header(taken, DATA, 0, stream.id))
            self.buffers.extend(parts)
            self.window -= taken
            stream.send_window -= taken
            total += taken
        self._budget.earn(total * _EARNED_PER_BYTE)
        return total

    def widen(self, increment: int) -> None:
        """Let the connection send so many bytes more."""
        self.window += increment
        if self.window > MAX_WINDOW_BYTES:
            raise ConnectionViolation(ErrorCode.FLOW_CONTROL_ERROR, "the window is over 2^31-1")

    def widen_stream(self, stream: Stream, increment: int) -> None:
        """Let a stream send so many bytes more."""
        stream.send_window += increment
        if stream.send_window > MAX_WINDOW_BYTES:
            raise StreamViolation(stream.id, ErrorCode.FLOW_CONTROL_ERROR)
        self._wait(stream)

    def apply(self, settings: Iterable[tuple[int, int]], streams: Collection[Stream]) -> None:
        """Follow the peer's settings; raises :exc:`ConnectionViolation` at one that cannot be."""
        for name, value in settings:
            if name == INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW_BYTES:
                    raise ConnectionViolation(ErrorCode.FLOW_CONTROL_ERROR, f"a window of {value} bytes")
                self._set_initial_window(value, streams)
            elif name == MAX_FRAME_SIZE:
                if not DEFAULT_MAX_FRAME_BYTES <= value <= MAX_MAX_FRAME_BYTES:
                    raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"frames of {value} bytes")
                self.max_frame = min(value, MOST_FRAME_BYTES)
            elif name == ENABLE_PUSH and value > 1:
                raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH is {value}")

    def _set_initial_window(self, size: int, streams: Iterable[Stream]) -> None:
        """Move the windows of all streams."""
        change, self.initial_window = size - self.initial_window, size
        for stream in streams:
            stream.send_window += change
            if stream.send_window > MAX_WINDOW_BYTES:
                raise ConnectionViolation(ErrorCode.FLOW_CONTROL_ERROR, "a stream's window is over 2^31-1")
            self._wait(stream)
