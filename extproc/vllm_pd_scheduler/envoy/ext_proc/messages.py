"""Between Envoy's protobuf messages and the state machine's: the only place that knows the wire format.

``envoy.service.ext_proc.v3`` from xds-protos (protobuf's C implementation), since one exchange takes
10 µs with it and 580 µs with pure-Python messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from ...connectors import Splice
from ...request import gateway_names
from ...request import headers as names
from ...request.errors import Reject
from ...routing.answer_head import AnswerHead
from ...routing.forward import Forward
from ..access_log import retry_after
from ..limits import MAX_MESSAGE_BYTES, check_size, parse
from .stream import (
    Answer,
    Bytes,
    Continue,
    Message,
    PassOn,
    Phase,
    StreamedAnswer,
    StreamError,
)
from .wire import body_size, find, part_message, prefix, response_part

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"

DETAILS_PREFIX = "pd_"
"""Marks our replies in Envoy's response code details: envoy.yaml leaves the bodies of these as they are."""

METADATA = "vllm_pd"
"""The namespace of what Envoy's filter for cluster decode is told, without a header that D would see."""

LARGE_BYTES = 1 << 16
"""A larger message is not copied into protobuf's memory as a whole, and then its body from there."""

LONG_VALUE_BYTES = 256
"""A header's value that is longer takes no more memory than its bytes, whatever its letters are."""

PART_BYTES = 62_000
"""The longest part of a body that is sent to a gateway: 64 KiB are its limit, with what is around it."""

_PHASES = {phase.name.lower(): phase for phase in Phase}
_RESPONSES = pb.ProcessingResponse.DESCRIPTOR.fields_by_name
_BODY = {
    phase: (
        _RESPONSES[phase.name.lower()].number,
        pb.BodyResponse.RESPONSE_FIELD_NUMBER,
        pb.CommonResponse.BODY_MUTATION_FIELD_NUMBER,
        pb.BodyMutation.BODY_FIELD_NUMBER,
    )
    for phase in (Phase.REQUEST_HEADERS, Phase.REQUEST_BODY)
}
"""Where a response has the new body, by field numbers."""
_REQUEST_PART, _RESPONSE_PART = (
    (
        _RESPONSES[name].number,
        pb.BodyResponse.RESPONSE_FIELD_NUMBER,
        pb.CommonResponse.BODY_MUTATION_FIELD_NUMBER,
        pb.BodyMutation.STREAMED_RESPONSE_FIELD_NUMBER,
    )
    for name in ("request_body", "response_body")
)
"""Where a response has a part of a body."""
_OVERWRITE = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


