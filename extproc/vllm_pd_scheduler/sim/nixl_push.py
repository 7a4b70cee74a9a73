"""vLLM's ``NixlPushConnector`` between simulated engines: D says where its blocks are, and P writes them.

Source: ``vllm/distributed/kv_transfer/kv_connector/v1/nixl/push_worker.py`` of vLLM 0.33. P finds the request
that is meant by D's own id, without the random digits at the end of both.
"""

import asyncio
import re
from dataclasses import replace
from typing import Any

from .handoff import Connector, FatalHandOff, FetchReply, Offer

_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}$", re.IGNORECASE)


def base_id(request_id: str) -> str:
    """Return an engine's request id without the random digits at its end."""
    return _RANDOM_SUFFIX.sub("", request_id)


class PushConnector(Connector):
    """Asks to be pushed a hand-off. What P cannot find it may find later: here, never."""

    pushes = True

    def read(self, params: dict[str, Any], blocks_needed: int) -> Offer:
        """Return the sender; raise FatalHandOff for keys that vLLM reads without a check."""
        try:
            engine_id, host, port = (params[f"remote_{key}"] for key in ("engine_id", "host", "port"))
            params["tp_size"]
        except KeyError as error:
            raise FatalHandOff(f"KeyError: {error}") from None
        return Offer(engine_id, "", host, port, [])

    def named(self, offer: Offer, own_id: str, digest: str) -> Offer:
        """Return the hand-off by the id of the request that asks for it."""
        return replace(offer, request_id=own_id)

    def answer(
        self, offer: Offer, params: dict[str, Any], num_tokens: int, cached: int
    ) -> dict[str, Any] | None:
        """Return the ``kv_transfer_params`` of a prefill's answer, with the same keys as vLLM's."""
        pulled_alone = ("remote_blocks_expiry_time", "remote_registration_generation")
        answer = offer.answer(num_tokens, cached) | {"transfer_mode": "push"}
        return {key: value for key, value in answer.items() if key not in pulled_alone}

    async def fetch(self, offer: Offer) -> FetchReply:
        """Ask for the blocks, and wait for ever if the sender has none under this id."""
        reply = await super().fetch(offer)
        if reply.unmatched:
            await asyncio.Event().wait()
        return reply
