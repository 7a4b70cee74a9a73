"""Standard output and error by threads of their own: whoever prints or logs never waits for a reader.

A pipe that nobody reads (a log driver that is stuck, Ctrl-S in a terminal) blocks whoever writes to it. Here
that is a thread which does nothing else. What does not fit in its queue is dropped, counted, and said when
somebody reads again. Logging's own ``QueueListener`` would not do: it waits for its thread at exit.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Self, TextIO

log = logging.getLogger(__name__)

QUEUE_BYTES = 1 << 20
"""What an outlet keeps for a reader that is behind."""

CLOSE_S = 1.0
"""How long an outlet that is closed goes on to write what it has."""

_CHUNK_OVERHEAD = 64  # bytes that Python needs for a chunk itself


class Outlet:
    """Writes to a file descriptor from a thread of its own.

    ``on_dropped`` is called with the number of lines whenever some are dropped, by any thread.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.on_dropped: Callable[[int], None] = lambda lines: None
        self._fd = fd
        self._name = name
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: the process ends even while it is blocked.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, data: bytes) -> None:
        """Queue lines, or drop them if the reader is too far behind. Never blocks; from any thread."""
        with self._changed:
            size = len(data) + _CHUNK_OVERHEAD
            if self._size + size <= QUEUE_BYTES and not self._closed:
                self._chunks.append(data)
                self._size += size
                self._changed.notify()
                return
            lines = max(1, data.count(b"\n"))
            self._dropped += lines
        self.on_dropped(lines)

    def close(self) -> None:
        """Write what is left, for at most ``CLOSE_S`` seconds, and drop what comes from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._chunks and not self._closed:
                    self._changed.wait()
                if not self._chunks:
                    return
                data = self._chunks[0]
            try:
                self._write(data)
            except OSError:  # the terminal is gone, the disk is full: nothing can be said there either
                self.on_dropped(max(1, data.count(b"\n")))
            with self._changed:
                self._chunks.popleft()
                self._size -= len(data) + _CHUNK_OVERHEAD
                dropped = 0 if self._chunks else self._dropped
                self._dropped -= dropped
            if dropped:
                log.warning("%d lines of %s were dropped while nobody read it", dropped, self._name)

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:  # whoever gave us the descriptor made it so
                select.select([], [self._fd], [])


class _LineStream(io.TextIOBase):
    """What takes the place of ``sys.stdout`` or ``sys.stderr``: whole lines go to an outlet."""

    def __init__(self, outlet: Outlet, replaced: TextIO) -> None:
        self._outlet = outlet
        self._replaced = replaced
        self._line = ""
        self._lock = threading.RLock()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._replaced.encoding

    def fileno(self) -> int:
        return self._replaced.fileno()

    def isatty(self) -> bool:
        return self._replaced.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            lines, newline, self._line = (self._line + text).rpartition("\n")
            if newline:
                self._put(lines + newline)
        return len(text)

    def flush(self) -> None:
        with self._lock:
            line, self._line = self._line, ""
            if line:
                self._put(line)

    def _put(self, text: str) -> None:
        self._outlet.put(text.encode(self.encoding, "backslashreplace"))


class StandardStreams:
    """A ``with`` block in which ``sys.stdout`` and ``sys.stderr`` go through outlets.

    ``stdout`` and ``stderr`` are the outlets: one and the same if both lead to the same file, ``None`` for a
    stream without a file descriptor, which stays as it is.
    """

    def __init__(self) -> None:
        self.stdout: Outlet | None = None
        self.stderr: Outlet | None = None
        self._replaced = (sys.stdout, sys.stderr)

    def __enter__(self) -> Self:
        out, err = self._replaced
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stderr = Outlet(err.fileno(), "standard error")
        with contextlib.suppress(OSError, ValueError, AttributeError):
            same = self.stderr is not None and os.path.sameopenfile(out.fileno(), err.fileno())
            self.stdout = self.stderr if same else Outlet(out.fileno(), "standard output")
        if self.stdout is not None:
            out.flush()
            sys.stdout = _LineStream(self.stdout, out)
        if self.stderr is not None:
            sys.stderr = _LineStream(self.stderr, err)
        return self

    def __exit__(self, *_: object) -> None:
        for outlet, stream in ((self.stdout, sys.stdout), (self.stderr, sys.stderr)):
            if outlet is not None:
                stream.flush()
        sys.stdout, sys.stderr = self._replaced
        for outlet in self._outlets():
            outlet.close()

    def count_dropped(self, count: Callable[[int], None]) -> None:
        """Call ``count`` from now on with the number of lines whenever some are dropped."""
        for outlet in self._outlets():
            outlet.on_dropped = count

    def _outlets(self) -> set[Outlet]:
        return {outlet for outlet in (self.stdout, self.stderr) if outlet is not None}


def pour(fd: int, outlet: Outlet) -> threading.Thread:
    """Pass on whole lines from a pipe until its end, and close it; return the thread that does."""

    def run() -> None:
        line = b""
        with open(fd, "rb", buffering=0) as pipe:
            while data := pipe.read(1 << 16):
                lines, newline, line = (line + data).rpartition(b"\n")
                if newline:
                    outlet.put(lines + newline)
                elif len(line) > 1 << 16:
                    outlet.put(line)
                    line = b""
        if line:
            outlet.put(line + b"\n")

    thread = threading.Thread(target=run, name=f"pour-{fd}", daemon=True)
    thread.start()
    return thread
