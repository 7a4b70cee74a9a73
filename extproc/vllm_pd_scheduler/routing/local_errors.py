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
_NO_METASERVER = (
    "metaserver_port is not set%.0s: decode instances of which one asks for the prefill do it by themselves"
)
_SHORTAGE = "a prefill could not be sent, which is no instance's fault: %s on this machine"

_TEXTS = {"listener": _NO_LISTENER, "metaserver": _NO_METASERVER}


class LocalErrors:
    """Local errors by kind, a label of their metric. ``listener`` is the setting ``prefill_listener``."""

    def __init__(self, telemetry: Telemetry, listener: str | None, clock: Callable[[], float]) -> None:
        self._telemetry = telemetry
        self._listener = listener
        self._pace = Pace(clock)

    def add(self, kind: str) -> None:
        """Count one. Log it, at most once a minute for each kind."""
        self._telemetry.process.local_error(kind)
        if self._pace.due(kind):
            text, what = _TEXTS.get(kind, _SHORTAGE), self._listener if kind == "listener" else kind
            log.error(f"{text} (logged at most once a minute)", what)
