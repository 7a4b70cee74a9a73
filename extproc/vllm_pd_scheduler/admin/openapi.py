"""The OpenAPI document of the admin interface, made of the declarations of its routes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .. import __version__
from .route import ErrorAnswer, Query, Route

_STATUS = {
    200: "Done",
    201: "Added",
    202: "Begun",
    204: "Done",
    400: "The request is wrong; the message says what is",
    401: "The token is missing or wrong",
    403: "A web page of another site may change nothing",
    404: "There is no such thing",
    409: "That is not possible as things are",
    422: "The configuration is refused, so nothing was changed",
    413: "The body is too large",
    415: "The body is not said to be JSON",
    421: "The host is not this machine, and there is no token",
    503: "The scheduler cannot serve",
    507: "The change could not be kept, so nothing was changed",
}
"""What each status means here."""

_ANY = (400, 401, 421)
"""Refusals that each request may get, but for 401 and 421 of an open one."""

_CHANGE = (403, 413, 415)
"""Further ones of those that change something."""

_Mode = Literal["validation", "serialization"]


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """Return the document as JSON."""
    names, definitions = models_json_schema(
        sorted(set(_models(routes)), key=lambda each: (each[0].__name__, each[1])),
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, names)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vLLM PD Scheduler: admin interface",
            "version": __version__,
            "description": "For operators: what the fleet does, and how to steer it.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _models(routes: Iterable[Route]) -> Iterator[tuple[type[BaseModel], _Mode]]:
    yield ErrorAnswer, "serialization"
    for route in routes:
        if route.body is not None:
            yield route.body, "validation"
        for answer in route.answers.values():
            if isinstance(answer, type):
                yield answer, "serialization"


_Names = Mapping[Any, dict[str, Any]]
"""Where the schema of a model is, by model and mode."""


def _operation(route: Route, names: _Names) -> dict[str, Any]:
    refusals = {*_ANY, *route.refusals} if route.reads_only else {*_ANY, *_CHANGE, *route.refusals}
    if route.open:
        refusals -= {401, 421}
    error = {"application/json": {"schema": names[ErrorAnswer, "serialization"]}}
    answers: dict[str, Any] = {}
    for status, answer in route.answers.items():
        content: dict[str, Any] = {media: {} for media in route.also} if status == 200 else {}
        if isinstance(answer, str):
            content[answer] = {}
        elif answer is not None:
            content["application/json"] = {"schema": names[answer, "serialization"]}
        answers[str(status)] = {"description": _STATUS[status], **({"content": content} if content else {})}
    for status in sorted(refusals):
        answers[str(status)] = {"description": _STATUS[status], "content": error}
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}{re.sub('[^a-z0-9]+', '_', route.path)}".rstrip("_"),
        "summary": route.summary,
        "security": [] if route.open else [{}, {"token": []}],
        "responses": answers,
    }
    if parameters := [*_of_the_path(route.path), *_of_the_query(route.query)]:
        operation["parameters"] = parameters
    if route.body is not None:
        content = {"application/json": {"schema": names[route.body, "validation"]}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _of_the_path(path: str) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _of_the_query(query: type[Query]) -> Iterator[dict[str, Any]]:
    schema = query.model_json_schema()
    for name, of_key in schema.get("properties", {}).items():
        parameter = {"name": name, "in": "query", "required": name in schema.get("required", ())}
        if "description" in of_key:
            parameter["description"] = of_key["description"]
        yield {**parameter, "schema": _resolved(of_key, schema.get("$defs", {}))}


def _resolved(schema: Any, definitions: dict[str, Any]) -> Any:
    """Return a schema with what it refers to in its place: a parameter has no definitions of its own."""
    if isinstance(schema, list):
        return [_resolved(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _resolved(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _resolved(value, definitions) for key, value in schema.items()}
