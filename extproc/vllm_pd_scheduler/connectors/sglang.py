"""SGLang's prefill-decode disaggregation, with any of its transfer back ends.

Both legs get the request at the same time, and meet in a *room* of P's bootstrap server: D waits for what P
sends. P answers when all is sent, and an engine of the decode mode serves nothing without a room. Source:
``sglang/srt/disaggregation`` and ``entrypoints`` of SGLang 0.5.23.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from typing import Annotated, Any

import msgspec

from ..models import InstanceRole
from ..request.api import CHAT, COMPLETIONS, NATIVE
from ..request.body import UNREAD, JsonBody
from .base import Abort, Connector, Handoff, Legs, Order, Peer, Question, Settings, Splice, Switch
from .one_token import UNREADABLE, Tokens, counted

ABORT_PATH = "/abort_request"
HEALTH_PATH = "/health"
SWITCH_PATH = "/pd_role_switch"
BOOTSTRAP_TIMEOUT_S = 300.0
"""``SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT`` and ``…_WAITING_TIMEOUT``."""

_Port = Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
_NOT_THE_CLIENTS = (
    "bootstrap_pair_key",
    "decode_tp_size",
    "routed_dp_rank",
    "data_parallel_rank",
    "disagg_prefill_dp_rank",
)
"""Fields by which an engine is told where work is to be done, beside those that are set here."""


class SglangSettings(Settings, frozen=True):
    """Where P's bootstrap server is."""

    bootstrap_port: _Port = 8998
    """``--disaggregation-bootstrap-port`` of P."""


class _Meta(msgspec.Struct):
    """Tokens, as ``/generate`` tells them."""

    prompt_tokens: Tokens | None = None
    cached_tokens: Tokens | None = None


class _Answer(msgspec.Struct):
    meta_info: _Meta | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode
_encode = msgspec.json.Encoder().encode


class SglangConnector(Connector):
    """Each attempt has a room and a request id of its own, which the engines know it by."""

    settings_type = SglangSettings
    needs_prefill = True
    takes_ranks = False  # a room has one request's body for both, and SGLang's metrics name ranks otherwise

    def can_split(self, body: JsonBody) -> bool:
        """Whether it is a request of an API that takes a room, for one answer to each of its prompts.

        For several answers the engine would use the same room several times. The log-probabilities of a
        prompt are P's alone, and its answer goes to nobody.
        """
        if body.api not in (CHAT, COMPLETIONS, NATIVE):
            return False
        if body.get("n") not in (None, 1) or body.get("use_beam_search") or body.get("echo"):
            return False
        if body.get("logprob_start_len") not in (None, -1):
            return False
        return body.api is not NATIVE or _one_answer_each(body.get("sampling_params"))

    def order(self, prefill: Peer) -> Order:
        """Return that both begin together: P sends nothing before D has said where to."""
        return Order.TOGETHER

    def question(self, prefill: Peer) -> Question:
        """Ask P's bootstrap server what D asks it too: with a wrong port each would wait for the other."""
        return Question(prefill.settings.bootstrap_port, HEALTH_PATH)

    def understood(self, answer: bytes, prefill: Peer) -> bool:
        """Return that it is there."""
        return True

    def prefill_body(self, body: JsonBody, legs: Legs) -> bytes:
        """Return the client's body, not streamed, with the room. P itself stops at the first token."""
        fields = {name: _encode(value) for name, value in _fields(legs).items()}
        return body.replace(frozenset({"stream_options"}), {"stream": b"false", **fields})

    def promised(self, legs: Legs) -> Handoff:
        """Return the room. It can be used until one of the engines gives up waiting for the other."""
        return Handoff(_encode(_fields(legs)), lease=BOOTSTRAP_TIMEOUT_S, pinned=False)

    def handoff(self, answer: bytes, legs: Legs) -> Handoff | None:
        """Return that D has what P has sent, and what P has counted."""
        tokens, cached = counted(answer)
        if tokens is None:
            with suppress(*UNREADABLE):  # a batch has a list for its answer
                meta = _decode_answer(answer).meta_info or _Meta()
                tokens, cached = meta.prompt_tokens or None, meta.cached_tokens
                cached = cached if tokens is None or cached is None else min(cached, tokens)
        return Handoff(b"", tokens, cached, lease=math.inf, pinned=False)

    def splice(self, body: JsonBody, handoff: Handoff) -> Splice:
        """Return how the room gets into the client's body, as its last fields: those count."""
        end, empty = body.end()
        return Splice(end, (b"" if empty else b",") + handoff.params[1:])

    def abort(self, legs: Legs) -> Abort:
        """Return the call that ends the request with this attempt's id."""
        return Abort(ABORT_PATH, _encode({"rid": _rid(legs)}))

    def switch(self, role: InstanceRole) -> Switch:
        """Return the call of an engine that was started with ``--enable-pd-role-switch``."""
        return Switch(SWITCH_PATH, _encode({"new_role": role}))


def _fields(legs: Legs) -> dict[str, Any]:
    return {
        "bootstrap_host": legs.prefill.host,
        "bootstrap_port": legs.prefill.settings.bootstrap_port,
        "bootstrap_room": room(legs),
        "rid": _rid(legs),
        **dict.fromkeys(_NOT_THE_CLIENTS),
    }


def room(legs: Legs) -> int:
    """Return the room of an attempt: 63 bits, as good as random. By its remainder P chooses the rank."""
    digest = hashlib.blake2b(legs.id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1 or 1  # 0 is that of a health check


def _rid(legs: Legs) -> str:
    """Return the engine's id of an attempt. No other begins with it: an abort is of all that do."""
    return f"{legs.id}-"


def _one_answer_each(params: Any) -> bool:
    if params is UNREAD:
        return False
    each = params if isinstance(params, list) else [params]
    return all(one is None or (isinstance(one, dict) and one.get("n") in (None, 1)) for one in each)
