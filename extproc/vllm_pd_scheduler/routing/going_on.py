"""Requests for the rest of an answer that has broken off."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..request import headers as names
from ..request.api import APIS
from ..request.body import JsonBody
from ..request.errors import BodyError
from ..request.fingerprint import fingerprint
from .lost import LostPrompts


@dataclass(frozen=True, slots=True)
class Broken:
    """Where an answer has broken off."""

    decode: str
    """Id of the D that has failed it; empty if that is not known."""
    tokens: int
    """How many tokens its client has of it."""


class GoingOn:
    """Says which D has failed an answer whose rest is asked for, and after how much of it.

    The request for the rest has that in a header, with a ``key`` that no client knows: whichever of several
    schedulers chooses for it, if they have the key in common.
    """

    def __init__(self, lost: LostPrompts, clock: Callable[[], float]) -> None:
        self.key = secrets.token_hex(16)
        self._lost = lost
        self._clock = clock

    def marked(self, headers: Iterable[tuple[bytes, bytes]], broken: Broken) -> list[tuple[bytes, bytes]]:
        """Return headers of a request, with where the answer has broken off whose rest it asks for."""
        mark = f"{self.key} {broken.tokens} {broken.decode}".encode("latin-1")
        name = names.CONTINUES.encode("ascii")
        return [*(each for each in headers if each[0] != name), (name, mark)]

    def read(self, headers: Mapping[str, str]) -> Broken | None:
        """Return where the answer has broken off whose rest is asked for; ``None`` if none is."""
        mark = headers.get(names.CONTINUES)
        if mark is None:
            return None
        key, _, rest = mark.partition(" ")
        tokens, _, decode = rest.partition(" ")
        if not hmac.compare_digest(key.encode(), self.key.encode()) or not tokens.isdecimal():
            return None
        return Broken(decode, int(tokens[:18]))

    @staticmethod
    def prompt_of(path: str, body: bytes) -> int:
        """Return the fingerprint of a request's prompt, or 0."""
        try:
            return fingerprint(JsonBody.parse(body, APIS[path]))
        except BodyError:
            return 0

    def failed(self, prompt: int, instances: Iterable[str]) -> None:
        """Note that several D have failed one answer: its prompt may be why."""
        for each in instances:
            self._lost.lost(prompt, each, self._clock())
