"""When an instance has enough to do: the configuration's limits, and what it says itself."""

from __future__ import annotations

from ..config import SchedulerConfig
from ..fleet.endpoint import Endpoint
from ..models import InstanceRole


class Limits:
    """The limits ``max_waiting``, ``max_kv_usage`` and ``max_in_flight_tokens``, as they are configured."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config

    @property
    def some(self) -> bool:
        """Whether there is any."""
        config = self._config
        return (config.max_waiting, config.max_kv_usage, config.max_in_flight_tokens) != (None,) * 3

    def saturated(self, endpoint: Endpoint, now: float) -> bool:
        """Whether an endpoint has reached one of them, or has said that it is full."""
        config = self._config
        return (
            now < endpoint.pause.until
            or (config.max_waiting is not None and _waiting(endpoint) >= config.max_waiting)
            or (config.max_kv_usage is not None and _kv_usage(endpoint) >= config.max_kv_usage)
            or (config.max_in_flight_tokens is not None and endpoint.tokens >= config.max_in_flight_tokens)
        )


def _waiting(endpoint: Endpoint) -> float:
    """Return the requests that are queued on an endpoint, for ``max_waiting``.

    What was sent since the last scrape counts as waiting. Not so on decode, which starts a request at once
    if it has room for it: there it counts only if others had to wait at the last scrape.
    """
    if endpoint.instance.role is InstanceRole.DECODE and not (endpoint.metrics and endpoint.metrics.waiting):
        return 0.0
    return endpoint.waiting


def _kv_usage(endpoint: Endpoint) -> float:
    """Return the share of the KV cache in use: as scraped, or as reserved by us if that is more."""
    if not endpoint.kv_capacity:
        return endpoint.kv_usage
    return max(endpoint.kv_usage, endpoint.kv_tokens / endpoint.kv_capacity)