def decode(data: bytes | bytearray) -> Message:
    """Read a ``ProcessingRequest``.

    Raises :exc:`~..limits.BadMessage` if it is none or has more than ``MAX_MESSAGE_BYTES`` beside a body,
    and :exc:`StreamError` if it is of an unknown kind.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        check_size("ProcessingRequest without its body", len(data) - body_size(data), MAX_MESSAGE_BYTES)
    if len(data) > LARGE_BYTES and (message := _large_body(data)) is not None:
        return message
    request = parse(pb.ProcessingRequest, bytes(data))
    kind = request.WhichOneof("request")
    if kind == "request_headers":
        return _request_headers(request)
    if kind == "request_body":
        return Message(Phase.REQUEST_BODY, request.request_body.end_of_stream, body=request.request_body.body)
    if kind == "response_headers":
        return Message(
            Phase.RESPONSE_HEADERS, request.response_headers.end_of_stream, head=_answer_head(request)
        )
    if kind == "response_body":
        body = request.response_body
        return Message(Phase.RESPONSE_BODY, body.end_of_stream, body=body.body)
    if kind not in _PHASES:
        raise StreamError(f"a message of the unknown kind {kind}")
    return Message(_PHASES[kind])


def _request_headers(request: Any) -> Message:
    headers = _headers(request.request_headers)
    # A gateway that is no Envoy may not tell its mode.
    streamed, answer_streamed = None, False
    if request.HasField("protocol_config"):
        modes = request.protocol_config
        streamed = modes.request_body_mode == ProcessingMode.FULL_DUPLEX_STREAMED
        answer_streamed = modes.response_body_mode == ProcessingMode.FULL_DUPLEX_STREAMED
    subset = None
    if request.HasField("metadata_context"):
        subset = _subset(request.metadata_context)
    last = not _body_follows(request)
    return Message(
        Phase.REQUEST_HEADERS,
        last,
        headers,
        streamed=streamed,
        answer_streamed=answer_streamed,
        subset=subset,
    )


def _headers(message: Any) -> dict[str, str]:
    found = {}
    for header in message.headers.headers:
        value = header.raw_value or header.value.encode()
        short = len(value) <= LONG_VALUE_BYTES
        found[header.key] = value.decode("utf-8", "replace") if short else _long_text(value)
    return found


def _subset(metadata: Any) -> frozenset[str] | None:
    """Return the endpoints to which a request may go, in either of the two forms; ``None``: to all."""
    if gateway_names.SUBSET_METADATA not in metadata.filter_metadata:
        return None
    fields = metadata.filter_metadata[gateway_names.SUBSET_METADATA].fields
    if gateway_names.SUBSET not in fields:
        return None
    value = fields[gateway_names.SUBSET]
    found = [each.string_value for each in value.list_value.values] or [value.string_value]
    return frozenset(name.strip() for each in found for name in each.split(",")) - {""}


def _answer_head(request: Any) -> AnswerHead:
    headers = _headers(request.response_headers)
    status, attempts = headers.get(":status", ""), headers.get(names.ATTEMPT, "")
    served = ""
    if gateway_names.LB_METADATA in request.metadata_context.filter_metadata:
        fields = request.metadata_context.filter_metadata[gateway_names.LB_METADATA].fields
        if gateway_names.SERVED in fields:
            served = fields[gateway_names.SERVED].string_value
    return AnswerHead(
        int(status[:3]) if status.isdecimal() else 0,
        served,
        not headers.keys() & _INSTANCES_OWN,
        int(attempts[:9]) if attempts.isdecimal() else 1,
        retry_after(headers.get("retry-after", "")),
    )


_INSTANCES_OWN = frozenset({"date", "server", "x-envoy-upstream-service-time"})
"""Headers of an instance's answer, or of Envoy for it. Envoy's own answers get them later, if at all."""


def _long_text(value: bytes) -> str:
    """Return a header's long value: as Latin-1 if it is not ASCII.

    Other text takes up to four bytes a letter, and Envoy's limit is on bytes.
    """
    return value.decode("ascii" if value.isascii() else "latin-1")


def _body_follows(request: Any) -> bool:
    """Whether the request's headers are not all that will be told of it; a WebSocket's are."""
    told = request.HasField("protocol_config")
    unasked = told and request.protocol_config.request_body_mode == ProcessingMode.NONE
    return not request.request_headers.end_of_stream and not unasked


def _large_body(data: bytes | bytearray) -> Message | None:
    """Read a message with a body, which stays where it is; ``None`` if it is another one."""
    outer = find(data, pb.ProcessingRequest.REQUEST_BODY_FIELD_NUMBER, 0, len(data))
    inner = outer and find(data, pb.HttpBody.BODY_FIELD_NUMBER, outer.start, outer.end)
    if outer is None or inner is None:
        return None
    try:
        others = pb.ProcessingRequest.FromString(outer.without(data, 0, len(data)))
        rest = pb.HttpBody.FromString(inner.without(data, outer.start, outer.end))
    except Exception:
        return None
    if rest.body or others.WhichOneof("request"):
        return None
    body = memoryview(data)[inner.start : inner.end]
    return Message(Phase.REQUEST_BODY, rest.end_of_stream, body=body)


def pass_on(data: bytes | bytearray) -> PassedOn | None:
    """Answer a part of a response's body with the same part, without a look at it; ``None`` if that fails."""
    part = response_part(data)
    if part is None or part.size > PART_BYTES:
        return None
    start, end, size, last = part
    return PassedOn(_before_part(end - start), bytes(data[start:end]), size, last)


@lru_cache(1024)
def _before_part(size: int) -> bytes:
    return prefix(_RESPONSE_PART, size)


class PassedOn(NamedTuple):
    """The reply to a part of a response's body, in two pieces, and how many bytes of the body it has."""

    before: bytes
    part: bytes
    size: int
    end_of_stream: bool


def encode(action: Continue | Answer) -> tuple[bytes, ...]:
    """Write the ``ProcessingResponse`` for an action, in parts: a body is not copied."""
    if isinstance(action, Continue):
        return (_CONTINUE[action.phase],)
    if isinstance(action.outcome, Reject):
        return (_immediate(action.outcome),)
    return _forward(action.phase, action.outcome)


