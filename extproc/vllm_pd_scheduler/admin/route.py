"""A route of the admin interface: what it takes, what it answers and what it does, declared once.

The index, the check of query and body, and ``/openapi.json`` are all made of these declarations.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar, get_type_hints

from aiohttp import web
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from ..config import describe_error
from ..models import By

Model = TypeVar("Model", bound=BaseModel)

Answer = type[BaseModel] | str | None
"""What an answer holds: JSON of a model, another media type, or nothing."""

Handler = Callable[..., Awaitable[web.StreamResponse]]
"""Answers a request. It takes that and, if it wants them, ``query`` and ``body``: the annotations of these
parameters say what may be in them."""


class Query(BaseModel):
    """The query of a route: a model with a field for each key that there is."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Body(BaseModel):
    """The JSON body of a request."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Shown(BaseModel):
    """JSON of an answer. A field that was not set is left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ErrorAnswer(Shown):
    """Why a request was refused."""

    error: str


class Refused(Exception):
    """Ends a handler with an error: its arguments are the HTTP status and the message."""


def _read_flag(value: object) -> bool:
    if value not in ("true", "false"):
        raise ValueError("must be 'true' or 'false'")
    return value == "true"


Flag = Annotated[bool, BeforeValidator(_read_flag)]
"""A key of a query that is ``true`` or ``false``."""


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path."""

    method: str
    path: str
    """With ``{id}`` and the like for what differs."""
    summary: str
    """What it does, in a line."""
    handler: Handler
    answers: Mapping[int, Answer]
    """What is answered when all goes well, by status."""
    refusals: tuple[int, ...] = ()
    """Further statuses with an :class:`ErrorAnswer`, beside those that each request may get."""
    also: tuple[str, ...] = ()
    """Media types that a 200 has in place of that if the client's ``Accept`` prefers one."""
    open: bool = False
    """Whether anybody may ask, without a token and by any host."""

    @property
    def query(self) -> type[Query]:
        """What may be in the query."""
        found: type[Query] = get_type_hints(self.handler).get("query", Query)
        return found

    @property
    def body(self) -> type[BaseModel] | None:
        """What must be in the body; ``None``: there is none."""
        return get_type_hints(self.handler).get("body")

    @property
    def reads_only(self) -> bool:
        """Whether it changes nothing."""
        return self.method == "GET"

    def checked(self) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return the handler behind the check of query and body. What it would not look at is refused."""
        query, body, handler = self.query, self.body, self.handler
        takes_query = query is not Query

        async def answer(request: web.Request) -> web.StreamResponse:
            given: dict[str, BaseModel] = {}
            found = _read_query(request, query)
            if takes_query:
                given["query"] = found
            if body is not None:
                given["body"] = await _read_body(request, body)
            elif not self.reads_only and await request.read():
                await _read_body(request, Body)
            return await handler(request, **given)

        return answer


class Api(Protocol):
    """A group of routes."""

    def routes(self) -> Iterable[Route]:
        """Return its routes."""


def json_answer(shown: Shown, status: int = 200) -> web.Response:
    """Return an answer with a body."""
    text = shown.model_dump_json(exclude_unset=True)
    return web.Response(text=text, status=status, content_type="application/json")


def error_answer(status: int, reason: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return an answer that refuses a request."""
    return web.json_response({"error": reason}, status=status, headers=headers)


def asked_by(request: web.Request) -> str:
    """Return who asks, as events name them."""
    return f"{By.ADMIN} {request.remote}" if request.remote else By.ADMIN  # a Unix socket has no address


def _read_query(request: web.Request, model: type[Query]) -> Query:
    """Return the query of a request; raise :exc:`Refused`, as ``drain?wiat=true`` is no drain that waits."""
    known = model.model_fields
    for key in request.query:
        if key not in known:
            taken = " and ".join(known) or "none"
            raise Refused(400, f"query: unknown key {key!r}; {request.path} takes {taken}")
        if len(request.query.getall(key)) > 1:
            raise Refused(400, f"query: {key} is given twice")
    return _validated(model.model_validate, dict(request.query))


async def _read_body(request: web.Request, model: type[Model]) -> Model:
    """Return the JSON body of a request; raise :exc:`Refused` with everything that is wrong with it."""
    if request.content_type != "application/json":
        # Against cross-site request forgery: a web page can make its visitor's browser send other types to a
        # loopback port, but for this one the browser asks the server first (CORS).
        raise Refused(415, "the body must be JSON, with content-type: application/json")
    return _validated(model.model_validate_json, await request.read())


def _validated(validate: Callable[[Any], Model], given: object) -> Model:
    try:
        return validate(given)
    except ValidationError as error:
        raise Refused(400, "; ".join(map(describe_error, error.errors(include_url=False)))) from None
