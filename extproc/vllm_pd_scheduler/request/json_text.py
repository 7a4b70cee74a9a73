"""JSON text, walked without building what it says, in steps between which other work can be done.

Nothing is kept but where values begin and end, so reading a body takes no memory of its own, and the time
between two steps has a limit that no text can exceed: about a millisecond. Values inside others are skipped
by their quotes and brackets alone. Whether they are valid is left to the instance, which parses them anyway.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from itertools import accumulate
from typing import NamedTuple, TypeVar

import msgspec

T = TypeVar("T")

Steps = Generator[None, None, T]
"""Work that returns a result and stops now and then for others: drive it with ``yield from``, or
:func:`finish` where nothing else waits."""

AT_ONCE_BYTES = 1 << 15
"""Text up to this size is decoded in one step; longer text is walked in many."""

BOM = b"\xef\xbb\xbf"

STEP_BYTES = 1 << 14
"""Bytes that are read between two steps. The dearest text takes 80 ns a byte."""

MAX_DEPTH = 200
"""Levels of nesting that a body may have; vLLM's own parser recurses. Chat requests need about ten."""

MAX_MEMBERS = 4096
"""Members of an object whose keys are looked at. vLLM has about a hundred fields."""

_ITEM_BYTES = 256
"""What looking at one item costs, in bytes of text that is only skipped."""
_FIRST_WINDOW = 64
_WINDOW_GROWTH = 4
_NARROWING = 16
_FEW = 100
_LONGEST_KEY = 256
_SCALAR_BYTES = 1 << 13

_SPACE = re.compile(rb"[ \t\r\n]*")
# As Python's json reads them, which is vLLM's parser: NaN and the infinities are numbers to it.
_SCALAR = re.compile(
    rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?(?![-+.0-9a-zA-Z])"
    rb"|(?:true|false|null|NaN|-?Infinity)(?![-+.0-9a-zA-Z])"
)
_BRACKET = re.compile(rb"[\[\]{}]")
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""Brackets as +1 and -1, as signed bytes."""
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))

_decode_key = msgspec.json.Decoder(str).decode


class Malformed(ValueError):
    """The text is not JSON; the message says what is wrong where."""


class TooDeep(ValueError):
    """Arrays and objects are nested more deeply than is allowed."""


class TooMany(ValueError):
    """An object has more than :data:`MAX_MEMBERS` members."""


class Value(NamedTuple):
    """A value and the text that it is part of."""

    text: bytes
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes of the value's own text."""
        return self.end - self.start

    @property
    def first(self) -> bytes:
        """The first byte, which tells the type."""
        return self.text[self.start : self.start + 1]

    def copy(self) -> bytes:
        """Return the value's own text."""
        return self.text[self.start : self.end]


class Member(NamedTuple):
    """A member of an object. ``start`` is where its key is; one that is too long or malformed is ``None``."""

    key: str | None
    start: int
    value: Value


