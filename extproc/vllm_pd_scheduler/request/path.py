"""Which paths clients may ask for.

Envoy makes one spelling of a path out of many before anybody looks at it: it resolves dots, joins slashes and
decodes what need not be encoded. What is still spelled another way than here is no path of ours, so nothing
can mean one thing to the router and another to the engine, which decodes once more.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

SPLIT_PATHS: Final = ("/v1/chat/completions", "/v1/completions")
"""Paths that are always public."""

MODELS_PATH: Final = "/v1/models"
"""Path of the list of models."""

HEALTH_PATH: Final = "/health"
"""Path of the health of the fleet, which our own Envoy answers; of a model, with the query ``model=``."""

PING_PATH: Final = "/ping"
"""Another name of the health of the fleet."""

PUBLIC_PATHS: Final = (
    "/v1/models",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/responses/*",
    "/v1/responses/*/cancel",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/cohere/v2/chat",
    "/v1/embeddings",
    "/v2/embed",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/realtime",
    "/pooling",
    "/classify",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/tokenize",
    "/detokenize",
    "/version",
)
"""What is public beside those by default: vLLM's paths for clients, none by which an instance is run."""

PUBLIC_PATH: Final = r"^(/([A-Za-z0-9_~:-][A-Za-z0-9._~:-]*|\*))+$"
"""A path that can be made public; ``*`` stands for any one segment."""

_SEGMENT = "[A-Za-z0-9_~:-][A-Za-z0-9._~:-]*"


def path_regex(path: str) -> str:
    """Return a regular expression, the same for Envoy and Python, that matches a public path whole."""
    return path.replace(".", "[.]").replace("*", _SEGMENT)


class PublicPaths:
    """The paths that clients may ask for: those that are split, and ``others``."""

    def __init__(self, others: Collection[str]) -> None:
        self._exact = {*SPLIT_PATHS, *(path for path in others if "*" not in path)}
        self._patterns = [re.compile(path_regex(path)) for path in others if "*" in path]

    def __contains__(self, path: str) -> bool:
        return path in self._exact or any(each.fullmatch(path) for each in self._patterns)
