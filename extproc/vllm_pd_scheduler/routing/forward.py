"""Where a request goes after routing, until its answer has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..fleet.endpoint import Endpoint, Reservation
from ..fleet.registry import Registry
from ..handoff.pending import PendingHandoff
from ..request import headers as names


@dataclass(slots=True, eq=False)
class Forward:
    """Where a request goes: to the first of ``decode``, or a further one if that fails.

    ``body`` is ``None`` when the client's passes unchanged; ``handoff_at`` is the offset in it at which the
    hand-off starts, if there is one. ``release`` must be called when the answer has ended, however it ended.
    """

    id: str
    decode: list[Endpoint]
    reservation: Reservation
    body: bytes | None = None
    handoff_at: int | None = None
    pending: PendingHandoff | None = None
    first_byte_timeout: float | None = None
    remove_headers: list[str] = field(default_factory=list)
    on_release: Callable[[Forward], None] | None = None
    answering: Endpoint | None = field(init=False)
    """The one of ``decode`` that has the request, as far as is known; ``None`` when all have failed it."""

    def __post_init__(self) -> None:
        self.answering = self.decode[0]

    @property
    def prefill(self) -> Endpoint | None:
        """The instance that prefilled, if one did."""
        return self.pending.prefill if self.pending else None

    def headers(self) -> dict[str, str]:
        """Headers to set on the request to decode."""
        found = {
            names.DESTINATION: ",".join(str(endpoint.address) for endpoint in self.decode),
            names.ID: self.id,
        }
        if self.pending is not None:
            found[names.PREFILL] = self.pending.prefill.id
        if self.body is not None:
            found["content-length"] = str(len(self.body))
        if self.handoff_at is not None:
            found[names.HANDOFF_AT] = str(self.handoff_at)
        if self.first_byte_timeout is not None:
            found[names.FIRST_BYTE_TIMEOUT] = str(max(1, int(self.first_byte_timeout * 1000)))
        if (key := self.decode[0].instance.api_key) is not None:
            found["authorization"] = f"Bearer {key}"
        return found

    def moved(self, registry: Registry) -> None:
        """Count the request on the next of ``decode``, where Envoy sends it when an attempt has failed."""
        current = self.reservation
        following = self.decode[self.decode.index(current.endpoint) + 1 :]
        self.answering = following[0] if following else None
        if current.active and following:
            current.release()
            self.reservation = registry.reserve(following[0])
            self.reservation.tokens = current.tokens
            following[0].tokens += current.tokens

    def release(self) -> None:
        """Give back the reservation. Doing it twice is the same as once."""
        self.reservation.release()
        if self.on_release is not None:
            on_release, self.on_release = self.on_release, None
            on_release(self)