def finish(steps: Steps[T]) -> T:
    """Do all steps at once and return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


class JsonText:
    """A walk through ``text``. Offsets are those of its bytes.

    Where a method is an iterator, ``None`` among its items is a step. All raise :exc:`Malformed`.
    """

    __slots__ = ("_left", "at", "text")

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.at = 0
        """Where the array or object ended that was iterated last."""
        self._left = STEP_BYTES

    def spend(self, size: int) -> bool:
        """Count ``size`` more bytes as read; whether it is time for a step."""
        self._left -= size
        if self._left > 0:
            return False
        self._left = STEP_BYTES
        return True

    def space(self, at: int) -> Steps[int]:
        """Return where the white space at ``at`` ends."""
        while True:
            found = _SPACE.match(self.text, at, at + STEP_BYTES)
            end = found.end() if found else at
            if self.spend(end - at):
                yield
            if end - at < STEP_BYTES:
                return end
            at = end

    def skip(self, at: int, levels: int = MAX_DEPTH) -> Steps[int]:
        """Return where the value at ``at`` ends.

        Raises :exc:`TooDeep` if it has more than ``levels`` levels of arrays and objects.
        """
        first = self.text[at : at + 1]
        if first == b'"':
            return (yield from self._string(at + 1))
        if first in (b"[", b"{"):
            return (yield from self._container(at, levels))
        scalar = _SCALAR.match(self.text, at, at + _SCALAR_BYTES)
        if scalar is None:
            raise Malformed(f"no value at byte {at}")
        if scalar.end() - at == _SCALAR_BYTES:
            raise Malformed(f"a number of more than {_SCALAR_BYTES} bytes at byte {at}")
        return scalar.end()

    def elements(self, at: int, levels: int = MAX_DEPTH) -> Iterator[Value | None]:
        """Yield the elements of the array at ``at``; ``levels`` as of :meth:`skip`, the array included."""
        start = yield from self.space(at + 1)
        while self.text[start : start + 1] != b"]":
            end = yield from self.skip(start, levels - 1)
            yield Value(self.text, start, end)
            start = yield from self._next(end, b"]")
            if self.spend(_ITEM_BYTES):
                yield None
        self.at = start + 1

    def members(self, at: int, levels: int = MAX_DEPTH) -> Iterator[Member | None]:
        """Yield the members of the object at ``at``; ``levels`` as of :meth:`skip`, the object included.

        Raises :exc:`TooMany`.
        """
        text, left = self.text, MAX_MEMBERS
        start = yield from self.space(at + 1)
        while text[start : start + 1] != b"}":
            if not left:
                raise TooMany
            left -= 1
            if text[start : start + 1] != b'"':
                raise Malformed(f"no key at byte {start}")
            end = yield from self._string(start + 1)
            colon = yield from self.space(end)
            if text[colon : colon + 1] != b":":
                raise Malformed(f"no colon at byte {colon}")
            value = yield from self.space(colon + 1)
            after = yield from self.skip(value, levels - 1)
            key = _key(text[start:end]) if end - start <= _LONGEST_KEY else None
            yield Member(key, start, Value(text, value, after))
            start = yield from self._next(after, b"}")
            if self.spend(_ITEM_BYTES):
                yield None
        self.at = start + 1

    def _next(self, at: int, close: bytes) -> Steps[int]:
        """Return where the item after the one that ends at ``at`` begins, or ``close`` is."""
        text = self.text
        at = yield from self.space(at)
        found = text[at : at + 1]
        if found == close:
            return at
        if found != b",":
            raise Malformed(f"neither a comma nor {close.decode()} at byte {at}")
        at = yield from self.space(at + 1)
        if text[at : at + 1] == close:
            raise Malformed(f"nothing after the comma before byte {at}")
        return at

    def _string(self, at: int) -> Steps[int]:
        """Return where the string ends whose first letter is at ``at``, its quote included."""
        size = _FIRST_WINDOW
        while at < len(self.text):
            parts, read = self._split(at, size)
            ended = len(parts) > 1
            if self.spend(len(parts[0]) if ended else read):
                yield
            if ended:
                return at + len(parts[0]) + 1
            at += read
            size = min(size * _WINDOW_GROWTH, STEP_BYTES)
        raise Malformed(f"a string has no end at byte {at}")

    def _container(self, at: int, levels: int) -> Steps[int]:
        """Return where the array or object at ``at`` ends."""
        depth = inside = 0
        size, largest = _FIRST_WINDOW, STEP_BYTES
        while at < len(self.text):
            parts, read = self._split(at, size)
            steps = b"".join(parts[inside::2]).translate(_STEPS, _NO_BRACKETS)
            opened = steps.count(1)
            closed = len(steps) - opened
            if depth + opened > levels or closed >= depth:
                reached = list(accumulate(memoryview(steps).cast("b"), initial=depth))[1:]
                last = reached.index(0) if 0 in reached else None
                if max(reached[:last], default=0) > levels:
                    raise TooDeep
                if last is not None and (len(parts) + last <= _FEW or size <= _FIRST_WINDOW):
                    return at + _bracket(parts, inside, last) + 1
                if last is not None:  # it ends in this window: come closer
                    size = largest = size // _NARROWING
                    continue
            if self.spend(read):
                yield
            inside ^= len(parts) + 1 & 1
            depth += opened - closed
            at += read
            size = min(size * _WINDOW_GROWTH, largest)
        raise Malformed(f"an array or object has no end at byte {at}")

    def _split(self, at: int, size: int) -> tuple[list[bytes], int]:
        """Return about ``size`` bytes from ``at`` on, split at the quotes of strings, and how many they are.

        No escape is cut in two.
        """
        window = self.text[at : at + size]
        if window.endswith(b"\\") and len(window) - len(window.rstrip(b"\\")) & 1:
            window = window[:-1]
            if not window:
                raise Malformed(f"an escape has no end at byte {at}")
        return _between_quotes(window), len(window)


def depth(text: bytes) -> int:
    """Return how many levels of arrays and objects valid JSON has; all of it is read in one step."""
    steps = b"".join(_between_quotes(text)[::2]).translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0)


def is_deeper(text: bytes, levels: int) -> bool:
    """Whether valid JSON has more levels of arrays and objects. Few brackets are quick."""
    return text.count(b"[") + text.count(b"{") > levels and depth(text) > levels


def _between_quotes(text: bytes) -> list[bytes]:
    """Split text at the quotes of strings: what is inside one and what is outside take turns."""
    if b'"' not in text:
        return [text]
    parts = text.split(b'"')
    many = len(parts) > _FEW
    if b"\\" in text and (many or any(part.endswith(b"\\") for part in parts[:-1])):
        parts = text.replace(b"\\\\", b"__").replace(b'\\"', b"__").split(b'"')
    return parts


def _key(text: bytes) -> str | None:
    try:
        return _decode_key(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # a lone surrogate, say


def _bracket(parts: list[bytes], inside: int, number: int) -> int:
    """Return the offset of a bracket, counted from 0, in a window that its quotes have split."""
    at = 0
    for index, part in enumerate(parts):
        if index & 1 == inside:
            count = len(part.translate(None, _NO_BRACKETS))
            if number < count:
                return at + next(m.start() for n, m in enumerate(_BRACKET.finditer(part)) if n == number)
            number -= count
        at += len(part) + 1
    raise AssertionError("the bracket was counted before")
