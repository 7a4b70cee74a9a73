"""What the load model learns from the fleet's requests and scrapes, and what it predicts of a new request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..models import InstanceRole, MetricsSnapshot
from ..prediction.load_model import FleetLoad
from ..request.context import RequestContext
from .endpoint import Endpoint
from .reservation import Reservation

_LEAST_BLOCK_TOKENS = 16.0
"""A client can send one token id of a megabyte; no real prompt has so few tokens in a block."""
_MOST_BLOCKS = 1 << 20
"""Of the prefixes of one instance that are remembered, whatever it says of its cache."""
_RECENT = 0.1
"""Weight of the newest request in running means."""


@dataclass(slots=True)
class Learning:
    """What was learned of the whole fleet (``load``) and of its endpoints. Part of the registry."""

    load: FleetLoad
    block_tokens: float = 256.0
    """Tokens of one block of the prefix index, on average over recent requests."""
    usual_prefill: float | None = None
    """Predicted seconds of a prefill, on average over our recent requests; ``None`` before the first."""
    usual_prompt: float = 0.0
    """Tokens of the prompts of these requests, on average."""
    finished: float = 0.0
    """Requests that have ended on decode instances, as those say. It only grows."""
    _untried: dict[InstanceRole, set[Endpoint]] = field(
        default_factory=lambda: {role: set() for role in InstanceRole}
    )
    """Those of which nothing was measured yet."""

    def joined(self, endpoint: Endpoint) -> None:
        """Let a new endpoint follow the fleet until something was measured of itself."""
        self._untried[endpoint.instance.role].add(endpoint)

    def left(self, endpoint: Endpoint) -> None:
        """Forget an endpoint."""
        self._untried[endpoint.instance.role].discard(endpoint)

    def weigh(self, reservation: Reservation, request: RequestContext) -> None:
        """Note the work that a request brings, and that what is cached of its prompt saves."""
        endpoint = reservation.endpoint
        reservation.at = request.now
        if request.blocks:
            size = max(_LEAST_BLOCK_TOKENS, request.block_tokens)
            self.block_tokens += _RECENT * (size - self.block_tokens)
        if endpoint.instance.role is InstanceRole.DECODE:
            reservation.tokens = request.prompt_tokens + request.output_tokens
            return
        load, blocks = endpoint.prefill, request.cached_blocks(endpoint.holder)
        reservation.blocks, reservation.cached_blocks = request.blocks, blocks
        reservation.cached = min(request.prompt_tokens, blocks * request.block_tokens)
        reservation.tokens = max(1.0, request.prompt_tokens - load.trust * reservation.cached)
        reservation.wait = load.remaining(request.now)
        reservation.cost = load.cost(reservation.tokens, request.prompt_tokens)
        self._notes_usual(reservation.cost, request.prompt_tokens)

    def _notes_usual(self, cost: float, prompt: float) -> None:
        if self.usual_prefill is None:
            self.usual_prefill, self.usual_prompt = cost, prompt
        else:
            self.usual_prefill += _RECENT * (cost - self.usual_prefill)
            self.usual_prompt += _RECENT * (prompt - self.usual_prompt)

    def weigh_pull(
        self, reservation: Reservation, request: RequestContext, source: Endpoint, tokens: float, takes: float
    ) -> None:
        """Note that P pulls tokens from a source, which takes time too, and need not compute them."""
        reservation.source, reservation.pulled, reservation.alone = source, tokens, reservation.cost
        reservation.tokens = max(1.0, reservation.tokens - tokens)
        cost = reservation.endpoint.prefill.cost(reservation.tokens, request.prompt_tokens)
        reservation.cost = cost + takes

    def prefilled(
        self, reservation: Reservation, prompt_tokens: int, cached_tokens: int | None, seconds: float
    ) -> None:
        """Learn from a prefill that took ``seconds``, by what the instance says it read.

        ``cached_tokens`` is ``None`` if it does not say; then what was predicted is taken for true.
        """
        load = reservation.endpoint.prefill
        if reservation.source is not None:
            self._pulled(reservation, prompt_tokens, cached_tokens, seconds)
            return
        cached = int(load.trust * reservation.cached) if cached_tokens is None else max(0, cached_tokens)
        if cached_tokens is not None:
            load.learn_cached(reservation.cached, cached)
        load.learn(max(1, prompt_tokens - cached), prompt_tokens, seconds, self.load.prefill)
        self._measured(reservation.endpoint)

    def _pulled(
        self, reservation: Reservation, prompt_tokens: int, cached_tokens: int | None, seconds: float
    ) -> None:
        """Learn what a pull takes: the time in which P has not computed. Of P itself it says little."""
        load, own = reservation.endpoint.prefill, reservation.endpoint.prefill.trust * reservation.cached
        cached = own + reservation.pulled if cached_tokens is None else float(cached_tokens)
        if cached > own:
            computing = load.cost(max(1.0, prompt_tokens - cached), prompt_tokens)
            self.load.learn_pull(cached - own, max(0.0, seconds - computing))

    def first_byte(
        self, prefill: Endpoint, decode: Endpoint, transferred: float, step: float, took: float
    ) -> None:
        """Learn from the seconds in which D has begun to answer with what P has handed over.

        ``transferred`` are the tokens that it had to fetch, ``step`` the predicted seconds of a step there.
        Where requests wait in D's queue, as last scraped, nothing is learned: this one may have waited too.
        """
        metrics = decode.metrics
        if metrics is not None and not metrics.waiting:
            self.load.transfers.learn(prefill.id, decode.id, transferred, took - step)

    def scraped(self, endpoint: Endpoint, before: MetricsSnapshot | None, now: MetricsSnapshot) -> None:
        """Learn from what an instance says of itself, and has said ``before``."""
        if now.kv_capacity is not None:
            blocks = int(now.kv_capacity / self.block_tokens)
            endpoint.holder.resize(min(max(1, blocks), _MOST_BLOCKS))
        if endpoint.instance.role is not InstanceRole.DECODE:
            endpoint.prefill.refit(self.load.prefill)
            return
        self.finished += max(0.0, now.finished)
        self.load.learn_output(now.output_tokens, now.finished)
        if now.transfer is not None:
            self.load.learn_transfer(now.transfer)
        if before is None or now.step_time is None:
            return
        batch = (before.running + now.running) / 2
        kv_tokens = (before.kv_usage + now.kv_usage) / 2 * (endpoint.kv_capacity or 0.0)
        if batch > 0:
            endpoint.decode.learn(batch, kv_tokens, now.step_time, self.load.decode)
            self._measured(endpoint)

    def told(self, prefill: Sequence[float], decode: Sequence[float]) -> None:
        """Use what another replica of the scheduler has learned, for a role that nothing was learned of."""
        for role, fleet, learned in (
            (InstanceRole.PREFILL, self.load.prefill, prefill),
            (InstanceRole.DECODE, self.load.decode, decode),
        ):
            if not fleet.samples:
                fleet.adopt(learned)
                self._tell_untried(role)

    def _measured(self, endpoint: Endpoint) -> None:
        """Tell what the fleet has learned to those of a role of which nothing was measured yet."""
        role = endpoint.instance.role
        self._untried[role].discard(endpoint)
        self._tell_untried(role)

    def _tell_untried(self, role: InstanceRole) -> None:
        for other in self._untried[role]:
            if role is InstanceRole.DECODE:
                other.decode.adopt(self.load.decode)
            else:
                other.prefill.adopt(self.load.prefill)
