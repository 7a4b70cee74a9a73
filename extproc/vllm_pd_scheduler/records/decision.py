"""Why one request went where it went, and what became of it.

It is noted while the request is served, so it is cheap: references to what is there anyway (tuples of
endpoints that are replaced when they change), the scores that the strategy has computed, and a few numbers.
What they mean is worked out when somebody asks, in :mod:`.explained`.

A thousand of them are kept, and the garbage collector would look at each again and again. So what is here is
nothing that it tracks (``gc=False``): none of these refers to what refers to it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from msgspec import Struct

from ..fleet.endpoint import Endpoint
from ..telemetry import Ending, Served

MAX_ENCODE_ATTEMPTS = 32
"""Items sent to encode instances that are kept of one request."""

MAX_TEXT = 256
"""Characters of what a client can choose (its model's name, its path) that are kept."""

OK = "ok"
"""How an attempt ended that did not fail."""

NO_SCORES = array("d")


class Choice(Struct, gc=False, eq=False):
    """One pick of a strategy: whom it could have, and whom it has taken."""

    strategy: str
    """Name of the strategy that has ranked."""
    picked: Endpoint
    """The one that it has taken."""
    terms: dict[str, float]
    """What the score of that is made of, if the strategy says that."""
    offered: tuple[Endpoint, ...]
    """Whom it was offered; of a large fleet ``picked`` alone."""
    scores: array[float]
    """The scores of ``offered``, as many numbers for each, the least being the best; empty: it has none."""
    number: int
    """How many it was offered."""
    out_of_service: tuple[tuple[Endpoint, str], ...]
    """Endpoints of the role that nothing is sent to, and their state."""
    routable: tuple[Endpoint, ...]
    """The others."""
    serving: tuple[Endpoint, ...]
    """Those of ``routable`` that may serve the model."""
    on_trial: tuple[Endpoint, ...]
    tried: tuple[Endpoint, ...]
    """Those that had failed the request before."""
    complete: bool
    """Whether all that could serve the request were offered: no sample was drawn, and ``offered`` has all."""


class Attempt(Struct, gc=False, eq=False):
    """A request at one instance."""

    instance: str
    """Its id; its address if it is none that is known."""
    outcome: str | None = None
    """``OK``, or how it failed; ``None`` while it runs, and if the client has left meanwhile."""
    at: float = 0.0
    """When the instance was chosen, in the scheduler's monotonic seconds."""
    predicted: float | None = None
    """Seconds from then on that it was predicted to take."""
    took: float | None = None
    source: str = ""
    """Id of another instance, from which P was to pull what that had cached."""
    pulled: float = 0.0
    """Prompt tokens that it was to pull."""


class Decision(Struct, gc=False, eq=False):
    """What is known of one request."""

    arrived: float = 0.0
    """In the scheduler's monotonic seconds."""
    request_id: str = ""
    """The client's ``X-Request-Id``, or Envoy's."""
    path: str = ""
    number: int = 0
    """1 for the first since the scheduler was started; 0 while it is not decided."""
    id: str = ""
    """Our own, ``x-pd-id``; empty if it was not sent to decode."""
    model: str | None = None
    asked_model: str | None = None
    """The name that its client has used, if a rule has given it ``model`` for that."""
    stream: bool = False
    prompt_tokens: float = 0.0
    served: Served | None = None
    """``None``: it was not sent to decode."""
    not_split: str | None = None
    """Why D was to do all of it, as in ``docs/scheduling.md``; ``None`` if it was split, or passed on."""
    status: int | None = None
    """Of the answer; ``None`` while that is not known."""
    reason: str | None = None
    """Why the scheduler has refused it."""
    continues_from: str | None = None
    """The D that has failed the answer of which this request is the rest; ``None``: it is no rest."""
    continues_after: int = 0
    """How many tokens of that answer the client had."""
    waited: float = 0.0
    """Seconds in the scheduler's queue."""
    media: int = 0
    """Images, videos and sounds in it that an encode instance was asked for."""
    encoded: int = 0
    """Those of them that one has encoded."""
    encode_took: float = 0.0
    """Seconds until the last of them."""
    encode_attempts: tuple[Attempt, ...] = ()
    prefill: Choice | None = None
    decode: Choice | None = None
    """The newest pick for that role."""
    decode_to: Sequence[Endpoint] = ()
    """The D that Envoy was given, in turn."""
    prefill_attempts: tuple[Attempt, ...] = ()
    decode_attempts: tuple[Attempt, ...] = ()
    """Those that failed."""
    answered_by: str | None = None
    """The D whose answer the client has, or has a part of."""
    predicted_ttft: float | None = None
    ttft: float | None = None
    """Seconds to the first byte of the answer's body, by Envoy's clock."""
    duration: float | None = None
    """Seconds to the end of the answer, by the same."""
    ending: Ending | None = None

    def is_of(self, request_id: str) -> bool:
        """Whether a request has this ``X-Request-Id``, or this id of ours."""
        return request_id[:MAX_TEXT] == self.request_id or request_id == self.id != ""

    def admitted(self, choice: Choice | None, waited: float) -> None:
        """Note that P was chosen for it, or nobody, after it has waited."""
        self.waited += waited
        if choice is not None:
            self.prefill = choice

    def encode_begins(self, instance: str, at: float) -> Attempt:
        """Note that an item is sent to an encode instance; return it, for its end to be written there."""
        attempt = Attempt(instance, None, at)
        if len(self.encode_attempts) < MAX_ENCODE_ATTEMPTS:
            self.encode_attempts += (attempt,)
        return attempt

    def media_encoded(self, media: int, encoded: int, took: float) -> None:
        """Note how many of its items were encoded before the prefill."""
        self.media, self.encoded, self.encode_took = media, encoded, took

    def prefill_begins(self, instance: str, at: float, predicted: float) -> Attempt:
        """Note an attempt at prefill; return it, for its end to be written there."""
        attempt = Attempt(instance, None, at, predicted)
        self.prefill_attempts += (attempt,)
        return attempt

    def decode_failed(self, instance: str, failure: str) -> None:
        """Note an attempt at decode that has failed."""
        self.decode_attempts += (Attempt(instance, failure),)

    def refused(self, status: int, reason: str, now: float) -> None:
        """Note that the scheduler has answered the request itself."""
        self.status, self.reason, self.duration = status, reason, now - self.arrived

    def ended(
        self, ending: Ending, status: int, ttft: float | None, duration: float | None, answered_by: str | None
    ) -> None:
        """Note how its answer has ended."""
        self.ending, self.status = ending, status or None
        self.ttft, self.duration, self.answered_by = ttft, duration, answered_by
