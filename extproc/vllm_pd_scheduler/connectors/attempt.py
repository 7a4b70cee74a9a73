"""One attempt to split a request, by the connector of the P that was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ..request.body import JsonBody
from .base import Abort, Handoff, Legs, Order, Peer, Question, Splice
from .fence import ConnectorFailed, ConnectorFence


class Attempt(Struct, frozen=True, gc=False):
    """A connector's words for one attempt; each call raises :exc:`.fence.ConnectorFailed` as the fence's."""

    connector: ConnectorFence
    legs: Legs

    def order(self) -> Order:
        """Return which leg begins."""
        return self.connector.order(self.legs.prefill)

    def towards(self, decode: Peer) -> Attempt:
        """Return the attempt, with the D that is to get the hand-off."""
        return replace(self, legs=replace(self.legs, decode=decode))

    def pulling_from(self, source: Peer) -> Attempt:
        """Return the attempt, with an instance from which P is to pull what that has cached."""
        return replace(self, legs=replace(self.legs, source=source))

    def question(self) -> Question | None:
        """Return what P is to be asked before anything is sent to it."""
        return self.connector.question(self.legs.prefill)

    def understood(self, answer: bytes) -> Any | None:
        """Return what P's answer to the question says; ``None`` if that is nonsense."""
        return self.connector.understood(answer, self.legs.prefill)

    def knowing(self, known: Any) -> Attempt:
        """Return the attempt, with what P's answer to the question says."""
        return replace(self, legs=replace(self.legs, known=known))

    def names_rank(self) -> bool:
        """Whether the hand-off names the engine that a leg is sent to."""
        return self.connector.names_rank(self.legs)

    @property
    def leaves_something(self) -> bool:
        """Whether P may keep blocks for D when it has answered. Raises nothing."""
        try:
            return self.order() is not Order.DECODE_FIRST
        except ConnectorFailed:  # who asks is about to end, and must not be kept from it
            return True

    def by(self, prefill: Peer, source: Peer | None = None) -> Attempt:
        """Return the attempt with another P, which has got nothing of it, and from where that one pulls."""
        return replace(self, legs=replace(self.legs, prefill=prefill, source=source))

    def invitation(self, url: str) -> Handoff:
        """Return what D gets to ask for the prefill at ``url``."""
        return self.connector.invitation(self.legs, url)

    def asked(self, call: bytes) -> Any | None:
        """Return what D's call says; ``None`` if that is nonsense."""
        return self.connector.asked(call, self.legs)

    def prefill_body(self, body: JsonBody) -> bytes | None:
        """Return the body of the request to P; ``None`` if P can do nothing for it."""
        return self.connector.prefill_body(body, self.legs)

    def prefill_headers(self) -> Mapping[str, str]:
        """Return headers of the request to P."""
        return self.connector.prefill_headers(self.legs)

    def handoff(self, answer: bytes) -> Handoff | None:
        """Return the hand-off in P's answer."""
        return self.connector.handoff(answer, self.legs)

    def promised(self) -> Handoff | None:
        """Return the hand-off that P will make."""
        return self.connector.promised(self.legs)

    def abort(self) -> Abort | None:
        """Return what ends either leg at the instance that has it."""
        return self.connector.abort(self.legs)

    def ended(self, answer: bytes) -> bool:
        """Whether P's answer was whole with its first token."""
        return self.connector.ended(answer)

    def splice(self, body: JsonBody, handoff: Handoff) -> Splice | None:
        """Return how the hand-off goes into the client's body."""
        return self.connector.splice(body, handoff)

    def release_body(self, handoff: Handoff, model: str | None) -> bytes | None:
        """Return the body of a request that makes P free the hand-off."""
        return self.connector.release_body(handoff, model)
