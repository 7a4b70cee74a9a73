"""vLLM's NixlConnector: prefill keeps the blocks pinned and says where, decode pulls them."""

from __future__ import annotations

import msgspec

from ..request.body import JsonBody
from ..request.handoff_key import HANDOFF_KEY
from .base import Handoff

_REMOTE_DECODE = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
_DROPPED_FOR_PREFILL = frozenset({"min_tokens", "stream_options", "max_completion_tokens"})


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")
    usage: _Usage | None = None


class _Params(msgspec.Struct):
    """What a decode engine dereferences without looking. With one missing or malformed it hangs or dies.

    Releases before KV-cache groups have a flat list of blocks and no request id, in P's answer and in what
    D reads; within one fleet P's answer has the form that its D needs.
    """

    do_remote_prefill: bool
    remote_engine_id: str
    remote_block_ids: list[int | list[int]]
    remote_host: str
    remote_port: int
    remote_request_id: str | None = None
    remote_prefill_cached_tokens: int | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_params = msgspec.json.Decoder(_Params).decode


class NixlConnector:
    """The protocol as vLLM 0.32 speaks it (``vllm/distributed/kv_transfer/kv_connector/v1/nixl``)."""

    def can_split(self, body: JsonBody) -> bool:
        """One prompt, one answer, and nothing that only the instance which prefills can tell.

        Prefill's answer holds one hand-off, whatever ``n`` is and however many prompts there are.
        """
        if any(body.get(key) not in (None, 1) for key in ("n", "best_of")):
            return False
        if any(body.get(key) for key in ("use_beam_search", "echo")):
            return False
        if any(body.get(key) is not None for key in ("prompt_logprobs", "prompt_embeds")):
            return False
        return not body.has("prompt") or body.only_prompt() is not None

    def prefill_body(self, body: JsonBody) -> bytes:
        """One token, not streamed, and a hand-off in return."""
        add = {"max_tokens": b"1", "stream": b"false", HANDOFF_KEY: _REMOTE_DECODE}
        if body.has("max_completion_tokens"):
            add["max_completion_tokens"] = b"1"
        return body.replace(_DROPPED_FOR_PREFILL, add)

    def handoff(self, answer: bytes) -> Handoff | None:
        """Return prefill's ``kv_transfer_params``, copied whole, if decode can work with them."""
        try:
            decoded = _decode_answer(answer)
            params = _decode_params(decoded.kv_transfer_params)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        blocks = params.remote_block_ids
        grouped = any(isinstance(group, list) and group for group in blocks)
        if not (params.do_remote_prefill and params.remote_host and blocks):
            return None
        if isinstance(blocks[0], list) and not (grouped and params.remote_request_id):
            return None
        usage = decoded.usage or _Usage()
        cached = params.remote_prefill_cached_tokens
        if cached is None and usage.prompt_tokens_details is not None:
            cached = usage.prompt_tokens_details.cached_tokens
        return Handoff(bytes(decoded.kv_transfer_params), usage.prompt_tokens, cached)

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
