"""The log of changes as a stream of a Valkey or Redis server, of which each change is the next or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .channel import START, Change, Overtaken, Position
from .connection import Connection, Refused
from .valkey_server import text_of

KEPT = 32
"""Changes that the log has at most. The newest has the whole state; those before it are for people."""
_NEWEST = """
local trim = redis.pcall('XTRIM', KEYS[1], 'MAXLEN', ARGV[1])
if type(trim) == 'table' and trim.err and string.find(trim.err, 'READONLY') then
  return redis.error_reply('READONLY it can only be read')
end
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
return newest[1] and newest[1][1] or ''"""
"""Says where the log ends. Trimming, which does nothing, shows whether the server has become a copy."""
_APPEND = """
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
if (newest[1] and newest[1][1] or '') ~= ARGV[1] then return '' end
local id = redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], '*', 'change', ARGV[3])
redis.call(ARGV[4], KEYS[2], '')
return id"""
"""Appends if nobody else has, and says so to all by an empty message."""


class ValkeyLog:
    """The log at a ``key``. Those who follow it hear of each change by an empty message at ``messages``.

    ``told`` gets what is new, in its order. One at a time may append or look.
    """

    def __init__(self, key: str, messages: bytes, told: Callable[[Change], None]) -> None:
        self._key = key
        self._messages = messages
        self._told = told
        self._known: Position = START

    async def append(self, connection: Connection, data: bytes, expected: Position, publish: str) -> Position:
        """Append a change that follows a position; raise :exc:`Refused`, :exc:`.Lost` or :exc:`.Overtaken`.

        ``publish`` is the command that tells it to all.
        """
        if expected != self._known:
            raise Overtaken
        words = ("EVAL", _APPEND, "2", self._key, self._messages)
        answer = await connection.ask(*words, expected, str(KEPT), data, publish)
        if not answer:
            await self.look(connection)
            raise Overtaken
        self._tell(text_of(answer), data)
        return self._known

    def _tell(self, position: Position, data: bytes) -> None:
        self._known = position
        self._told(Change(position, data))

    async def look(self, connection: Connection, first: bool = False) -> None:
        """Tell what is new in the log; raise :exc:`Refused` or :exc:`Lost`."""
        newest = text_of(await connection.ask("EVAL", _NEWEST, "1", self._key, str(KEPT)))
        if newest == START and (first or self._known != START):
            self._tell(START, b"")
        if newest == self._known:
            return
        entries = []
        if self._known != START or not first:
            begin = "-" if self._known == START else f"({self._known}"
            after = begin, "+", "COUNT", str(KEPT)
            entries = await connection.ask("XRANGE", self._key, *after)
        if not entries:  # we come new, or the server has lost what we know
            entries = await connection.ask("XREVRANGE", self._key, "+", "-", "COUNT", "1")
        for position, data in _changes(entries):
            self._tell(position, data)


def _changes(entries: Any) -> list[tuple[str, bytes]]:
    """Return the entries of a log; raise :exc:`.Refused` if they are none."""
    try:
        found = []
        for position, fields in entries:
            values = dict(zip(fields[::2], fields[1::2], strict=False))
            data = values.get(b"change", b"")
            found.append((text_of(position), data if isinstance(data, bytes) else b""))
    except (TypeError, ValueError):
        raise Refused("WRONGTYPE its entries are no changes") from None
    return found
