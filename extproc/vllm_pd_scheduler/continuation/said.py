"""What an instance has said of an answer, and how another one's words become the rest of it."""

from __future__ import annotations

import re
from array import array
from typing import Any, Final

import msgspec

from .asked import CHAT, Asked

MAX_TOKENS: Final = 1 << 17
"""Of prompt and answer together, eight bytes each. A longer answer is cut as ever when its D dies."""

MAX_EVENT_BYTES: Final = 4 << 20
"""An answer with a longer event is cut. The first has the prompt's token ids, before they are taken out."""

UNREAD_BYTES: Final = 1 << 16
"""So many bytes of an answer are kept as they came: they are read when it breaks off, or grows."""

DONE: Final = b"data: [DONE]\n\n"

_DONE: Final = DONE.rstrip()
_ERROR: Final = b'"error"'
"""Never a part of a text either."""
_IDS: Final = re.compile(rb',"(?:prompt_)?token_ids":(?:null|\[[0-9, ]*\])')
"""Never a part of a text: there, a quote has a backslash before it."""


class _Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    prompt_token_ids: list[int] | None = None
    usage: dict[str, Any] | None = None
    error: Any = None


_EVENT: Final = msgspec.json.Decoder(_Event)
NONSENSE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError)
"""What reading JSON raises that an instance has made up."""
_NO_REST: Final = (*NONSENSE, AttributeError, TypeError, ValueError)


