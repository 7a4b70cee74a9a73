"""Why a change is not made."""

from __future__ import annotations

from ..fleet.endpoint import Endpoint


class NotKept(Exception):
    """A change cannot be kept, so nothing was changed; the message says why."""


class NotShared(Exception):
    """The log of the replicas does not take a change; the message says why, and whether it may count yet."""


class LastRoutable(Exception):
    """Without an instance nobody could serve in its role, so it stays; the message says what to do."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(
            f"{endpoint.instance.instance_id} is the last {endpoint.instance.role} instance that can serve: "
            "add force=true to take it away all the same"
        )


class Leaving(Exception):
    """A drain cannot end, since no source names the instance any more; the message says so."""

    def __init__(self, instance_id: str) -> None:
        super().__init__(
            f"no source names {instance_id} any more: it is removed when its requests have ended"
        )


class CannotTurn(Exception):
    """An instance cannot have the other role; the message says why."""
