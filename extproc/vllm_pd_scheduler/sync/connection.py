"""One connection to a Valkey or Redis server, in its protocol RESP3.

Each message passes here, so it does no more than that. To send 100 messages a second and receive 400
takes it 9 ms of CPU a second; the asyncio clients `redis` and `valkey-glide` take 43. What comes is read by
hiredis, the parser in C that `redis` uses too.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis

from ..system.keepalive import keep_alive

TICK_S = 0.3
"""Seconds between two looks at whether the server answers."""
_SILENT_TICKS = 3
"""Looks at which nothing was heard, until the connection is given up. A standstill of ours is one look."""
_UNANSWERED_TICKS = 10
"""Looks at which something was heard, but no answer, until the connection is given up. So long after our last
message the others have forgotten us, as nothing of ours arrives."""
MAX_UNSENT = 1 << 20
"""Bytes that wait to be sent: more messages are dropped, as the server or the way to it is slow."""
MAX_ANSWER = 8 << 20
"""Bytes of an answer. The server of no replica has a longer one."""

TURN = 8
"""What is taken in at once of much that has come; then others have the event loop."""

_ECHO = " with args beginning with"
"""Before what an error quotes of our command: a server too old for HELLO would have the password said."""
_LONGEST_SAID = 300
"""Characters of an error that are said."""

_INCOMPLETE = object()
_UNREADABLE = hiredis.HiredisError, TypeError, MemoryError
"""What the parser raises: the last two at keys that Python cannot have, and at lists that fit nowhere."""
_CLOSED = "the server has closed the connection"
_NO_SERVER = "what answers there is no Valkey or Redis server"
_SUBSCRIBED = (b"subscribe", b"ssubscribe")


class Lost(Exception):
    """The connection is lost or cannot be made; the message says why."""


class Refused(Exception):
    """The server's answer is an error; the message is its own."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message.partition(" ")[0]
        """The first word, which says what kind of error it is."""


