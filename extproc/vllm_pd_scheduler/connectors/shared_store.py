"""A store of KV blocks that P writes and D reads: no parameters pass between them, so nothing can go stale.

Such are vLLM's ``MooncakeStoreConnector``, ``LMCacheConnectorV1`` and ``LMCacheMPConnector`` with a shared
back end, ``ExampleConnector``, ``HF3FSKVConnector`` and ``FlexKVConnectorV1``, the file and object tiers of
``OffloadingConnector``, and vllm-ascend's ``AscendStoreConnector``. What P has written is found by the hash
of the prompt: D reads what is there when it looks, and computes the rest.
"""

from __future__ import annotations

import math

from ..request.body import JsonBody
from .base import Connector, Handoff, Legs
from .one_token import can_split, counted, one_token


class SharedStoreConnector(Connector):
    """P gets the request for one token, D the client's own, and any D may have it any number of times."""

    def can_split(self, body: JsonBody) -> bool:
        """Whether the request has one prompt and one answer, and wants nothing that only P would know."""
        return can_split(body)

    def prefill_body(self, body: JsonBody, legs: Legs) -> bytes:
        """Return the client's body with ``max_tokens`` 1, not streamed."""
        return one_token(body, {})

    def handoff(self, answer: bytes, legs: Legs) -> Handoff | None:
        """Return that P is done: all that is handed over is in the store."""
        return Handoff(b"", *counted(answer), lease=math.inf, pinned=False)
