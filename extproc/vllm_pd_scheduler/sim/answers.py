"""Answers of the OpenAI API, whole and as events of a stream, with the fields that vLLM 0.32 sends."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec

from .text import said_id


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: of all its prompts, of all its choices, and how many of the prompts were cached.

    ``cached_tokens`` is None for answers in which vLLM gives no details.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None

    def body(self) -> dict[str, Any]:
        """Return the ``usage`` object, as vLLM sends it with ``--enable-prompt-tokens-details``."""
        details = None if self.cached_tokens is None else {"cached_tokens": self.cached_tokens}
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": details,
        }


@dataclass(frozen=True, slots=True)
class Shape:
    """Makes the JSON of the answer to one request, a completion or (``chat``) a chat completion.

    Those of other APIs are in :mod:`.other_answers`.
    """

    request_id: str
    model: str
    chat: bool
    created: int = field(default_factory=lambda: int(time.time()))
    token_ids: list[int] | None = None
    """Of the prompt, if they are asked for: a chat has them at its top level."""

    @property
    def answer_id(self) -> str:
        """The request's id, with a prefix for the kind of answer."""
        return f"{'chatcmpl' if self.chat else 'cmpl'}-{self.request_id}"

    def whole(self, choices: list[dict[str, Any]], usage: Usage, params: dict[str, Any] | None) -> bytes:
        """Return an answer that is not streamed; ``params`` are its ``kv_transfer_params``."""
        body = self._head("chat.completion" if self.chat else "text_completion", choices)
        body |= {
            "service_tier": None,
            "system_fingerprint": None,
            "usage": usage.body(),
            "prompt_logprobs": None,
            **({"prompt_token_ids": self.token_ids} if self.chat else {}),
        }
        return msgspec.json.encode(body | {"kv_transfer_params": params})

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """Return a choice of an answer that is not streamed."""
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}}
        if not self.chat:
            content["prompt_token_ids"] = self.token_ids
        return {
            "index": index,
            **content,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": None,
        }

    def opening(self, index: int) -> bytes:
        """Return the first event of a choice of a chat completion; completions have none."""
        if not self.chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        ids = {} if self.token_ids is None else {"prompt_token_ids": self.token_ids}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._event([choice], **ids)

    def token(self, index: int, text: str, finish_reason: str | None, first: bool = False) -> bytes:
        """Return the event of a token, with its id if ids are asked for; the ``first`` has the prompt's."""
        content: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}
        if finish_reason or not self.chat:
            choice["stop_reason"] = None
        if self.token_ids is not None:
            if not self.chat:
                choice["prompt_token_ids"] = self.token_ids if first else None
            choice["token_ids"] = [said_id(text)] if text else []
        return self._event([choice])

    def closing(self, usage: Usage, wanted: bool) -> bytes:
        """Return the last events; ``wanted`` says whether ``stream_options.include_usage`` asks for usage."""
        return (self._event([], usage=usage.body()) if wanted else b"") + DONE

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event(self._head("chat.completion.chunk" if self.chat else "text_completion", choices) | more)


DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def model_list(
    model: str, max_model_len: int, created: int, adapters: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the answer of ``/v1/models``; ``created`` in Unix seconds, ``adapters`` with their paths."""
    card = {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": model,
        "parent": None,
    }
    data = [card | {"max_model_len": max_model_len, "permission": []}]
    for name, path in adapters.items():
        adapter = {"id": name, "root": path, "parent": model}
        data.append(card | adapter | {"max_model_len": None, "permission": []})
    return {"object": "list", "data": data}
