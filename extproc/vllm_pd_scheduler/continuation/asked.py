"""What a client asks for, and whether an answer to it can go on at another instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"

MAX_BODY_BYTES: Final = 1 << 20
"""A longer body is not read: the event loop would stand still for it."""

_KEPT: Final = frozenset(
    {"model", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos"}
    | {"repetition_penalty", "logit_bias", "skip_special_tokens", "spaces_between_special_tokens"}
    | {"user", "cache_salt", "priority", "stream_options"}
)
"""Fields that mean the same for the rest of an answer; ``repetition_penalty`` looks at the prompt too."""
_SPENT: Final = frozenset(
    {"messages", "prompt", "stream", "max_tokens", "max_completion_tokens", "return_token_ids"}
    | {"add_generation_prompt", "continue_final_message", "add_special_tokens"}
    | {"chat_template_kwargs", "metadata", "store"}
)
"""Fields that the token ids of the prompt have in them, or that are written anew."""
_AS_IF_ABSENT: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none",),
}

_SAYS_MUCH: Final = frozenset({"logprobs", "prompt_logprobs", "include_reasoning"})
"""Fields of which a 0, or ``false``, is a wish: for each token's own log probability, for no thoughts."""


class Asked:
    """A streamed request whose answer can go on; ``None`` from :meth:`read` if it cannot.

    One choice of text, of which nothing looks at the answer so far but the model itself: no stop strings,
    tools, structure, log probabilities or penalties of the answer's own words.
    """

    def __init__(self, path: str, body: bytes, fields: dict[str, Any]) -> None:
        self._kept = {name: value for name, value in fields.items() if name in _KEPT}
        self.path = path
        self.shows_ids = bool(fields.get("return_token_ids"))
        """Whether the client wants the token ids too."""
        self.body = body if self.shows_ids else body.rstrip()[:-1] + b',"return_token_ids":true}'
        """The client's, with the wish to be told the token ids. Empty once the answer has begun."""
        options = fields.get("stream_options") or {}
        self.usage = bool(options.get("include_usage"))
        """Whether the stream ends with an event of usage."""
        self.max_tokens: int | None = fields.get("max_tokens")
        if path == CHAT:
            self.max_tokens = fields.get("max_completion_tokens") or self.max_tokens
        elif self.max_tokens is None:
            self.max_tokens = 16  # vLLM's default

    @classmethod
    def read(cls, path: str, body: bytes) -> Asked | None:
        """Return a request, if its answer can go on."""
        if path not in (CHAT, COMPLETIONS) or len(body) > MAX_BODY_BYTES:
            return None
        try:
            fields = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        return cls(path, body, fields) if isinstance(fields, dict) and _can_go_on(path, fields) else None

    @property
    def model(self) -> str | None:
        """The model that is asked for."""
        return self._kept.get("model")

    def rest(self, ids: Sequence[int], max_tokens: int) -> bytes:
        """Return the body of a completion that writes what comes after these tokens."""
        more = {"prompt": list(ids), "max_tokens": max_tokens, "stream": True}
        if self.shows_ids:
            more["return_token_ids"] = True
        return msgspec.json.encode(self._kept | more)


def _can_go_on(path: str, fields: dict[str, Any]) -> bool:
    if fields.get("stream") is not True:
        return False
    for name, value in fields.items():
        known = name in _KEPT or name in _SPENT or value in _AS_IF_ABSENT.get(name, ())
        says_nothing = not value  # null, 0, false and what is empty
        if name in _SAYS_MUCH:
            says_nothing = value is None or (name == "logprobs" and value is False)
        if not known and not says_nothing:
            return False
    options = fields.get("stream_options")
    limits = [fields.get("max_tokens"), fields.get("max_completion_tokens")]
    if not (options is None or isinstance(options, dict)):
        return False
    if any(type(limit) is not int or limit < 1 for limit in limits if limit is not None):
        return False
    return _is_text(fields.get("messages")) if path == CHAT else _is_prompt(fields.get("prompt"))


def _is_text(messages: Any) -> bool:
    """Whether messages have no images, video or audio."""
    if not isinstance(messages, list) or not messages:
        return False
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else 0
        parts = content if isinstance(content, list) else []
        if not (content is None or isinstance(content, str | list)):
            return False
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            return False
    return True


def _is_prompt(prompt: Any) -> bool:
    """Whether it is one prompt, a text or token ids."""
    return isinstance(prompt, str) or (
        isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)
    )
