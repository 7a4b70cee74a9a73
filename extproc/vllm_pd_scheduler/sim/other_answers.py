"""Answers of vLLM's other APIs that generate: Responses, Anthropic's Messages, and token ids."""

from typing import Any

import msgspec

from .answers import DONE, Shape, Usage, event


def _named(kind: str, **fields: Any) -> bytes:
    """Return a server-sent event with a name, which its data has too."""
    return f"event: {kind}\n".encode() + event({"type": kind, **fields})


class ResponsesShape(Shape):
    """Answers of ``/v1/responses``."""

    __slots__ = ()

    @property
    def answer_id(self) -> str:
        """The request's own id."""
        return self.request_id

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """Return a message of the output."""
        part = {"type": "output_text", "text": text, "annotations": []}
        status = "incomplete" if finish_reason == "length" else "completed"
        return {"type": "message", "role": "assistant", "status": status, "content": [part]}

    def whole(self, choices: list[dict[str, Any]], usage: Usage, params: dict[str, Any] | None) -> bytes:
        """Return an answer that is not streamed."""
        return msgspec.json.encode(self._response(choices[0]["status"], choices, usage, params))

    def _response(
        self, status: str, output: list[dict[str, Any]], usage: Usage | None, params: dict[str, Any] | None
    ) -> dict[str, Any]:
        counted = None
        if usage is not None:
            counted = {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens or 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            }
        return {
            "id": self.answer_id,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": status,
            "output": output,
            "usage": counted,
            "kv_transfer_params": params,
        }

    def opening(self, index: int) -> bytes:
        """Return the first event."""
        return _named("response.created", response=self._response("in_progress", [], None, None))

    def token(self, index: int, text: str, finish_reason: str | None, first: bool = False) -> bytes:
        """Return the event of a token."""
        return _named("response.output_text.delta", output_index=0, content_index=0, delta=text)

    def closing(self, usage: Usage, wanted: bool) -> bytes:
        """Return the last event, which always has the usage."""
        return _named("response.completed", response=self._response("completed", [], usage, None))


class MessagesShape(Shape):
    """Answers of ``/v1/messages``."""

    __slots__ = ()

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """Return the content, and why it has ended."""
        reason = "max_tokens" if finish_reason == "length" else "end_turn"
        return {"content": [{"type": "text", "text": text}], "stop_reason": reason}

    def whole(self, choices: list[dict[str, Any]], usage: Usage, params: dict[str, Any] | None) -> bytes:
        """Return an answer that is not streamed."""
        return msgspec.json.encode({**self._message(usage), **choices[0], "kv_transfer_params": params})

    def _message(self, usage: Usage | None) -> dict[str, Any]:
        counted = {"input_tokens": 0, "output_tokens": 0}
        if usage is not None:
            counted = {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
            if usage.cached_tokens is not None:
                counted["cache_read_input_tokens"] = usage.cached_tokens
                counted["input_tokens"] -= usage.cached_tokens
        kind = {"id": self.answer_id, "type": "message", "role": "assistant", "model": self.model}
        return {**kind, "content": [], "stop_reason": None, "stop_sequence": None, "usage": counted}

    def opening(self, index: int) -> bytes:
        """Return the first two events."""
        block = {"type": "text", "text": ""}
        start = _named("message_start", message=self._message(None))
        return start + _named("content_block_start", index=0, content_block=block)

    def token(self, index: int, text: str, finish_reason: str | None, first: bool = False) -> bytes:
        """Return the event of a token, and at the last one why it is that."""
        delta = _named("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
        if finish_reason is None:
            return delta
        reason = self.choice(0, "", finish_reason)["stop_reason"]
        return (
            delta
            + _named("content_block_stop", index=0)
            + _named("message_delta", delta={"stop_reason": reason}, usage={"output_tokens": 0})
        )

    def closing(self, usage: Usage, wanted: bool) -> bytes:
        """Return the last event."""
        return _named("message_stop")


class NativeShape(Shape):
    """Answers of SGLang's ``/generate``."""

    __slots__ = ()

    @property
    def answer_id(self) -> str:
        """The request's own id."""
        return self.request_id

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """Return an answer but for its tokens."""
        return {"text": text, "meta_info": {"id": self.request_id, "finish_reason": {"type": finish_reason}}}

    def whole(self, choices: list[dict[str, Any]], usage: Usage, params: dict[str, Any] | None) -> bytes:
        """Return an answer that is not streamed."""
        (answer,) = choices
        tokens = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        answer["meta_info"] |= {**tokens, "cached_tokens": usage.cached_tokens or 0}
        return msgspec.json.encode(answer)

    def opening(self, index: int) -> bytes:
        """Return nothing: the first token is the first event."""
        return b""

    def token(self, index: int, text: str, finish_reason: str | None, first: bool = False) -> bytes:
        """Return the event of a token, as with ``--incremental-streaming-output``."""
        return event(self.choice(index, text, finish_reason) if finish_reason else {"text": text})

    def closing(self, usage: Usage, wanted: bool) -> bytes:
        """Return the last event."""
        return DONE


class GenerateShape(Shape):
    """Answers of ``/inference/v1/generate``. The simulator's tokens have no ids: they are numbered."""

    __slots__ = ()

    @property
    def answer_id(self) -> str:
        """The request's own id."""
        return self.request_id

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """Return a choice of an answer that is not streamed."""
        ids = list(range(len(text.split())))
        return {"index": index, "token_ids": ids, "logprobs": None, "finish_reason": finish_reason}

    def whole(self, choices: list[dict[str, Any]], usage: Usage, params: dict[str, Any] | None) -> bytes:
        """Return an answer that is not streamed."""
        head = {"request_id": self.answer_id, "model": self.model, "created": self.created}
        more = {"choices": choices, "usage": usage.body(), "kv_transfer_params": params}
        return msgspec.json.encode({**head, **more})

    def opening(self, index: int) -> bytes:
        """Return nothing: the first token is the first event."""
        return b""

    def token(self, index: int, text: str, finish_reason: str | None, first: bool = False) -> bytes:
        """Return the event of a token."""
        choice = {"index": index, "token_ids": [0], "finish_reason": finish_reason}
        return event({"request_id": self.answer_id, "choices": [choice]})
