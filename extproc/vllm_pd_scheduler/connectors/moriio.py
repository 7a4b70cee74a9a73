"""vLLM's ``MoRIIOConnector`` (ROCm): D reads P's blocks, or P writes them into those of a D that it knows.

P answers where it is and which blocks they are, and D gets that unchanged. To write, P must be told of D
before, so D is chosen first. Source: ``vllm/distributed/kv_transfer/kv_connector/v1/moriio`` of vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from ..request.api import RESPONSES
from ..request.body import JsonBody
from ..request.handoff_key import HANDOFF_KEY
from ..request.headers import REQUEST_ID
from ..request.json_text import is_deeper
from .base import Connector, Handoff, Legs, Order, Peer, Settings
from .one_token import UNREADABLE, can_split, counted_with, has_stopped, never_served, one_token

_MAX_PARAMS_DEPTH = 32

_Block = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Port = Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
_Rank = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
_Size = Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]


class MoriioSettings(Settings, frozen=True):
    """How blocks travel, and where the others find an instance: its ``kv_connector_extra_config``."""

    mode: Literal["read", "write"] = "write"
    """``read`` if the engines have ``read_mode``."""
    handshake_port: _Port = 6301
    notify_port: _Port = 61005
    tp_size: _Size = 1
    """``--tensor-parallel-size``."""
    lease: _Seconds = 60.0
    """``defer_timeout``, seconds."""


class _Answer(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")
    usage: msgspec.Raw = msgspec.Raw(b"null")


class _TransferParams(msgspec.Struct):
    """The part of P's ``kv_transfer_params`` that D's engine uses without a check."""

    do_remote_prefill: bool
    transfer_id: _Text
    remote_engine_id: _Text
    remote_block_ids: list[_Block | list[_Block]]
    remote_host: _Text
    remote_handshake_port: _Port
    remote_notify_port: _Port
    remote_dp_rank: _Rank = 0
    remote_dp_size: _Size = 1
    remote_dp_size_local: _Rank = 0
    tp_size: _Size = 1
    remote_prefill_cached_tokens: msgspec.Raw = msgspec.Raw()


_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_params = msgspec.json.Decoder(_TransferParams).decode
_encode = msgspec.json.Encoder().encode


class MoriioConnector(Connector):
    """Each attempt has a ``transfer_id`` of its own, by which both legs know it."""

    settings_type = MoriioSettings

    def can_split(self, body: JsonBody) -> bool:
        """Whether the request has one prompt and one answer, and wants nothing that only P would know.

        The id of a response is the engine's too, which reads addresses of peers out of ids: no client's.
        """
        return can_split(body) and not (body.api is RESPONSES and body.has("request_id"))

    def order(self, prefill: Peer) -> Order:
        """Return that P must be told of D, if it writes there."""
        return Order.TOWARDS_DECODE if prefill.settings.mode == "write" else Order.PREFILL_FIRST

    def names_rank(self, legs: Legs) -> bool:
        """Whether P is told to which engine of D it must write."""
        return legs.decode is not None and legs.decode.rank is not None

    def prefill_body(self, body: JsonBody, legs: Legs) -> bytes:
        """Return the client's body for one token that is no end, and a request for a hand-off."""
        params: dict[str, Any] = {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "transfer_id": _transfer_id(legs),
            "remote_engine_id": None,
            "remote_block_ids": None,
        }
        if legs.decode is not None:
            to = legs.decode.settings
            params |= {
                "remote_host": legs.decode.host,
                "remote_handshake_port": to.handshake_port,
                "remote_notify_port": to.notify_port,
                "remote_dp_rank": legs.decode.rank or 0,
                "remote_dp_rank_override": True,
                "remote_dp_size": legs.decode.ranks,
                "remote_tp_size": to.tp_size,
                "tp_size": to.tp_size,
            }
        return one_token(body, {HANDOFF_KEY: _encode(params)}, past_stop=True)

    def prefill_headers(self, legs: Legs) -> Mapping[str, str]:
        """Return a request id of our own: out of a client's the engine would read addresses of peers."""
        return _own_id(legs)

    def handoff(self, answer: bytes, legs: Legs) -> Handoff | None:
        """Return P's ``kv_transfer_params`` if they have all that D needs and are this attempt's."""
        try:
            decoded = _decode_answer(answer)
            text = bytes(decoded.kv_transfer_params)
            params = _decode_params(text)
            text.decode()  # in what is copied whole, nothing else looks at the parts that are not known here
        except UNREADABLE:
            return None
        own = params.do_remote_prefill and params.transfer_id == _transfer_id(legs)
        if not (own and params.remote_block_ids) or is_deeper(text, _MAX_PARAMS_DEPTH):
            return None
        lease = legs.prefill.settings.lease
        counts = counted_with(decoded.usage, params.remote_prefill_cached_tokens)
        return Handoff(text, *counts, lease=lease, headers=_own_id(legs))

    def ended(self, answer: bytes) -> bool:
        """Whether the one token was a stop after all: P has kept nothing."""
        return has_stopped(answer)

    def release_body(self, handoff: Handoff, model: str | None) -> bytes:
        """Return a completion request that D refuses: it tells P, which frees the blocks."""
        return never_served(handoff.params, model)


def _own_id(legs: Legs) -> Mapping[str, str]:
    return {REQUEST_ID: legs.id}


def _transfer_id(legs: Legs) -> str:
    return f"tx-{legs.id}"