class Connection(asyncio.Protocol):
    """Commands with their answers, and what the server pushes by itself.

    ``pushed`` is called with the words of each push, ``lost`` once, with the reason, when nothing more comes.
    """

    def __init__(self, pushed: Callable[[list[Any]], None], lost: Callable[[str], None]) -> None:
        self.problem = ""
        """Why it is lost."""
        self._pushed = pushed
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._unread = 0
        """Bytes since something whole was read."""
        self._in_turns = False
        """Whether more has come than is taken in at once."""
        self._waiting: deque[asyncio.Future[Any] | None] = deque()
        """Who waits for the answers that are to come, in their order; nobody for that to a message."""
        self._heard = True
        self._silent = 0
        self._answered = True
        self._unanswered = 0
        self._timer: asyncio.TimerHandle | None = None

    # -- commands

    async def ask(self, *words: str | bytes) -> Any:
        """Send a command and return the answer; raise :exc:`Refused` or :exc:`Lost`."""
        if self._transport is None or self.problem:
            raise Lost(self.problem or "not connected")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        self._transport.write(hiredis.pack_command(words))  # type: ignore[arg-type]  # it takes any number
        return await answer

    def tell(self, command: bytes) -> bool:
        """Send a packed command whose answer matters only if it is an error, which ends the connection.

        Return ``False`` if it was dropped, as too much waits to be sent.
        """
        if self._transport is None or self.problem:
            return False
        if self._transport.get_write_buffer_size() + len(command) > MAX_UNSENT:
            return False
        self._waiting.append(None)
        self._transport.write(command)
        return True

    def close(self, problem: str = "closed") -> None:
        """End it at once, for a reason."""
        if self.problem:
            return
        self.problem = problem
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        waiting, self._waiting = self._waiting, deque()
        for answer in waiting:
            if answer is not None and not answer.done():
                answer.set_exception(Lost(problem))
        self._lost(problem)

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to look whether the server answers."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        if (made := transport.get_extra_info("socket")) is not None:
            keep_alive(made)
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        self._heard = True
        self._unread += len(data)
        try:
            self._reader.feed(data)
        except _UNREADABLE:
            self.close(_NO_SERVER)
        else:
            if not self._in_turns:
                self._read()

    def _read(self) -> None:
        """Take what has come, in turns with all else that happens: no more comes meanwhile."""
        for _ in range(TURN):
            try:
                what = self._reader.gets()
            except _UNREADABLE:
                self.close(_NO_SERVER)
            else:
                if what is _INCOMPLETE:
                    break
                self._unread = 0
                self._take(what)
            if self.problem:
                return
        else:
            self._pause(True)
            asyncio.get_running_loop().call_soon(self._go_on)
            return
        self._pause(False)
        if self._unread > MAX_ANSWER:
            self.close(f"an answer is longer than {MAX_ANSWER} bytes")

    def _go_on(self) -> None:
        if not self.problem:
            self._heard = True
            self._read()

    def _pause(self, pause: bool) -> None:
        if pause != self._in_turns and self._transport is not None:
            self._in_turns = pause
            (self._transport.pause_reading if pause else self._transport.resume_reading)()

    def connection_lost(self, error: Exception | None) -> None:
        """Note that it is lost."""
        self.close(_reason(error) if error is not None else _CLOSED)

    def _take(self, what: Any) -> None:
        if isinstance(what, hiredis.PushNotification) and (not what or what[0] not in _SUBSCRIBED):
            self._pushed(what)
            return
        if not self._waiting:
            # A server that ends a connection says why before: that it has too many, say.
            said = isinstance(what, hiredis.ReplyError)
            self.close(_said(what) if said else "an answer that nobody asked for")
            return
        self._answered = True
        answer = self._waiting.popleft()
        if answer is None:
            if isinstance(what, hiredis.ReplyError):
                self.close(f"a message is refused: {_said(what)}")
        elif answer.done():  # whoever asked waits no more
            pass
        elif isinstance(what, hiredis.ReplyError):
            answer.set_exception(Refused(_said(what)))
        else:
            answer.set_result(what)

    def _tick(self) -> None:
        if self._heard:
            self._heard, self._silent = False, 0
        else:
            self._silent += 1
            if self._silent >= _SILENT_TICKS:
                self.close(f"the server has not answered for {_SILENT_TICKS * TICK_S:.1f} s")
                return
        if self._answered or not self._waiting:
            self._answered, self._unanswered = False, 0
        else:
            self._unanswered += 1
            if self._unanswered >= _UNANSWERED_TICKS:
                seconds = _UNANSWERED_TICKS * TICK_S
                self.close(f"the server sends messages, but has answered nothing for {seconds:.0f} s")
                return
        if not self._waiting:
            self.tell(_PING)
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)


_PING = hiredis.pack_command(("PING",))


async def connect(
    address: tuple[str, int],
    tls: tuple[ssl.SSLContext, str] | None,
    pushed: Callable[[list[Any]], None],
    lost: Callable[[str], None],
    timeout_s: float,
) -> Connection:
    """Connect to an IP address and port, with TLS to a server of that name; raise :exc:`Lost`."""
    context, name = tls or (None, None)
    try:
        async with asyncio.timeout(timeout_s):
            _, made = await asyncio.get_running_loop().create_connection(
                lambda: Connection(pushed, lost), *address, ssl=context, server_hostname=name
            )
    except TimeoutError:
        if context is None:
            raise Lost(f"no connection within {timeout_s:g} s") from None
        raise Lost(f"no connection with TLS within {timeout_s:g} s: is it spoken at that port?") from None
    except OSError as error:
        raise Lost(_reason(error)) from None
    return made


def _said(error: hiredis.ReplyError) -> str:
    """Return an error as a line of a log can have it, without what it quotes of our command."""
    text = str(error).partition(_ECHO)[0].rstrip(",")[:_LONGEST_SAID]
    return "".join(each if each.isprintable() else "?" for each in text)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails: {(error.reason or 'no TLS is spoken there').replace('_', ' ').lower()}"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    if isinstance(error, ConnectionError) and not str(error):  # as uvloop has it of TLS
        return _CLOSED
    return str(error) or type(error).__name__
