"""vLLM's ``NixlConnector``: P keeps the blocks and says where they are, D pulls them.

Source: ``vllm/distributed/kv_transfer/kv_connector/v1/nixl`` of vLLM 0.32 and 0.33, and for the flow of the
two requests ``tests/v1/kv_connector/nixl_integration/toy_proxy_server.py``.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, ClassVar

import msgspec

from ..request.api import CHAT
from ..request.body import JsonBody
from ..request.handoff_key import HANDOFF_KEY
from ..request.json_text import is_deeper
from .base import Connector, Handoff, Legs, Splice
from .one_token import UNREADABLE, Tokens, can_split, counted_with, has_stopped, never_served, one_token

PREFILL_PARAMS = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
"""``kv_transfer_params`` that ask P to keep the blocks for a D."""
_MAX_PARAMS_DEPTH = 32
PULL, PUSH = "pull", "push"

_Block = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Size = Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]


class _Choice(msgspec.Struct):
    prompt_token_ids: msgspec.Raw = msgspec.Raw()


class _Answer(msgspec.Struct):
    prompt_token_ids: msgspec.Raw = msgspec.Raw()
    choices: msgspec.Raw = msgspec.Raw()
    """Of a completion, where the first has the token ids."""
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")
    usage: msgspec.Raw = msgspec.Raw(b"null")


class TransferParams(msgspec.Struct):
    """The part of P's ``kv_transfer_params`` that D's engine uses without a check.

    With one of them missing or malformed the engine hangs or dies. ``remote_block_ids`` is a list for each
    KV-cache group, with ``remote_request_id`` beside it. vLLM releases before such groups have one flat list
    and no request id; P and D of a fleet are of the same release, so each D gets the form that it reads.
    """

    do_remote_prefill: bool
    remote_engine_id: _Text
    remote_block_ids: list[_Block | list[_Block]]
    remote_host: _Text
    remote_port: Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
    remote_request_id: str | None = None
    remote_num_tokens: Tokens | None = None
    tp_size: _Size | None = None
    pp_size: _Size | None = None
    dcp_size: _Size | None = None
    transfer_mode: str | None = None
    """Who moves the blocks; releases before 0.28 do not say."""
    num_prompt_blocks: msgspec.Raw = msgspec.Raw()
    """vllm-ascend's alone."""


_NOTHING = TransferParams(False, "", [], "", 0)

_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_choices = msgspec.json.Decoder(list[_Choice]).decode
_decode_params = msgspec.json.Decoder(TransferParams).decode


class NixlConnector(Connector):
    """The protocol as vLLM 0.33 speaks it: P answers with ``kv_transfer_params``, D gets them unchanged."""

    past_stop: ClassVar[bool] = False
    """Whether P hands over only what did not end by an end of the text, or a stop."""

    def can_split(self, body: JsonBody) -> bool:
        """Whether the request has one prompt and one answer, and wants nothing that only P would know."""
        return can_split(body)

    def prefill_body(self, body: JsonBody, legs: Legs) -> bytes | None:
        """Return the client's body with ``max_tokens`` 1, not streamed, and a request for a hand-off."""
        wanted = {HANDOFF_KEY: PREFILL_PARAMS}
        if legs.token_ids:
            wanted["return_token_ids"] = b"true"
        return one_token(body, wanted, past_stop=self.past_stop)

    def handoff(self, answer: bytes, legs: Legs) -> Handoff | None:
        """Return P's ``kv_transfer_params`` if they have all that D needs, else ``None``.

        They are copied whole, with fields that are unknown here: a later vLLM may need them. Raise
        :exc:`ValueError` if P pushes.
        """
        found, params = read_handoff(answer)
        if params.transfer_mode not in (None, PULL):
            raise another_mode(params)
        return found

    def ended(self, answer: bytes) -> bool:
        """Whether the one token was an end of the text, or a stop: older releases then hand nothing over."""
        return has_stopped(answer)

    def splice(self, body: JsonBody, handoff: Handoff) -> Splice:
        """Make the hand-off the body's last field, with the token ids in it if D is to get them."""
        params = handoff.params
        if handoff.token_ids and body.api is CHAT:  # vLLM reads them there alone
            params = b"".join(
                (params[: params.rindex(b"}")], b',"prompt_token_ids":', handoff.token_ids, b"}")
            )
        return Splice(*body.one_more(HANDOFF_KEY, params))

    def release_body(self, handoff: Handoff, model: str | None) -> bytes:
        """Return a completion request that D refuses. Measured on vLLM 0.32: P's blocks are free at once."""
        return never_served(handoff.params, model)


def _ids(answer: _Answer) -> msgspec.Raw:
    """Return the token ids of a prompt: a chat has them on top, a completion in its first choice."""
    on_top = answer.prompt_token_ids
    if bytes(on_top) not in (b"", b"null") or b'"prompt_token_ids"' not in bytes(answer.choices):
        return on_top
    with suppress(*UNREADABLE):
        choices = _decode_choices(answer.choices)
        if choices:
            return choices[0].prompt_token_ids
    return on_top


def read_handoff(answer: bytes, protocol: str = "") -> tuple[Handoff | None, TransferParams]:
    """Return the hand-off in P's answer if D's engine survives it, and what it says of itself.

    ``protocol`` is what the hand-off gets as its own.
    """
    try:
        decoded = _decode_answer(answer)
        params = _decode_params(decoded.kv_transfer_params)
        text = bytes(decoded.kv_transfer_params)
        text.decode()  # in what is copied whole, nothing else looks at the parts that are not known here
    except UNREADABLE:
        return None, _NOTHING
    blocks = params.remote_block_ids
    grouped = any(isinstance(group, list) and group for group in blocks)
    if not (params.do_remote_prefill and blocks) or is_deeper(text, _MAX_PARAMS_DEPTH):
        return None, _NOTHING
    if isinstance(blocks[0], list) and not (grouped and params.remote_request_id):
        return None, _NOTHING
    tokens, cached, told = counted_with(decoded.usage, decoded.kv_transfer_params)
    # vLLM says who moves the blocks from 0.28 on, and reads token ids from 0.27 on. Engines of two versions
    # do not connect with each other, so D has P's.
    takes = params.transfer_mode is not None
    ids = _listed(_ids(decoded), tokens) if takes else b""
    found = Handoff(text, tokens, cached, told, token_ids=ids, takes_token_ids=takes, protocol=protocol)
    return found, params


def _listed(ids: msgspec.Raw, tokens: int | None) -> bytes:
    """Return the JSON list of a prompt's token ids; empty if it is not one of so many."""
    text = bytes(ids)
    # As JSON with no other letters, it can be nothing but a flat list of whole numbers.
    if not text.startswith(b"[") or text.translate(None, b"0123456789, ") != b"[]":
        return b""
    return text if text.count(b",") + 1 == tokens else b""


def another_mode(params: TransferParams) -> ValueError:
    """Return what is wrong with a P whose hand-offs are another connector's."""
    mode = f"P's transfer_mode is {params.transfer_mode!r:.40}"
    return ValueError(f'{mode}, so this is not its connector: "nixl" is for pull, "nixl-push" for push')
