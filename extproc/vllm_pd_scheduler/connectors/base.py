"""What a KV hand-off protocol is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..request.body import JsonBody


@dataclass(frozen=True, slots=True)
class Handoff:
    """What prefill left for one decode, and only one: using it a second time gives a wrong text.

    ``params`` is the JSON text that the decode request carries; ``prompt_tokens`` is the prompt's length
    as prefill counted it, ``cached_tokens`` how many of them it had in its cache, if it says so.
    """

    params: bytes
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


class Connector(Protocol):
    """Turns a client's body into those of the two legs. Does no I/O."""

    def can_split(self, body: JsonBody) -> bool:
        """Whether the request can be split in prefill and decode; if not, decode serves it whole."""
        ...

    def prefill_body(self, body: JsonBody) -> bytes:
        """Return the body of the prefill leg."""
        ...

    def handoff(self, answer: bytes) -> Handoff | None:
        """Read prefill's answer (status 200); ``None`` if there is nothing that decode could use."""
        ...

    def ended(self, answer: bytes) -> bool:
        """Whether prefill's answer (status 200) was whole with its first token, so that nothing is left.

        That is not the instance's failure: an instance without its connector answers in full length.
        """
        ...

    def decode_body(self, body: JsonBody, handoff: Handoff) -> tuple[bytes, int]:
        """Return the body of the decode leg, and the offset from which on it is the hand-off and ``}``.

        What comes before it, closed by a ``}``, must be the request without a hand-off.
        """
        ...

    def release_body(self, handoff: Handoff, model: str | None) -> bytes:
        """Return the body of a completion request that makes decode refuse the hand-off, and P free it."""
        ...
