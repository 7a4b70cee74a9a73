"""The interface of a KV hand-off protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..request.body import JsonBody


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


class Connector(Protocol):
    """Makes the bodies of the two legs, prefill and decode, from the client's body. Does no I/O."""

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

    def decode_body(self, body: JsonBody, handoff: Handoff) -> tuple[bytes, int]:
        """Return the body of the request to D, and the offset at which the hand-off begins in it.

        The hand-off must be the last field: what comes before the offset, closed by a ``}``, must be the
        request without it. Envoy cuts there when it sends the request to another D.
        """
        ...

    def release_body(self, handoff: Handoff, model: str | None) -> bytes | None:
        """Return the body of a completion request that makes D refuse the hand-off and P free its blocks.

        ``None`` if there is none: the hand-off is left to its lease.
        """
        ...
