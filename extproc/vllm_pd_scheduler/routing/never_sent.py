"""Requests whose clients left before Envoy had the scheduler's answer: no D has heard of them."""

from __future__ import annotations

from collections import OrderedDict

KEPT_S = 6.0
"""How long one is remembered. Envoy tells of it within moments of the end of its call, before or after."""

MAX_KEPT = 4096

MAX_ID = 200
"""Characters of an ``X-Request-Id`` at most. Envoy's own have 36; a client's that is longer is not used."""


class NeverSent:
    """Remembers such requests by their ``X-Request-Id``: Envoy knows no id of ours for them.

    A client may give two requests the same one. If one of them was answered and the other never sent, a
    hand-off that was used is freed once more, which does no harm: its call has ended, so nobody uses it then.
    """

    def __init__(self) -> None:
        self.left: OrderedDict[str, float] = OrderedDict()
        """When Envoy told of each."""

    def __len__(self) -> int:
        return len(self.left)

    def add(self, request_id: str, now: float) -> None:
        """Remember one that Envoy tells of."""
        if not request_id or len(request_id) > MAX_ID:
            return
        self.left[request_id] = now
        self.left.move_to_end(request_id)
        while len(self.left) > MAX_KEPT or next(iter(self.left.values())) < now - KEPT_S:
            self.left.popitem(last=False)

    def has(self, request_id: str, now: float) -> bool:
        """Whether Envoy told of one just before."""
        return self.left.get(request_id, float("-inf")) >= now - KEPT_S
