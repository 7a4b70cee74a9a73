"""vLLM's ``MooncakeConnector``: P keeps the blocks under an id that we have chosen, and D pulls them by it.

P answers nothing of the hand-off. Where its engine is found, its bootstrap server says, once for each of its
processes. Source: ``vllm/distributed/kv_transfer/kv_connector/v1/mooncake`` of vLLM 0.32.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from ..models import join_address
from ..request.body import JsonBody
from ..request.handoff_key import HANDOFF_KEY
from ..request.headers import RANK
from .base import NO_HEADERS, Connector, Handoff, Legs, Peer, Question, Settings
from .one_token import UNREADABLE, can_split, counted, has_stopped, never_served, one_token, was_cut

_Port = Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
_Rank = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]

_Engines = tuple[tuple[int, str], ...]
"""Data-parallel rank and engine id of each engine of P, by rank."""


class MooncakeSettings(Settings, frozen=True):
    """Where P's bootstrap server is, and for how long P keeps the blocks."""

    bootstrap_port: _Port = 8998
    """``VLLM_MOONCAKE_BOOTSTRAP_PORT``."""
    lease: _Seconds = 480.0
    """``VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT``, seconds."""
    data_parallel_rank: _Rank | None = None
    """The only engine of P that gets requests, if the scheduler chooses none; ``None``: all of them do."""


_Workers = Annotated[dict[_Rank, _Text], msgspec.Meta(min_length=1)]


class _Engine(msgspec.Struct):
    engine_id: _Text
    worker_addr: Annotated[dict[_Rank, _Workers], msgspec.Meta(min_length=1)]


_decode_engines = msgspec.json.Decoder(dict[_Rank, _Engine]).decode
_encode = msgspec.json.Encoder().encode


class MooncakeConnector(Connector):
    """P gets a new ``transfer_id`` with each attempt; the hand-off is made of that and of P's engine."""

    settings_type = MooncakeSettings

    def can_split(self, body: JsonBody) -> bool:
        """Whether the request has one prompt and one answer, and wants nothing that only P would know."""
        return can_split(body)

    def question(self, prefill: Peer) -> Question:
        """Ask P's bootstrap server for its engines."""
        return Question(prefill.settings.bootstrap_port, "/query")

    def understood(self, answer: bytes, prefill: Peer) -> _Engines | None:
        """Return the engines that may get requests; ``None`` if there is none, or the answer is another."""
        try:
            found = _decode_engines(answer)
        except UNREADABLE:
            return None
        only = prefill.settings.data_parallel_rank if prefill.rank is None else prefill.rank
        ranks = sorted(found) if only is None else [only] if only in found else []
        return tuple((rank, found[rank].engine_id) for rank in ranks) or None

    def names_rank(self, legs: Legs) -> bool:
        """Whether P has several engines: a hand-off is of one of them."""
        prefill = legs.prefill
        chosen = prefill.rank is not None or prefill.settings.data_parallel_rank is not None
        return chosen or len(legs.known) > 1

    def prefill_body(self, body: JsonBody, legs: Legs) -> bytes:
        """Return the client's body for one token that is no end, and a request for a hand-off."""
        params = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": _transfer_id(legs)}
        return one_token(body, {HANDOFF_KEY: _encode(params)}, past_stop=True)

    def prefill_headers(self, legs: Legs) -> Mapping[str, str]:
        """Return the rank of the engine that gets it, where there is a choice."""
        return {RANK: str(_engine(legs)[0])} if self.names_rank(legs) else NO_HEADERS

    def handoff(self, answer: bytes, legs: Legs) -> Handoff | None:
        """Return the hand-off if P was cut off after its token: after a stop it has kept no blocks."""
        if not was_cut(answer):
            return None
        tokens, cached = counted(answer)
        params: dict[str, Any] = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": _transfer_id(legs),
            "remote_bootstrap_addr": _bootstrap_address(legs.prefill),
            "remote_engine_id": _engine(legs)[1],
        }
        if cached is not None:
            params["remote_prefill_cached_tokens"] = cached  # as P says it by itself in other protocols
        lease = legs.prefill.settings.lease
        return Handoff(_encode(params), tokens, cached, cached is not None, lease=lease)

    def ended(self, answer: bytes) -> bool:
        """Whether the one token was a stop after all: P has kept nothing, and D would wait for minutes."""
        return has_stopped(answer)

    def release_body(self, handoff: Handoff, model: str | None) -> bytes:
        """Return a completion request that D refuses: it then pulls no blocks, and P frees them."""
        return never_served(handoff.params, model)


def _transfer_id(legs: Legs) -> str:
    return f"xfer-{legs.id}"


def _bootstrap_address(prefill: Peer) -> str:
    return f"http://{join_address(prefill.host, prefill.settings.bootstrap_port)}"


def _engine(legs: Legs) -> tuple[int, str]:
    """Return the engine of an attempt, always the same: of several, one by the attempt's id."""
    engines: _Engines = legs.known
    return engines[zlib.crc32(legs.id.encode()) % len(engines)]
