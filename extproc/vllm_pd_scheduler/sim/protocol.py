"""Requests of the OpenAI API as vLLM reads them, and its errors."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from .text import Prompt, read_prompt, render_chat

B = TypeVar("B", bound=msgspec.Struct)


class ApiError(Exception):
    """An error that is the answer to a request. ``type`` is vLLM's name for its kind."""

    def __init__(self, status: int, message: str, type: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param

    def body(self) -> dict[str, Any]:
        """Return the JSON that vLLM answers with."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.status}
        return {"error": error}


class TooLong(ApiError):
    """The prompt, or the prompt and the requested answer together, do not fit into the context."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message, "BadRequestError", "input_tokens")


class StreamOptions(msgspec.Struct):
    """The field ``stream_options``."""

    include_usage: bool | None = False


class Body(msgspec.Struct, kw_only=True):
    """Fields that completions and chat completions share. As in vLLM, unknown fields are ignored."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = 0
    n: int | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = False
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    return_token_ids: bool | None = False
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    bootstrap_room: int | None = None
    rid: str | None = None
    cache_salt: str | None = None


class CompletionBody(Body, kw_only=True):
    """Body of ``/v1/completions``."""

    prompt: str | list[str | int | list[int]]

    def prompts(self, model: str) -> list[Prompt]:
        """Return the prompts, each of which gets choices of its own; raise ApiError as ``split_inputs``."""
        if isinstance(self.prompt, str):
            return [_prompt(model, self.prompt)]
        return [_prompt(model, item) for item in split_inputs(self.prompt, "prompt")]

    def limit(self) -> int | None:
        """Return the tokens that the client asks for at most."""
        return self.max_tokens


class ChatBody(Body, kw_only=True):
    """Body of ``/v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None

    def prompts(self, model: str) -> list[Prompt]:
        """Return the one prompt that the messages make, or that a prefill has made of them.

        Raise ApiError if there are no messages.
        """
        if not self.messages:
            raise ApiError(400, "messages must not be empty", "BadRequestError", "messages")
        ids = (self.kv_transfer_params or {}).pop("prompt_token_ids", None)
        if ids is not None and not any(isinstance(each.get("content"), list) for each in self.messages):
            return [_prompt(model, _known_ids(ids))]
        return [_prompt(model, render_chat(self.messages))]

    def limit(self) -> int | None:
        """Return the tokens that the client asks for at most; the newer field takes precedence."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ResponsesBody(Body, kw_only=True):
    """Body of ``/v1/responses``. There is no store, so nothing can be continued or run in the background."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    request_id: str | None = None

    def prompts(self, model: str) -> list[Prompt]:
        """Return the one prompt that instructions and input make; raise ApiError for an unknown response."""
        if self.previous_response_id is not None:
            message = f"Response with id '{self.previous_response_id}' not found."
            raise ApiError(404, message, "invalid_request_error", "response_id")
        before = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        given = self.input if isinstance(self.input, list) else [{"role": "user", "content": self.input}]
        return [_prompt(model, render_chat([*before, *given]))]

    def limit(self) -> int | None:
        """Return the tokens that the client asks for at most."""
        return self.max_output_tokens


class MessagesBody(Body, kw_only=True):
    """Body of ``/v1/messages``, Anthropic's API."""

    messages: list[dict[str, Any]]
    max_tokens: int
    system: str | list[dict[str, Any]] | None = None

    def prompts(self, model: str) -> list[Prompt]:
        """Return the one prompt that the messages make."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [_prompt(model, render_chat([*before, *self.messages]))]

    def limit(self) -> int | None:
        """Return the tokens that the client asks for at most."""
        return self.max_tokens


class SamplingParams(msgspec.Struct):
    """The field ``sampling_params``."""

    max_tokens: int | None = None
    min_tokens: int | None = 0
    n: int | None = 1


class GenerateBody(Body, kw_only=True):
    """Body of ``/inference/v1/generate``: token ids in, token ids out."""

    token_ids: list[int]
    sampling_params: SamplingParams

    def prompts(self, model: str) -> list[Prompt]:
        """Return the one prompt."""
        return [_prompt(model, self.token_ids)]

    def limit(self) -> int | None:
        """Return the tokens that the client asks for at most."""
        return self.sampling_params.max_tokens


class NativeParams(msgspec.Struct, frozen=True):
    """The field ``sampling_params`` of SGLang's own API."""

    max_new_tokens: int | None = 128
    n: int | None = 1


class NativeBody(Body, kw_only=True):
    """Body of SGLang's ``/generate``."""

    text: str | None = None
    input_ids: list[int] | None = None
    sampling_params: NativeParams = NativeParams()

    def prompts(self, model: str) -> list[Prompt]:
        """Return the one prompt; raise ApiError without one."""
        prompt = self.text if self.text is not None else self.input_ids
        if prompt is None:
            raise ApiError(400, "Either text, input_ids or input_embeds should be provided.", "BadRequest")
        return [_prompt(model, prompt)]

    def limit(self) -> int | None:
        """Return the tokens that the client asks for at most."""
        return self.sampling_params.max_new_tokens


AnyBody = CompletionBody | ChatBody | ResponsesBody | MessagesBody | GenerateBody | NativeBody


class AbortBody(msgspec.Struct):
    """Body of SGLang's ``/abort_request``."""

    rid: str = ""
    abort_all: bool = False


class TokenizeBody(msgspec.Struct):
    """Body of ``/tokenize``: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None


class AdapterBody(msgspec.Struct):
    """Body of ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``."""

    lora_name: str | None = None
    lora_path: str | None = None
    load_inplace: bool = False


class EmbeddingBody(msgspec.Struct):
    """Body of ``/v1/embeddings``."""

    input: str | list[str | int | list[int]]
    model: str | None = None


def _known_ids(ids: Any) -> list[int]:
    """Return token ids that came with a hand-off; raise ApiError as vLLM does for what is none."""
    if not isinstance(ids, list) or not ids or any(type(each) is not int or each < 0 for each in ids):
        param = "kv_transfer_params.prompt_token_ids"
        raise ApiError(400, f"`{param}` must be a non-empty list of integers.", "BadRequestError", param)
    return ids


def _prompt(model: str, prompt: str | Sequence[int]) -> Prompt:
    """A prompt as the engine sees it. Raise ApiError for a text with half a surrogate pair."""
    try:
        if isinstance(prompt, str):
            prompt.encode()
    except UnicodeEncodeError:
        message = "TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]"
        raise ApiError(400, message, "BadRequestError") from None
    return read_prompt(model, prompt)


def split_inputs(items: list[str | int | list[int]], param: str) -> list[str | Sequence[int]]:
    """Return the prompts of an array: one if it has token ids, else one for each item.

    Raise ApiError if it is empty or mixes both.
    """
    numbers = [item for item in items if isinstance(item, int)]
    others = [item for item in items if not isinstance(item, int)]
    if not items or (numbers and others) or [] in others:
        raise ApiError(
            400, f"{param} must be a text, token ids or a list of either", "BadRequestError", param
        )
    return [numbers] if numbers else list(others)


def read_body(data: bytes, content_type: str, kind: type[B]) -> B:
    """Return a decoded body; raise ApiError for another media type, broken JSON or a wrong type."""
    if content_type != "application/json":
        raise ApiError(400, "Unsupported Media Type: Only 'application/json' is allowed", "Bad Request")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:  # as vLLM does: Python's parser reads a BOM, NaN and lone surrogates, and says more of errors
        return msgspec.convert(json.loads(data), type=kind)
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise ApiError(400, str(error), "Bad Request", _param(str(error))) from error


def _param(message: str) -> str | None:
    """Return the field that an error of msgspec is about."""
    # msgspec ends its messages with the path of the value: "… - at `$.max_tokens`".
    if "missing required field" in message:
        return message.split("`")[1]
    _, found, path = message.partition("`$.")
    return path.rstrip("`").split(".")[0].split("[")[0] if found else None


@dataclass(frozen=True, slots=True)
class Length:
    """How many tokens an answer will have, and its finish reason: "stop" or "length"."""

    tokens: int
    finish_reason: str


def choose_length(body: AnyBody, prompt: Prompt, natural: int, max_model_len: int) -> Length:
    """Return the length of an answer that by itself would end after ``natural`` tokens.

    Raise ApiError for a limit below 1, and TooLong if prompt and answer do not fit into the context.
    """
    limit = body.limit()
    if limit is not None and limit < 1:
        param = "max_tokens" if body.max_tokens == limit else "max_completion_tokens"
        raise ApiError(400, f"{param} must be at least 1, got {limit}.", "BadRequestError", param)
    if prompt.tokens >= max_model_len:
        raise TooLong(
            f"This model's maximum context length is {max_model_len} tokens. However, your request has "
            f"{prompt.tokens} input tokens. Please reduce the length of the input messages."
        )
    if limit is not None and prompt.tokens + limit > max_model_len:
        raise TooLong(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested {limit} "
            f"output tokens and your prompt contains {prompt.tokens} input tokens, for a total of "
            f"{prompt.tokens + limit} tokens. Please reduce the length of the input prompt or the number of "
            "requested output tokens."
        )
    longest = max_model_len - prompt.tokens if limit is None else limit
    natural = max(natural, body.min_tokens or 0)
    endless = body.ignore_eos or (body.min_tokens or 0) >= longest
    if endless or natural > longest:
        return Length(longest, "length")
    return Length(natural, "stop")
