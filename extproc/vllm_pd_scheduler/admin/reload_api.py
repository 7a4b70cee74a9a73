"""Reads the configuration again: ``/reload``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

from aiohttp import web

from ..config import ConfigError, Reloaded
from .others import Others
from .route import Refused, Route, Shown, asked_by, json_answer

Reload = Callable[[str], Awaitable[Reloaded]]
"""Reads the configuration again for somebody; raises :exc:`ConfigError`."""


class ReloadAnswer(Shown):
    """The keys of the configuration that have changed since it was last read."""

    changed: list[str]
    """Those that count from now on."""
    needs_restart: list[str]
    """Those that stay as they were until the next start."""


class ReloadApi:
    """Has the configuration read again, by the ``others`` too.

    ``reload`` is ``None`` if it came from no file.
    """

    def __init__(self, reload: Reload | None, others: Others | None = None) -> None:
        self._reload = reload
        self._others = others

    def routes(self) -> Iterator[Route]:
        """Return the routes."""
        answers = {200: ReloadAnswer}
        yield Route(
            "POST", "/reload", "Read the configuration again", self._post, answers, refusals=(409, 422)
        )

    async def _post(self, request: web.Request) -> web.Response:
        if self._reload is None:
            raise Refused(409, "the configuration comes from no file")
        try:
            outcome = await self._reload(asked_by(request))
        except ConfigError as error:
            raise Refused(422, "; ".join(str(error).splitlines())) from None
        if self._others is not None:
            await self._others.pass_on(request)
        return json_answer(ReloadAnswer(changed=outcome.changed, needs_restart=outcome.needs_restart))
