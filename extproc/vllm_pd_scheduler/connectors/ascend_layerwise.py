"""vllm-ascend's ``MooncakeLayerwiseConnector`` and ``SfaRemoteD2HConnector``: D first, then P layer by layer.

D allocates its blocks and asks the ``metaserver`` of its request for the prefill, saying where the blocks
are. P computes the prompt and writes each layer as it is done (or has D read it), then tells D, by the id of
the request, that all is there. Source: ``vllm_ascend/distributed/kv_transfer/kv_p2p`` of August 2026.

vLLM makes the id of the kind of the path and the ``X-Request-Id``, so both legs of an attempt have one of
their own. P keeps nothing when it is done, and it does not matter whether its one token ends the text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec

from ..request.api import CHAT, COMPLETIONS
from ..request.body import JsonBody
from ..request.handoff_key import HANDOFF_KEY
from ..request.headers import REQUEST_ID
from ..request.json_text import is_deeper
from .base import MAX_TOKENS, Connector, Handoff, Legs, Order, Peer
from .one_token import UNREADABLE, can_split, counted, one_token

_MAX_CALL_DEPTH = 32

_Port = Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]


class _Call(msgspec.Struct):
    """The part of D's call that P's engine uses without a check."""

    request_id: _Text
    do_remote_decode: bool
    remote_engine_id: _Text
    remote_host: _Text
    remote_port: _Port
    remote_cached_tokens: _Tokens


_decode_call = msgspec.json.Decoder(_Call).decode
_encode = msgspec.json.Encoder().encode


class AscendLayerwiseConnector(Connector):
    """D gets the URL of the attempt, and P what D says when it calls there."""

    def can_split(self, body: JsonBody) -> bool:
        """Whether the request can be split, and vLLM knows it by its header: not so those of other APIs."""
        return body.api in (CHAT, COMPLETIONS) and can_split(body)

    def order(self, prefill: Peer) -> Order:
        """Return that D begins."""
        return Order.DECODE_FIRST

    def invitation(self, legs: Legs, url: str) -> Handoff:
        """Return the URL that D is to call, and the id of this attempt."""
        params = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": url}
        return Handoff(_encode(params), lease=math.inf, pinned=False, headers=_own_id(legs))

    def asked(self, call: bytes, legs: Legs) -> bytes | None:
        """Return D's call as it is, if it has all that P needs and is of this attempt."""
        try:
            found = _decode_call(call)
            call.decode()  # in what is copied whole, nothing else looks at the parts that are not known here
        except UNREADABLE:
            return None
        own = found.do_remote_decode and _own_id(legs)[REQUEST_ID] in found.request_id
        return call if own and not is_deeper(call, _MAX_CALL_DEPTH) else None

    def prefill_body(self, body: JsonBody, legs: Legs) -> bytes:
        """Return the client's body for one token that is no end, with what D has said."""
        return one_token(body, {HANDOFF_KEY: legs.known}, past_stop=True)

    def prefill_headers(self, legs: Legs) -> Mapping[str, str]:
        """Return the id by which D knows the attempt."""
        return _own_id(legs)

    def handoff(self, answer: bytes, legs: Legs) -> Handoff | None:
        """Return that P is done: D has all of it."""
        return Handoff(b"", *counted(answer), lease=math.inf, pinned=False)


def _own_id(legs: Legs) -> Mapping[str, str]:
    # vLLM adds 8 random hex digits, and cuts off as much.
    return {REQUEST_ID: f"{legs.id}-layerwise"}
