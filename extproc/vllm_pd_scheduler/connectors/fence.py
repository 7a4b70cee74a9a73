"""Keeps what a connector raises, or returns by mistake, from those who ask it.

A connector may be code of the operator's. A request for which it fails is served whole by a D.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from ..models import InstanceRole
from ..request.body import JsonBody
from ..telemetry.failures import Failures
from .base import (
    MAX_TOKENS,
    NO_HEADERS,
    Abort,
    Connector,
    Handoff,
    Legs,
    Order,
    Peer,
    Question,
    Splice,
    Switch,
)

T = TypeVar("T")
Call = TypeVar("Call", Abort, Switch)

CHECKED_BYTES = 4096
"""Up to so many, what goes to an instance is checked to be JSON: that takes 4 µs at most. Longer texts of the
same connector come about as the short ones do."""


class _Object(msgspec.Struct):
    """Any JSON object: all fields are skipped."""


_check_object = msgspec.json.Decoder(_Object).decode
_CALLS = (
    "can_split", "order", "question", "understood", "invitation", "asked", "names_rank", "prefill_body",
    "prefill_headers", "handoff", "promised", "abort", "ended", "splice", "release_body",
    "can_pull", "needs_prefill",
)  # fmt: skip
_MOST_HEADERS = 16
_HEADER = re.compile(r"[a-z0-9-]{1,100}")
_PATH = re.compile(r"/[!-~]{0,1000}")
_RELEASE_PATH = Handoff(b"").release_path
_HEADER_VALUE = re.compile(r"[!-~]{0,1000}")


class ConnectorFailed(Exception):
    """A connector failed where nothing can stand for its answer. ``args[0]`` is the name of the call.

    It was counted and logged.
    """


def connector_failures() -> Failures:
    """Return what counts the failures of connectors."""
    return Failures("connector %s failed in %s()", "A decode instance serves such requests alone")


class ConnectorFence:
    """A connector whose calls raise nothing but :exc:`ConnectorFailed`, where they say so.

    What is no :exc:`Exception` (:exc:`KeyboardInterrupt`, a cancelled task) passes.
    """

    def __init__(self, connector: Connector, failures: Failures | None = None) -> None:
        self.failures = failures or connector_failures()
        """By the connector's class and the call."""
        self._connector: Any = connector
        self._name = type(connector).__name__
        for call in _CALLS:
            self.failures.expect(self._name, call)
        self.needs_prefill = self._says("needs_prefill")
        """See :attr:`Connector.needs_prefill`; ``False`` if it fails."""
        self.can_pull = self._says("can_pull")
        """See :attr:`Connector.can_pull`; ``False`` if it fails."""

    def _says(self, name: str) -> bool:
        with suppress(ConnectorFailed):
            return self._ask(name, lambda: bool(getattr(self._connector, name, False)))
        return False

    def can_split(self, body: JsonBody) -> bool:
        """See :meth:`Connector.can_split`; ``False`` if it fails."""
        with suppress(ConnectorFailed):
            return self._ask("can_split", lambda: bool(self._connector.can_split(body)))
        return False

    def order(self, prefill: Peer) -> Order:
        """See :meth:`Connector.order`; raise :exc:`ConnectorFailed` if it fails."""
        return self._ask("order", lambda: Order(self._connector.order(prefill)))

    def question(self, prefill: Peer) -> Question | None:
        """See :meth:`Connector.question`; raise :exc:`ConnectorFailed` if it fails."""
        return self._ask("question", lambda: _checked_question(self._connector.question(prefill)))

    def understood(self, answer: bytes, prefill: Peer) -> Any | None:
        """See :meth:`Connector.understood`; raise :exc:`ConnectorFailed` if it fails."""
        return self._ask("understood", lambda: self._connector.understood(answer, prefill))

    def names_rank(self, legs: Legs) -> bool:
        """See :meth:`Connector.names_rank`; raise :exc:`ConnectorFailed` if it fails."""
        return self._ask("names_rank", lambda: bool(self._connector.names_rank(legs)))

    def invitation(self, legs: Legs, url: str) -> Handoff:
        """See :meth:`Connector.invitation`; raise :exc:`ConnectorFailed` if it fails."""

        def ask() -> Handoff:
            found = _checked_handoff(self._connector.invitation(legs, url))
            if found is None:
                raise TypeError("it returned None in place of a Handoff")
            return found

        return self._ask("invitation", ask)

    def asked(self, call: bytes, legs: Legs) -> Any | None:
        """See :meth:`Connector.asked`; raise :exc:`ConnectorFailed` if it fails."""
        return self._ask("asked", lambda: self._connector.asked(call, legs))

    def prefill_body(self, body: JsonBody, legs: Legs) -> bytes | None:
        """See :meth:`Connector.prefill_body`; raise :exc:`ConnectorFailed` if it fails."""

        def ask() -> bytes | None:
            return _checked_prefill(self._connector.prefill_body(body, legs), body)

        return self._ask("prefill_body", ask)

    def prefill_headers(self, legs: Legs) -> Mapping[str, str]:
        """See :meth:`Connector.prefill_headers`; raise :exc:`ConnectorFailed` if it fails."""
        return self._ask("prefill_headers", lambda: _checked_headers(self._connector.prefill_headers(legs)))

    def handoff(self, answer: bytes, legs: Legs) -> Handoff | None:
        """See :meth:`Connector.handoff`; raise :exc:`ConnectorFailed` if it fails.

        That is not ``None``, which says that P has failed.
        """
        return self._ask("handoff", lambda: _checked_handoff(self._connector.handoff(answer, legs)))

    def promised(self, legs: Legs) -> Handoff | None:
        """See :meth:`Connector.promised`; raise :exc:`ConnectorFailed` if it fails."""
        return self._ask("promised", lambda: _checked_handoff(self._connector.promised(legs)))

    def abort(self, legs: Legs) -> Abort | None:
        """See :meth:`Connector.abort`; ``None`` if it fails."""
        with suppress(ConnectorFailed):
            return self._ask("abort", lambda: _checked_call(self._connector.abort(legs), Abort))
        return None

    def switch(self, role: InstanceRole) -> Switch | None:
        """See :meth:`Connector.switch`; raise :exc:`ConnectorFailed` if it fails."""
        return self._ask("switch", lambda: _checked_call(self._connector.switch(role), Switch))

    def ended(self, answer: bytes) -> bool:
        """See :meth:`Connector.ended`; raise :exc:`ConnectorFailed` if it fails."""
        return self._ask("ended", lambda: bool(self._connector.ended(answer)))

    def splice(self, body: JsonBody, handoff: Handoff) -> Splice | None:
        """See :meth:`Connector.splice`; raise :exc:`ConnectorFailed` if it fails."""
        return self._ask("splice", lambda: _checked_splice(self._connector.splice(body, handoff), body))

    def release_body(self, handoff: Handoff, model: str | None) -> bytes | None:
        """See :meth:`Connector.release_body`; ``None`` if it fails: the hand-off is left to its lease."""
        with suppress(ConnectorFailed):
            return self._ask("release_body", lambda: _checked_release(self._connector, handoff, model))
        return None

    def _ask(self, call: str, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except Exception as error:  # someone else's code, which may raise anything
            self.failures.add(self._name, call, self._connector, error)
            raise ConnectorFailed(call) from None


def _checked_question(question: Any) -> Question | None:
    if question is None:
        return None
    if not isinstance(question, Question):
        raise TypeError(f"it returned {type(question).__name__} in place of a Question")
    if not (isinstance(question.port, int) and 0 < question.port < 1 << 16):
        raise ValueError("it returned a port that does not exist")
    if question.path is not None and not _PATH.fullmatch(question.path):
        raise ValueError("it returned a path that cannot be sent")
    return question


def _checked_call(call: Any, kind: type[Call]) -> Call | None:
    if call is None:
        return None
    if not isinstance(call, kind):
        raise TypeError(f"it returned {type(call).__name__} in place of {kind.__name__}")
    if not _PATH.fullmatch(call.path):
        raise ValueError("it returned a path that cannot be sent")
    _checked_body(call.body, f"{kind.__name__}.body")
    return call


def _checked_body(body: Any, what: str = "") -> bytes:
    """Return bytes that are not empty; ``what`` is the field that has them, if it is no answer itself."""
    if isinstance(body, bytes) and body:
        return body
    found = "empty" if body == b"" else type(body).__name__
    if what:
        raise TypeError(f"{what} is {found} in place of bytes that are not empty")
    raise TypeError(f"it returned {found} in place of bytes that are not empty")


def _checked_prefill(made: Any, body: JsonBody) -> bytes | None:
    if made is None:
        return None
    checked = _checked_body(made)
    if len(checked) <= CHECKED_BYTES and body.walked is None:  # else the client's may have a NaN, say
        _check_object(checked)
    return checked


def _checked_release(connector: Any, handoff: Handoff, model: str | None) -> bytes | None:
    body = connector.release_body(handoff, model)
    if body is None:
        return None
    checked = _checked_body(body)
    _check_object(checked)  # D would refuse what is no JSON too, and P free nothing
    return checked


def _checked_handoff(handoff: Any) -> Handoff | None:
    if handoff is None:
        return None
    if not isinstance(handoff, Handoff):
        raise TypeError(f"it returned {type(handoff).__name__} in place of a Handoff")
    for what, text in (("params", handoff.params), ("token_ids", handoff.token_ids)):
        if text != b"":
            _checked_body(text, f"Handoff.{what}")
    _checked_headers(handoff.headers)
    lease = handoff.lease
    if lease is not None and not (isinstance(lease, int | float) and lease > 0):
        raise ValueError("it returned a lease that makes no sense")
    if handoff.release_path is not _RELEASE_PATH and not _PATH.fullmatch(handoff.release_path):
        raise ValueError("it returned a path that cannot be sent")
    if not isinstance(handoff.protocol, str):
        raise TypeError(f"it returned {type(handoff.protocol).__name__} in place of a protocol's name")
    for tokens in (handoff.prompt_tokens, handoff.cached_tokens):
        if tokens is not None and not (isinstance(tokens, int) and 0 <= tokens <= MAX_TOKENS):
            raise ValueError("it returned a number of tokens that makes no sense")
    return handoff


def _checked_headers(given: Any) -> Mapping[str, str]:
    headers: Mapping[str, str] = given
    if headers is NO_HEADERS:
        return NO_HEADERS
    if not isinstance(headers, Mapping) or len(headers) > _MOST_HEADERS:
        raise TypeError(f"it returned {type(headers).__name__} in place of a few headers")
    for name, value in headers.items():
        if not (_HEADER.fullmatch(name) and _HEADER_VALUE.fullmatch(value)):
            raise ValueError("it returned a header that cannot be sent")
    return headers


def _checked_splice(splice: Any, body: JsonBody) -> Splice | None:
    if splice is None:
        return None
    if not isinstance(splice, Splice):
        raise TypeError(f"it returned {type(splice).__name__} in place of a Splice")
    if not isinstance(splice.at, int) or not 0 < splice.at <= len(body.raw):
        raise ValueError("it returned an offset that is not within the body")
    _checked_body(splice.text, "Splice.text").decode()
    if len(splice.text) <= CHECKED_BYTES:
        _check_tail(splice, body)
    return splice


def _check_tail(splice: Splice, body: JsonBody) -> None:
    """Raise :exc:`msgspec.DecodeError` if the body would be no JSON object with a splice.

    Its beginning is one, so a shorter one stands for it, if nothing but the last brace is replaced.
    """
    end, empty = body.end()
    if splice.at == end:
        _check_object((b"{" if empty else b'{"":0') + splice.text)
    elif len(body.raw) <= CHECKED_BYTES and body.walked is None:
        _check_object(splice.into(body.raw))
