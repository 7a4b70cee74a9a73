"""The interface of a KV hand-off protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..request.body import JsonBody

MAX_TOKENS = 100_000_000
"""Of a prompt: ten times the longest context that any model has."""


@dataclass(frozen=True, slots=True)
class Handoff:
    """A prompt's KV cache on P, and how D fetches it.

    It is for one decode request only. P frees the blocks when they were fetched or when its lease ends, so
    whoever uses a hand-off again, or too late, reads another prompt's blocks and answers with a wrong text.
    """

    params: bytes
    """JSON text of the field ``kv_transfer_params`` of the decode request."""
    prompt_tokens: int | None = None
    """Tokens of the prompt as P counted them; ``None`` if it does not say."""
    cached_tokens: int | None = None
    """How many of them P had in its prefix cache; ``None`` if it does not say."""


@dataclass(frozen=True, slots=True)
class Splice:
    """How D's request differs from the client's: from offset ``at`` of the body on, it is ``text``.

    The body itself need not be sent to Envoy, which has it. Another D, which gets no hand-off, gets the
    client's.
    """

    at: int
    text: bytes
    """UTF-8."""

    def into(self, body: bytes) -> bytes:
        """Return D's body."""
        return body[: self.at] + self.text


class Connector(Protocol):
    """Makes the requests of the two legs, prefill and decode, from the client's body. Does no I/O."""

    def can_split(self, body: JsonBody) -> bool:
        """Whether a request can be split in prefill and decode. If not, a D serves it alone."""
        ...

    def prefill_body(self, body: JsonBody) -> bytes:
        """Return the body of the request to P."""
        ...

    def handoff(self, answer: bytes) -> Handoff | None:
        """Return the hand-off in P's answer (of status 200), or ``None`` if it has none that D could use."""
        ...

    def ended(self, answer: bytes) -> bool:
        """Whether prefill's answer (status 200) was whole with its first token, so that nothing is left.

        That is not the instance's failure: an instance without its connector answers in full length.
        """
        ...

    def splice(self, body: JsonBody, handoff: Handoff) -> Splice:
        """Return how the hand-off goes into the client's body (``body.raw``), for D."""
        ...

    def release_body(self, handoff: Handoff, model: str | None) -> bytes | None:
        """Return the body of a completion request that makes D refuse the hand-off and P free its blocks.

        ``None`` if there is none: the hand-off is left to its lease.
        """
        ...
