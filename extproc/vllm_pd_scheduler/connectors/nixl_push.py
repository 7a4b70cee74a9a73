"""vLLM's ``NixlPushConnector``: D says where its blocks are, and P writes into them.

Source: ``vllm/distributed/kv_transfer/kv_connector/v1/nixl/push_scheduler.py`` and ``push_worker.py`` of vLLM
0.32 and 0.33. P finds what D asks for by the request's id. vLLM makes that of the ``X-Request-Id``, with 8 random
hex digits after it, which P does not compare. So both legs of an attempt have one id, and no other attempt has
it: P would write another prompt's blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..request.headers import REQUEST_ID
from .base import Handoff, Legs
from .nixl import PUSH, NixlConnector


class NixlPushConnector(NixlConnector):
    """NIXL's bodies, and a request id of its own for the two legs of each attempt."""

    transfer_mode = PUSH

    def prefill_headers(self, legs: Legs) -> Mapping[str, str]:
        """Return the id of this attempt."""
        return _of_its_own(legs)

    def handoff(self, answer: bytes, legs: Legs) -> Handoff | None:
        """Return P's ``kv_transfer_params``, and the same id for D."""
        found = super().handoff(answer, legs)
        return None if found is None else replace(found, headers=_of_its_own(legs))


def _of_its_own(legs: Legs) -> Mapping[str, str]:
    # The number at the end of an attempt's id could be taken for the 8 hex digits.
    return {REQUEST_ID: f"{legs.id}-push"}
