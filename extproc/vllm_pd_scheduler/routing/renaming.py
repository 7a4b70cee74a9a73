"""Gives a request the model that it gets in place of the one that it asks for."""

from __future__ import annotations

from collections.abc import Mapping

from ..models import InstanceRole
from ..records.decision import MAX_TEXT, Decision
from ..request.body import JsonBody
from ..request.json_text import Steps
from ..request.reader import RequestReader
from ..request.rewrites import Rewrites
from ..scheduler import Scheduler
from ..telemetry import Telemetry


class Renaming:
    """Writes the name that the rules give into a request's body: once, for P, D and all attempts."""

    def __init__(
        self, rewrites: Rewrites, scheduler: Scheduler, reader: RequestReader, telemetry: Telemetry
    ) -> None:
        self.rewrites = rewrites
        self._scheduler = scheduler
        self._reader = reader
        self._telemetry = telemetry

    def renamed(self, headers: Mapping[str, str], body: JsonBody, decision: Decision) -> Steps[JsonBody]:
        """Return the request as it is served: the same object if no rule is for its model."""
        asked = body.get("model")
        if not isinstance(asked, str):
            return body
        found = self.rewrites.choose(asked, self._reader.session(headers, body), self._can_serve)
        if found is None:
            return body
        rule, model = found
        decision.asked_model = asked[:MAX_TEXT]
        self._telemetry.rewritten(rule, model)
        return body if model == asked else (yield from body.for_model(model))

    def _can_serve(self, model: str) -> bool:
        return self._scheduler.can_serve(InstanceRole.DECODE, model)
