"""How encode instances (E) hand encoded images, video and audio to P: vLLM's EC connectors.

E gets a request with one item and no text, in the client's own API, so that it reads the item as P does. What
it has computed is found by the hash of the item's content. With ``ECCPUConnector`` (``ec-nixl``) E answers
where: ``ec_transfer_params``, by hash, which P gets and fetches from; what is missing P encodes itself.
With ``ECExampleConnector`` (``ec-example``) it is in storage that both share, and nothing is passed on.

Source: ``vllm/distributed/ec_transfer`` and ``examples/disaggregated/disaggregated_encoder`` of vLLM 0.33.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, get_args

import msgspec

from ..models import ConnectorChoice
from ..request.body import JsonBody
from ..request.json_text import Value, is_deeper
from .names import UnknownConnector

EncodeConnectorName = Literal["ec-nixl", "ec-example"]

MAX_HASHES = 16
"""Encodings that one item may make: a video has one for its pictures and one for its sound."""
MAX_PARAMS_BYTES = 1 << 20
"""Of all encodings of a request: more is not sent to P."""
_MAX_DEPTH = 16
_Hash = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_KEPT = ("model", "mm_processor_kwargs", "media_io_kwargs")
"""Fields of the client's request that say how an item is read, or by which model."""


class _Answer(msgspec.Struct):
    ec_transfer_params: msgspec.Raw = msgspec.Raw(b"null")


class _Descriptor(msgspec.Struct):
    """The part of what E says of an encoding that P's engine uses without a check."""

    size_bytes: Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)] | None = None
    peer_host: str | None = None
    peer_port: Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)] | None = None


_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_params = msgspec.json.Decoder(dict[_Hash, msgspec.Raw] | None).decode
_check_descriptor = msgspec.json.Decoder(_Descriptor).decode
_encode = msgspec.json.Encoder().encode

Encoded = Mapping[str, bytes]
"""Where the encodings of an item are, by hash: JSON objects. Empty where P finds them by itself."""


def encode_connector(choice: ConnectorChoice) -> EncodeConnectorName:
    """Return the connector that an E's own setting names; raise :exc:`UnknownConnector` if it is none."""
    for name in get_args(EncodeConnectorName):
        if choice == ConnectorChoice(name):
            found: EncodeConnectorName = name
            return found
    names = ", ".join(get_args(EncodeConnectorName))
    raise UnknownConnector(
        f"{choice.name!r} is no connector of an encode instance; choose one, without settings: {names}"
    )


def encode_body(body: JsonBody, part: Value) -> bytes:
    """Return the request to E for one item of a client's request, whose bytes stay as they are."""
    kept = b"".join(
        b'"%s":%s,' % (name.encode(), bytes(getattr(body.fields, name))) for name in _KEPT if body.has(name)
    )
    item = memoryview(part.text)[part.start : part.end]
    messages = b'"messages":[{"role":"user","content":['
    return b"".join((b"{", kept, messages, item, b']}],"max_tokens":1,"stream":false}'))


def encoded(connector: EncodeConnectorName, answer: bytes) -> Encoded | None:
    """Return what E's answer (status 200) hands over; ``None`` if it makes no sense."""
    try:
        text = bytes(_decode_answer(answer).ec_transfer_params)
        if connector == "ec-example":
            return {}
        params = _decode_params(text)
        text.decode()  # what is copied whole, nothing else looks at
        if not params or len(params) > MAX_HASHES or is_deeper(text, _MAX_DEPTH):
            return None
        found = {key: bytes(raw) for key, raw in params.items()}
        for raw in found.values():
            _check_descriptor(raw)
    except _UNREADABLE:
        return None
    return found


def merged(items: Iterable[Encoded]) -> bytes:
    """Return the JSON text of the field for P, of all items of a request; empty if it needs none.

    What two E say differently of one hash is left out: P encodes that itself.
    """
    found: dict[str, bytes] = {}
    disputed: set[str] = set()
    for item in items:
        for key, raw in item.items():
            if found.setdefault(key, raw) != raw:
                disputed.add(key)
    members = [_encode(key) + b":" + raw for key, raw in found.items() if key not in disputed]
    text = b"{" + b",".join(members) + b"}"
    return text if members and len(text) <= MAX_PARAMS_BYTES else b""
