"""vLLM's ``OffloadingConnector`` with the tier ``p2p``: D pulls the blocks out of the memory of P's host.

Both legs name the hand-off by an id that is chosen here, and P answers nothing of it. P has copied the blocks
off its GPU: it keeps the copies until D fetches them, or for the lease. Source:
``vllm/v1/kv_offload/tiering/p2p`` of vLLM 0.33.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from ..request.body import JsonBody
from ..request.handoff_key import HANDOFF_KEY
from ..request.headers import RANK
from .base import NO_HEADERS, Connector, Handoff, Legs, Peer, Question, Settings
from .one_token import can_split, counted, has_stopped, one_token, was_cut

_Port = Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
_Rank = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class OffloadingP2pSettings(Settings, frozen=True):
    """Where the tier of an instance is found, and for how long it keeps what nobody fetches."""

    p2p_port: _Port = 5710
    """``port`` of the tier, or ``VLLM_P2P_SIDE_CHANNEL_PORT``: that of the rank 0."""
    lease: _Seconds = 60.0
    """``unbound_store_timeout_s`` of the tier, seconds."""
    data_parallel_rank: _Rank | None = None
    """The only engine that gets requests, if the scheduler chooses none; ``None``: there is one."""

    def __post_init__(self) -> None:
        if self.p2p_port + (self.data_parallel_rank or 0) >= 1 << 16:
            raise ValueError("p2p_port and data_parallel_rank make a port above 65535: choose a lower one")


_encode = msgspec.json.Encoder().encode


class OffloadingP2pConnector(Connector):
    """Each attempt has a ``kv_request_id`` of its own. A second D that asked for it would wait in vain."""

    settings_type = OffloadingP2pSettings
    can_pull = True

    def can_split(self, body: JsonBody) -> bool:
        """Whether the request has one prompt and one answer, and wants nothing that only P would know."""
        return can_split(body)

    def question(self, prefill: Peer) -> Question:
        """Ask whether P's tier is there: with a wrong port D would wait for it."""
        return Question(_port(prefill), None)

    def understood(self, answer: bytes, prefill: Peer) -> bool:
        """Return that it is."""
        return True

    def prefill_body(self, body: JsonBody, legs: Legs) -> bytes:
        """Return the client's body for one token, with the name of the hand-off and where to pull from."""
        params: dict[str, Any] = {"remote_decoder": {"kv_request_id": _id(legs)}}
        if legs.source is not None:
            # A name of its own: the source may be the D that asks P for the other one.
            params["remote_kv_source"] = _at(legs.source, f"{_id(legs)}-source")
        return one_token(body, {HANDOFF_KEY: _encode(params)})

    def prefill_headers(self, legs: Legs) -> Mapping[str, str]:
        """Return the rank of the engine that gets it, if there are several."""
        rank = _rank(legs.prefill)
        return NO_HEADERS if rank is None else {RANK: str(rank)}

    def names_rank(self, legs: Legs) -> bool:
        """Whether P has several engines: each has a port of its own for its copies."""
        return _rank(legs.prefill) is not None

    def handoff(self, answer: bytes, legs: Legs) -> Handoff | None:
        """Return the hand-off if P has read the prompt, be its one token the end of the text."""
        if not (was_cut(answer) or has_stopped(answer)):
            return None
        params = {"remote_prefiller": _at(legs.prefill, _id(legs))}
        return Handoff(_encode(params), *counted(answer), lease=legs.prefill.settings.lease)


def _rank(peer: Peer) -> int | None:
    rank: int | None = peer.settings.data_parallel_rank
    return rank if peer.rank is None else peer.rank


def _id(legs: Legs) -> str:
    return f"pd-{legs.id}"


def _at(peer: Peer, kv_request_id: str) -> dict[str, Any]:
    """Return how an engine finds another one's tier."""
    return {"kv_request_id": kv_request_id, "remote_host": peer.host, "remote_port": _port(peer)}


def _port(peer: Peer) -> int:
    port: int = peer.settings.p2p_port + (_rank(peer) or 0)
    return port
