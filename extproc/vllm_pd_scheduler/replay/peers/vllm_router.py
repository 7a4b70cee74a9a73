"""vllm-router 0.1.17: ``kv_aware`` with a prefill and a decode pool."""

from __future__ import annotations

from collections.abc import Sequence

from ...fleet.endpoint import Endpoint
from ...request.context import RequestContext
from .base import Peer, is_decode
from .plain import ConsistentHash


class KvAware(ConsistentHash, Peer):
    """The P with the longest cached prefix, by KV events; the D by the session.

    - Load does not matter while a P has a block of the prompt. Of those that have the same, or if nobody has
      any, the one with the fewest requests.
    - Events are late by ``event_delay_s`` (a choice: "sub-second"). A prompt that was sent to a P counts as
      cached there for ``speculative_s``, until its events come.
    - D: consistent hashing by session, as a session's KV is there. Both are chosen when a request comes.
    - To leave out P for a short rest of a prompt (``pd_uncached_token_threshold``) is "reserved": it is not
      done.

    https://github.com/vllm-project/router, ``docs/kv_aware.md`` and ``docs/kv_events_pd_routing.md``
    """

    event_delay_s = 0.05
    speculative_s = 2.0
    decode_first = True

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Return the endpoints with the longest prefix, or those of the session."""
        if is_decode(endpoints):
            return super().rank(endpoints, request, count)
        self._turn += 1
        ranked = sorted(
            (
                -self.cached_blocks(each, request),
                each.in_flight,
                (number + self._turn) % len(endpoints),
                number,
            )
            for number, each in enumerate(endpoints)
        )
        chosen = [endpoints[number] for *_, number in ranked[:count]]
        if self.site is not None and self.site.events is not None:
            until = request.now + self.speculative_s
            self.site.events.expect(chosen[0].id, request.blocks, until)
        return chosen
