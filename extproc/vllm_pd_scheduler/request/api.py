"""The APIs whose requests are split: what each calls the prompt, and what bounds its answer.

Sources: vLLM's ``entrypoints/openai/completion``, ``chat_completion`` and ``responses``, ``anthropic`` and
``scale_out/token_in_token_out``, version 0.32, and SGLang's ``entrypoints/http_server.py``, version 0.5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, eq=False)
class Api:
    """What routing and connectors need to know of an API."""

    path: str
    """Where requests of it are sent."""
    prompt: tuple[str, ...]
    """Fields that have the prompt, in the order in which it is read; what has none of them, vLLM refuses."""
    limits: tuple[str, ...]
    """Fields that bound the answer's tokens, the one that counts first."""
    one_token: Mapping[str, bytes]
    """Fields, with JSON texts, that make the answer one token in one piece; for P they replace the client's.

    With ``/inference/v1/generate`` the limit is in ``sampling_params``: :func:`.one_token.one_token` sets it.
    """
    dropped: frozenset[str]
    """Fields of the client's that are left out of a request for one token: vLLM would refuse them in it."""
    stops: frozenset[str]
    """Fields that name what ends an answer."""
    past_stop: Mapping[str, bytes]
    """Fields, with JSON texts, by which the first token cannot be an end; none if the API cannot say it."""


_STREAM_OF_ONE: Final = frozenset({"min_tokens", "stream_options"})
"""vLLM refuses ``min_tokens`` above ``max_tokens``, and ``stream_options`` without ``stream``."""
_STOPS: Final = frozenset({"stop", "stop_token_ids"})
_NO_END: Final = {"min_tokens": b"1"}

COMPLETIONS: Final = Api(
    "/v1/completions",
    ("prompt",),
    ("max_tokens",),
    {"max_tokens": b"1", "stream": b"false"},
    _STREAM_OF_ONE,
    _STOPS,
    _NO_END,
)
CHAT: Final = Api(
    "/v1/chat/completions",
    ("messages",),
    ("max_completion_tokens", "max_tokens"),
    {"max_tokens": b"1", "stream": b"false"},
    _STREAM_OF_ONE | {"max_completion_tokens"},
    _STOPS,
    _NO_END,
)
RESPONSES: Final = Api(
    "/v1/responses",
    ("instructions", "input"),
    ("max_output_tokens",),
    {"max_output_tokens": b"1", "stream": b"false", "store": b"false"},
    _STREAM_OF_ONE,
    _STOPS,
    {},
)
MESSAGES: Final = Api(
    "/v1/messages",
    ("system", "messages"),
    ("max_tokens",),
    {"max_tokens": b"1", "stream": b"false"},
    frozenset(),
    frozenset({"stop_sequences"}),
    {},
)
GENERATE: Final = Api(
    "/inference/v1/generate",
    ("token_ids",),
    (),
    {"stream": b"false"},
    frozenset({"stream_options"}),
    frozenset(),
    {},
)
"""Token ids in, token ids out. What bounds or ends the answer is in ``sampling_params``."""

NATIVE: Final = Api(
    "/generate",
    ("text", "input_ids"),
    (),
    {"stream": b"false"},
    frozenset({"stream_options"}),
    frozenset(),
    {},
)
"""SGLang's own: text or token ids. What bounds or ends the answer is in ``sampling_params``."""

APIS: Final = {api.path: api for api in (CHAT, COMPLETIONS, RESPONSES, MESSAGES, GENERATE, NATIVE)}
"""By their paths."""
