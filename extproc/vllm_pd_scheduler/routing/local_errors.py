"""Counts and logs what keeps prefills from being sent for a reason of our own, not an instance's."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..telemetry.metrics import Telemetry
from ..telemetry.pace import Pace

log = logging.getLogger(__name__)

_NO_LISTENER = (
    "nobody listens at prefill_listener %s: decode instances prefill by themselves. Run the Envoy with that "
    "listener (`up` and `envoy-config --config` render it), or correct or remove the setting"
)
_SHORTAGE = "a prefill could not be sent, which is no instance's fault: %s on this machine"


class LocalErrors:
    """Local errors by kind, a label of their metric. ``listener`` is the setting ``prefill_listener``."""

    def __init__(self, telemetry: Telemetry, listener: str | None, clock: Callable[[], float]) -> None:
        self._telemetry = telemetry
        self._listener = listener
        self._pace = Pace(clock)

    def add(self, kind: str) -> None:
        """Count one. Log it, at most once a minute for each kind."""
        self._telemetry.local_error(kind)
        if self._pace.due(kind):
            text, what = (_NO_LISTENER, self._listener) if kind == "listener" else (_SHORTAGE, kind)
            log.error(f"{text} (logged at most once a minute)", what)
