"""vLLM's ``NixlPushConnector``: D says where its blocks are, and P writes into them.

Source: ``vllm/distributed/kv_transfer/kv_connector/v1/nixl/push_scheduler.py`` and ``push_worker.py`` of vLLM
0.32 and 0.33. Releases before 0.28 do not say that they push.

P finds what D asks for by the request's id. vLLM makes that of the kind of the path, the ``X-Request-Id``
and 8 random hex digits, which P does not compare. So both legs of an attempt have one ``X-Request-Id``, and
no other attempt has it: P would write another prompt's blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec.structs import replace

from ..request.api import CHAT, COMPLETIONS
from ..request.body import JsonBody
from ..request.headers import REQUEST_ID
from .base import Handoff, Legs
from .nixl import PUSH, NixlConnector, TransferParams, another_mode, read_handoff

TOO_LATE_S = 1e-9
"""The lease of a hand-off that must not be used."""
_SHORT_CHAT = b'"messages":[{"role":"user","content":"x"}]'


class NixlPushConnector(NixlConnector):
    """NIXL's bodies, and a request id of its own for the two legs of each attempt."""

    def can_split(self, body: JsonBody) -> bool:
        """Whether the request can be split, and vLLM knows it by its header: not so those of other APIs."""
        return body.api in (CHAT, COMPLETIONS) and super().can_split(body)

    def prefill_headers(self, legs: Legs) -> Mapping[str, str]:
        """Return the id of this attempt."""
        return of_its_own(legs)

    def handoff(self, answer: bytes, legs: Legs) -> Handoff | None:
        """Return P's ``kv_transfer_params`` if they have all that D needs, and the same id for D.

        Raise :exc:`ValueError` if P does not push.
        """
        found, params = read_handoff(answer)
        if found is not None and params.transfer_mode not in (None, PUSH):
            raise another_mode(params)
        return pushed(found, params, legs)

    def release_body(self, handoff: Handoff, model: str | None) -> bytes:
        """Return a request for one token after a short prompt, in place of P's.

        P writes the one block that D has for that, and frees all. A request that D refuses tells P nothing in
        this protocol. Measured on vLLM 0.32.
        """
        name = b"" if model is None else b'"model":' + msgspec.json.encode(model) + b","
        prompt = _SHORT_CHAT if handoff.release_path == CHAT.path else b'"prompt":"x"'
        return b"".join((b"{", name, prompt, b',"max_tokens":1,"kv_transfer_params":', handoff.params, b"}"))


def pushed(found: Handoff | None, params: TransferParams, legs: Legs) -> Handoff | None:
    """Return a hand-off of a P that pushes; ``None`` without ``tp_size``, of which D's engine would die.

    One that P knows by another id than the attempt's is there, and may not be used: D would wait for what P
    never finds, or get what another request has left.
    """
    if found is None or params.tp_size is None:
        return None
    own, known_as = of_its_own(legs), params.remote_request_id or ""
    if own[REQUEST_ID] not in known_as:
        return replace(found, lease=TOO_LATE_S, pinned=False)
    # vLLM begins the ids of its requests with the kind of their path.
    path = CHAT.path if known_as.startswith("chatcmpl-") else found.release_path
    return replace(found, headers=own, release_path=path, released_by=200)


def of_its_own(legs: Legs) -> Mapping[str, str]:
    """Return the request id of an attempt's legs."""
    # The number at the end of the attempt's own could be taken for the 8 hex digits.
    return {REQUEST_ID: f"{legs.id}-push"}
