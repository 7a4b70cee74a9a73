"""Between Envoy's protobuf messages and the state machine's: the only place that knows the wire format.

``envoy.service.ext_proc.v3`` from xds-protos (protobuf's C implementation), since one exchange takes
10 µs with it and 580 µs with pure-Python messages.
"""

from __future__ import annotations

from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from ...request.errors import Reject
from ...routing.forward import Forward
from ..limits import MAX_MESSAGE_BYTES, check_size, parse
from .stream import Continue, Message, Phase, Reply, StreamError
from .wire import body_size, find, prefix

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"

DETAILS_PREFIX = "pd_"
"""Marks our replies in Envoy's response code details: envoy.yaml leaves the bodies of these as they are."""

METADATA = "vllm_pd"
"""The namespace of what Envoy's filter for cluster decode is told, without a header that D would see."""

LARGE_BYTES = 1 << 16
"""A larger message is not copied into protobuf's memory as a whole, and then its body from there."""

LONG_VALUE_BYTES = 256
"""A header's value that is longer takes no more memory than its bytes, whatever its letters are."""

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
        headers = {
            header.key: _text(header.raw_value or header.value.encode())
            for header in request.request_headers.headers.headers
        }
        return Message(Phase.REQUEST_HEADERS, not _body_follows(request), headers)
    if kind == "request_body":
        return Message(Phase.REQUEST_BODY, request.request_body.end_of_stream, body=request.request_body.body)
    if kind not in _PHASES:
        raise StreamError(f"a message of the unknown kind {kind}")
    return Message(_PHASES[kind])


def _text(value: bytes) -> str:
    """Return a header's value; as Latin-1 if it is long and not ASCII.

    Other text takes up to four bytes a letter, and Envoy's limit is on bytes.
    """
    if len(value) <= LONG_VALUE_BYTES or value.isascii():
        return value.decode("utf-8", "replace")
    return value.decode("latin-1")


def _body_follows(request: Any) -> bool:
    """Whether the request's headers are not all that will be told of it; a WebSocket's are."""
    told = request.HasField("protocol_config")
    unasked = told and request.protocol_config.request_body_mode == ProcessingMode.NONE
    return not request.request_headers.end_of_stream and not unasked


def _large_body(data: bytes | bytearray) -> Message | None:
    """Read a message with a body, and copy that once; ``None`` if it is another one."""
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
    body = bytes(memoryview(data)[inner.start : inner.end])
    return Message(Phase.REQUEST_BODY, rest.end_of_stream, body=body)


def encode(action: Reply) -> tuple[bytes, ...]:
    """Write the ``ProcessingResponse`` for an action, in parts: a body is not copied."""
    if isinstance(action, Continue):
        return (_CONTINUE[action.phase],)
    if isinstance(action.outcome, Reject):
        return (_immediate(action.outcome),)
    return _forward(action.phase, action.outcome)


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
    if forward.splice is not None:
        handoff = response.dynamic_metadata.fields[METADATA].struct_value.fields
        handoff["at"].number_value = forward.splice.at
        if forward.only is not None:
            handoff["only"].string_value = ",".join(str(each.address) for each in forward.only)
        handoff["text"].string_value = forward.splice.text
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


def _set(options: Any, headers: dict[str, str]) -> None:
    for name, value in headers.items():
        option = options.add(append_action=_OVERWRITE)
        option.header.key = name
        option.header.raw_value = value.encode()


def _continue(phase: Phase) -> bytes:
    response = pb.ProcessingResponse()
    getattr(response, phase.name.lower()).SetInParent()
    return bytes(response.SerializeToString())


_CONTINUE = {phase: _continue(phase) for phase in Phase}
