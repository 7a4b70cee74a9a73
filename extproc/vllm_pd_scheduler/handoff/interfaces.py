"""What the router asks of those who do its I/O: send a prefill, free a hand-off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from msgspec import Struct

from ..connectors import Attempt, Question
from ..fleet.endpoint import Endpoint
from .pending import PendingHandoff


class PrefillAnswer(Struct, frozen=True, gc=False):
    """What a prefill instance answered, its body whole."""

    status: int
    content_type: str
    body: bytes
    retry_after: float | None = None
    """Seconds for which a full instance asks to be left alone, if it does."""
    headers: Mapping[str, str] = {}
    """Those by ``KEPT_FROM_PREFILL``, which go to the client with an error of P's."""


class PrefillFailed(Exception):
    """No answer came: ``args[0]`` is a short reason, for metrics and logs.

    ``lost`` says that the connection ended after the request was delivered.
    """

    def __init__(self, reason: str, *, lost: bool = False) -> None:
        super().__init__(reason)
        self.lost = lost


class PrefillNotSent(PrefillFailed):
    """It was not sent, for a reason of our own that says nothing of the instance."""


class LocalShortage(PrefillNotSent):
    """This machine has no file descriptor, port, buffer or memory left: any other instance is no better."""


class PrefillLeg(Protocol):
    """Sends the prefill request; the only I/O between a request's arrival and its forwarding."""

    async def __call__(
        self,
        endpoint: Endpoint,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        attempt: Attempt,
        sent: Callable[[], object] | None = None,
    ) -> PrefillAnswer:
        """Return the answer, whatever its status; raises :exc:`PrefillFailed` if there is none.

        ``headers`` are the client's, ``attempt`` has more and tells what hand-off an answer has. ``sent`` is
        called when a connection has taken the request.

        :exc:`PrefillNotSent` and :exc:`LocalShortage`, which are that too, are not the instance's fault.
        """
        ...


class EncodeLeg(Protocol):
    """Sends a request to an encode instance."""

    async def __call__(
        self,
        endpoint: Endpoint,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        own: Mapping[str, str],
    ) -> PrefillAnswer:
        """Return the answer, whatever its status; raises as a :class:`PrefillLeg` does.

        ``headers`` are the client's; those in ``own`` count before them. Cancelling ends the request.
        """
        ...


class AskPrefill(Protocol):
    """Asks a P what a connector must know of it before a request is split with it."""

    async def __call__(self, endpoint: Endpoint, question: Question, attempt: Attempt) -> Any:
        """Return what the answer says, as ``attempt`` understands it.

        Raises :exc:`PrefillFailed` if there is none that makes sense, :exc:`LocalShortage`, and
        :exc:`~vllm_pd_scheduler.connectors.ConnectorFailed`.
        """
        ...

    def forget(self, endpoint: Endpoint) -> None:
        """Ask again before the next request."""
        ...


class AbortLeg(Protocol):
    """Ends one leg of an attempt at the instance that has it, in the background."""

    def __call__(self, endpoint: Endpoint, attempt: Attempt) -> None:
        """Start to end it; raises nothing."""
        ...


class ReleaseHandoff(Protocol):
    """Frees a hand-off on P in the background."""

    def __call__(self, pending: PendingHandoff) -> None:
        """Start to free it; raises nothing."""
        ...