def encode_streamed(action: StreamedAnswer) -> list[list[Bytes]]:
    """Write where a request goes for a gateway, and the whole body: one message after another, in parts."""
    forward = action.forward
    messages: list[list[Bytes]] = [[_gateway_headers(forward)]]
    if action.body is None:
        return messages
    chunks = _chunks(action.body, forward.splice)
    for number, parts in enumerate(chunks, 1):
        last = number == len(chunks) and not action.trailers
        messages.append(part_message(_REQUEST_PART, parts, last))
    if action.trailers:
        messages.append([_CONTINUE[Phase.REQUEST_TRAILERS]])
    return messages


def encode_part(action: PassOn) -> list[list[Bytes]]:
    """Write a part of a response's body, in as many messages as it takes."""
    chunks = _chunks(action.body, None)
    return [
        part_message(_RESPONSE_PART, parts, action.end_of_stream and number == len(chunks))
        for number, parts in enumerate(chunks, 1)
    ]


def encode_begin(headers: Mapping[str, str]) -> bytes:
    """Write the reply that lets a response begin, with these headers beside its own."""
    if not headers:
        return _CONTINUE[Phase.RESPONSE_HEADERS]
    response = pb.ProcessingResponse()
    _set(response.response_headers.response.header_mutation.set_headers, headers)
    return bytes(response.SerializeToString())


def _chunks(body: Bytes, splice: Splice | None) -> list[list[Bytes]]:
    """Return the parts in which a body goes, each of pieces that are sent one after another."""
    view = memoryview(body)
    pieces = [view] if splice is None else [view[: splice.at], memoryview(splice.text)]
    chunks: list[list[Bytes]] = [[]]
    room = PART_BYTES
    for piece in pieces:
        while piece:
            if not room:
                chunks.append([])
                room = PART_BYTES
            chunks[-1].append(piece[:room])
            taken = len(chunks[-1][-1])
            piece, room = piece[taken:], room - taken
    return chunks


def _gateway_headers(forward: Forward) -> bytes:
    response = pb.ProcessingResponse()
    common = response.request_headers.response
    headers = forward.gateway_headers()
    _set(common.header_mutation.set_headers, headers)
    common.header_mutation.remove_headers.extend(forward.remove_headers)
    common.clear_route_cache = True  # routes that name a cluster by the destination's header
    fields = response.dynamic_metadata.fields[gateway_names.LB_METADATA].struct_value.fields
    fields[names.DESTINATION].string_value = headers[names.DESTINATION]
    return bytes(response.SerializeToString())


def _forward(phase: Phase, forward: Forward) -> tuple[bytes, ...]:
    response = pb.ProcessingResponse()
    common = (response.request_body if phase is Phase.REQUEST_BODY else response.request_headers).response
    mutation = common.header_mutation
    headers = forward.headers()
    if forward.body is not None:
        headers["content-length"] = str(len(forward.body))
    _set(mutation.set_headers, headers)
    mutation.remove_headers.extend(forward.remove_headers)
    common.clear_route_cache = forward.stream  # streams have a route of their own
    if forward.splice is not None or forward.only is not None or forward.ranks:
        handoff = response.dynamic_metadata.fields[METADATA].struct_value.fields
        for address, rank in (forward.ranks or {}).items():
            handoff["ranks"].struct_value.fields[address].string_value = str(rank)
        if forward.only is not None:
            handoff["only"].string_value = ",".join(str(each.address) for each in forward.only)
        if forward.splice is not None:
            handoff["at"].number_value = forward.splice.at
            handoff["text"].string_value = forward.splice.text
        if forward.beside is not None:
            handoff["together"].bool_value = True
    data: bytes = response.SerializeToString()
    if forward.body is None:
        return (data,)
    # Not as a field of the message: the body would be copied three times more.
    return (data, prefix(_BODY[phase], len(forward.body)), forward.body)


def _immediate(answer: Reject) -> bytes:
    response = pb.ProcessingResponse()
    immediate = response.immediate_response
    immediate.status.code = answer.status
    immediate.body = answer.body
    immediate.details = DETAILS_PREFIX + answer.reason
    _set(immediate.headers.set_headers, answer.headers)
    return bytes(response.SerializeToString())


def _set(options: Any, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        option = options.add(append_action=_OVERWRITE)
        option.header.key = name
        option.header.raw_value = value.encode()


def _continue(phase: Phase) -> bytes:
    response = pb.ProcessingResponse()
    getattr(response, phase.name.lower()).SetInParent()
    return bytes(response.SerializeToString())


_CONTINUE = {phase: _continue(phase) for phase in Phase}
