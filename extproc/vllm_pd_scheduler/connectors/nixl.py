"""vLLM's NixlConnector: prefill keeps the blocks pinned and says where, decode pulls them."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import msgspec

from ..request.body import HANDOFF_KEY, JsonBody
from ..request.json_depth import nested_deeper
from .base import Handoff

_REMOTE_DECODE = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
_DROPPED_FOR_PREFILL = frozenset({"min_tokens", "stream_options", "max_completion_tokens"})


MAX_TOKENS = 100_000_000
"""Of a prompt: ten times the longest context that any model has."""
_MAX_PARAMS_DEPTH = 32

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_Block = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Size = Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]


class _Details(msgspec.Struct):
    cached_tokens: _Tokens | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Tokens | None = None
    prompt_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")
    usage: msgspec.Raw = msgspec.Raw(b"null")


class _Params(msgspec.Struct):
    """What a decode engine dereferences without looking. With one missing or malformed it hangs or dies.

    Releases before KV-cache groups have a flat list of blocks and no request id, in P's answer and in what
    D reads; within one fleet P's answer has the form that its D needs.
    """

    do_remote_prefill: bool
    remote_engine_id: _Text
    remote_block_ids: list[_Block | list[_Block]]
    remote_host: _Text
    remote_port: Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
    remote_request_id: str | None = None
    remote_num_tokens: _Tokens | None = None
    tp_size: _Size | None = None
    pp_size: _Size | None = None
    dcp_size: _Size | None = None


class _Cached(msgspec.Struct):
    remote_prefill_cached_tokens: _Tokens | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_params = msgspec.json.Decoder(_Params).decode
_decode_usage = msgspec.json.Decoder(_Usage | None).decode
_decode_cached = msgspec.json.Decoder(_Cached).decode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class NixlConnector:
    """The protocol as vLLM 0.32 speaks it (``vllm/distributed/kv_transfer/kv_connector/v1/nixl``)."""

    def can_split(self, body: JsonBody) -> bool:
        """One prompt, one answer, and nothing that only the instance which prefills can tell.

        Prefill's answer holds one hand-off, whatever ``n`` is and however many prompts there are.
        """
        fields = body.fields
        for key in ("n", "best_of"):
            if key in fields and body.get(key) not in (None, 1):
                return False
        for key in ("use_beam_search", "echo"):
            if key in fields and body.get(key):
                return False
        for key in ("prompt_logprobs", "prompt_embeds"):
            if key in fields and body.get(key) is not None:
                return False
        if "prompt" not in fields or not body.starts_with("prompt", b"["):
            return True
        prompt = body.get("prompt")
        return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)

    def prefill_body(self, body: JsonBody) -> bytes:
        """One token, not streamed, and a hand-off in return."""
        add = {"max_tokens": b"1", "stream": b"false", HANDOFF_KEY: _REMOTE_DECODE}
        if "max_completion_tokens" in body.fields:
            add["max_completion_tokens"] = b"1"
        return body.replace(_DROPPED_FOR_PREFILL, add)

    def handoff(self, answer: bytes) -> Handoff | None:
        """Return prefill's ``kv_transfer_params``, copied whole, if decode can work with them."""
        try:
            decoded = _decode_answer(answer)
            params = _decode_params(decoded.kv_transfer_params)
            text = bytes(decoded.kv_transfer_params)
            text.decode()  # in what is copied whole, nothing else looks at the parts that are not known here
        except _UNREADABLE:
            return None
        blocks = params.remote_block_ids
        grouped = any(isinstance(group, list) and group for group in blocks)
        if not (params.do_remote_prefill and blocks) or nested_deeper(text, _MAX_PARAMS_DEPTH):
            return None
        if isinstance(blocks[0], list) and not (grouped and params.remote_request_id):
            return None
        return Handoff(text, *_counted(decoded.usage, decoded.kv_transfer_params))

    def decode_body(self, body: JsonBody, handoff: Handoff) -> tuple[bytes, int]:
        """Return the client's body with the hand-off spliced in as its last field."""
        return body.with_field(HANDOFF_KEY, handoff.params)

    def release_body(self, handoff: Handoff, model: str | None) -> bytes:
        """Ask for more tokens than any context has: vLLM answers 400 and tells P, and no KV travels.

        Measured on vLLM 0.32: P's blocks are free at once.
        """
        name = b"" if model is None else b'"model":' + msgspec.json.encode(model) + b","
        return b"".join(
            (b"{", name, b'"prompt":"x","max_tokens":2147483647,"kv_transfer_params":', handoff.params, b"}")
        )


def _counted(usage: msgspec.Raw, params: msgspec.Raw) -> tuple[int | None, int | None]:
    """Return the tokens of the prompt, and how many of them were cached; ``None`` for what makes no sense.

    They are for learning only: without them the hand-off is as good.
    """
    tokens = cached = None
    with suppress(*_UNREADABLE):
        cached = _decode_cached(params).remote_prefill_cached_tokens
    with suppress(*_UNREADABLE):
        found = _decode_usage(usage) or _Usage()
        tokens = found.prompt_tokens or None
        if cached is None and found.prompt_tokens_details is not None:
            cached = found.prompt_tokens_details.cached_tokens
    return tokens, cached if tokens is None or cached is None else min(cached, tokens)