class Said:
    """What has come of one answer. Holds token ids, and the last 64 KiB of events as they came.

    An event is read one by one only until the answer has begun, or if it may be an error: else it is no more
    than bytes that are passed on, as long as nothing breaks off.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.began = False
        """Whether any event has gone to the client: none has before the first with words. Until then another
        instance can be asked as this one was, so it need not be known what has come of thoughts or calls."""
        self.lost = False
        """Whether the answer cannot go on: something has come that no other instance could go on with."""
        self.error = b""
        """The event by which the instance has said that it failed."""
        self.lost_by: str | None = None
        """The second D, once it has begun with the rest."""
        self.done = False
        self.finish: str | None = None
        self.usage: dict[str, Any] | None = None
        self._first: dict[str, Any] = {}
        self._prompt: array[int] | None = None
        self._ids = array("q")
        self._whole = 0
        self._last = 0
        self._begun = b""
        self._held = b""
        self._unread: list[bytes] = []
        self._unread_bytes = 0

    @property
    def whole(self) -> int:
        """Answered tokens whose text is with the client as a whole.

        The text of those after them is not: they make no whole character yet, or none. They are written
        again.
        """
        return self._whole

    @property
    def doubtful(self) -> list[int]:
        """The last tokens, if some of them may be such: the last event had several, and text."""
        several = self._last > 1 and self._whole == len(self._ids)
        return self._ids[-max(self._last, 24) :].tolist() if several else []

    def end_before(self, tokens: int) -> None:
        """Take it that the text of so many of the last tokens is not with the client."""
        self._whole -= tokens

    def ids(self) -> list[int] | None:
        """Return the tokens of the prompt and of the answer so far; ``None`` if they are not known."""
        if self.lost or self._prompt is None:
            return None
        if self.asked.shows_ids and self._whole < len(self._ids):
            return None  # the client has ids that would be written again
        return self._prompt.tolist() + self._ids[: self._whole].tolist()

    def prompt_tokens(self) -> int:
        """Return how many tokens the prompt has."""
        return 0 if self._prompt is None else len(self._prompt)

    def take(self, data: bytes) -> bytes:
        """Take what has come next; return what of it is for the client: whole events.

        Raise :exc:`ValueError` if an event is too long. After an ``error`` nothing more is wanted.
        """
        data = self._begun + data if self._begun else data
        end = data.rfind(b"\n\n") + 2
        if end < 2:
            end = 0
            if len(data) > MAX_EVENT_BYTES:
                self.lost = True
                raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        self._begun = data[end:]
        events = data[:end]
        if not self.began or _ERROR in events:
            events = self._each(events)
        elif events:
            self._unread.append(events)
            self._unread_bytes += len(events)
            if self._unread_bytes > UNREAD_BYTES:
                self.read()
            self.done = events.endswith(DONE)
        return events if self.asked.shows_ids else _IDS.sub(b"", events)

    def read(self) -> None:
        """Read what has not been read yet."""
        events, self._unread, self._unread_bytes = b"".join(self._unread), [], 0
        for event in events.split(b"\n\n")[:-1]:
            self._note(event)

    def _each(self, events: bytes) -> bytes:
        """Read events one by one; return those before an error of the instance's."""
        self.read()
        passed, self._held = self._held, b""
        for event in events.split(b"\n\n")[:-1]:
            self._note(event)
            if self.error:
                break
            passed += event + b"\n\n"
        if self.done or len(passed) > UNREAD_BYTES:
            self._begins()
        if not self.began:
            self._held, passed = passed, b""
        return passed

    def _begins(self) -> None:
        self.began = True
        self.asked.body = b""

    def _note(self, event: bytes) -> None:
        """Take the next event of the answer: a whole one."""
        if not event.startswith(b"data: {"):
            self.done = self.done or event.startswith(_DONE)
            return
        try:
            read = _EVENT.decode(event[6:])
        except NONSENSE:
            self.lost = True
            return
        if read.error is not None and _is_the_instances(read.error):
            self.error = event + b"\n\n"
            return
        self._first = self._first or _head(event)
        if not read.choices:
            self.usage = read.usage or self.usage
            return
        choice = read.choices[0]
        self.finish = choice.finish_reason or self.finish
        if self.lost:
            return
        prompt = read.prompt_token_ids or choice.prompt_token_ids
        try:
            if prompt is not None and self._prompt is None:
                self._prompt = array("q", prompt)
            self._take(choice)
        except NONSENSE:
            self.lost = True

    def _take(self, choice: _Choice) -> None:
        delta = choice.delta or {}
        text = choice.text if choice.delta is None else delta.get("content")
        ids = choice.token_ids
        others = any(value for name, value in delta.items() if name not in ("role", "content"))
        if not self.began and (text or others or choice.finish_reason):
            self._begins()
        if others or choice.index or (text and not ids):
            self.lost = True
        elif ids:
            self._ids.extend(ids)
            self._last = len(ids)
            if text:
                self._whole = len(self._ids)
            if self.prompt_tokens() + len(self._ids) > MAX_TOKENS:
                self.lost = True
        if self.lost:
            self._prompt, self._ids = None, array("q")

    def rest_begins(self) -> None:
        """Take it that what comes now is another instance's."""
        self._begun = self._held = self.error = b""
        if not self.began:
            self.lost, self._first, self._ids, self._last = False, {}, array("q"), 0

    def take_rest(self, data: bytes) -> bytes:
        """Take what has come of the rest; return it as the client gets it.

        Raise :exc:`ValueError` for what cannot be the rest.
        """
        *events, self._begun = (self._begun + data).split(b"\n\n")
        if len(self._begun) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        try:
            return b"".join(map(self._goes_on, events))
        except _NO_REST as error:
            raise ValueError(f"no event of a completion: {error}") from None

    def _goes_on(self, event: bytes) -> bytes:
        """Return an event of the completion that is the rest, as one of this answer."""
        if not event.startswith(b"data: {"):
            self.done = self.done or event.startswith(_DONE)
            return event + b"\n\n"
        read = msgspec.json.decode(event[6:])
        if self.error:
            return b""
        if not isinstance(read, dict) or "error" in read:
            self.error = event + b"\n\n"
            return b""
        choices = read.get("choices") or []
        usage = read.get("usage")
        if isinstance(usage, dict):
            read["usage"] = self.usage_with(int(usage.get("completion_tokens", 0)))
            self.usage = self.usage if choices else read["usage"]
        for choice in choices:
            self.finish = choice.get("finish_reason") or self.finish
            if not self.asked.shows_ids:
                choice.pop("token_ids", None)
            choice.pop("prompt_token_ids", None)
            if self.asked.path == CHAT:
                choice["delta"] = {"content": choice.pop("text", "")}
        return _event({**read, **self._first, "choices": choices})

    def usage_with(self, more: int) -> dict[str, int]:
        """Return the usage of an answer of which ``more`` tokens are another instance's."""
        prompt, answered = self.prompt_tokens(), self._whole + more
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + answered,
            "completion_tokens": answered,
        }

    def ending(self) -> bytes:
        """Return what is missing of an answer whose last token has come."""
        end = b""
        if self.finish is None:
            text: dict[str, Any] = {"delta": {}} if self.asked.path == CHAT else {"text": ""}
            choice = {"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None} | text
            end += _event({**self._first, "choices": [choice]})
        if self.asked.usage and self.usage is None:
            self._whole = len(self._ids)
            end += _event({**self._first, "choices": [], "usage": self.usage_with(0)})
        return end + DONE


def _is_the_instances(error: Any) -> bool:
    code = error.get("code") if isinstance(error, dict) else None
    return not isinstance(code, int) or code >= 500


def _head(event: bytes) -> dict[str, Any]:
    """Return what all events of an answer have in common."""
    read = msgspec.json.decode(event[6:])
    return {name: value for name, value in read.items() if name in ("id", "object", "created", "model")}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
