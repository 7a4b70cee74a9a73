"""A gateway's call, whose messages a test sends."""

import json
import unittest
from typing import Any

from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from tests.support import ext_proc as fleet
from tests.support.waiting import until
from vllm_pd_scheduler.envoy.ext_proc.server import ExtProcService
from vllm_pd_scheduler.handoff.pending import PendingHandoff
from vllm_pd_scheduler.rpc import StatusCode

BODY = json.dumps({"prompt": "p" * 200}).encode()
FULL = ProcessingMode.FULL_DUPLEX_STREAMED


def first(
    request_mode: Any = FULL, response_mode: Any = FULL, *, end: bool = False, **headers: str
) -> pb.ProcessingRequest:
    request = pb.ProcessingRequest()
    for name, value in {**(fleet.MODELS if end else fleet.COMPLETION), **headers}.items():
        request.request_headers.headers.headers.add(key=name.replace("_", "-"), raw_value=value.encode())
    request.request_headers.end_of_stream = end
    if request_mode is not None:
        request.protocol_config.request_body_mode = request_mode
        request.protocol_config.response_body_mode = response_mode
    return request


def body(data: bytes, last: bool = False) -> pb.ProcessingRequest:
    request = pb.ProcessingRequest()
    request.request_body.body, request.request_body.end_of_stream = data, last
    return request


def head(
    status: int = 200, served: str | None = None, own: bool = False, **more: str
) -> pb.ProcessingRequest:
    request = pb.ProcessingRequest()
    headers = {":status": str(status), **({} if own else {"date": "today"}), **more}
    for name, value in headers.items():
        request.response_headers.headers.headers.add(key=name.replace("_", "-"), raw_value=value.encode())
    if served is not None:
        fields = request.metadata_context.filter_metadata["envoy.lb"].fields
        fields["x-gateway-destination-endpoint-served"].string_value = served
    return request


def token(data: bytes = b"data: x\n\n", last: bool = False) -> pb.ProcessingRequest:
    request = pb.ProcessingRequest()
    request.response_body.body, request.response_body.end_of_stream = data, last
    return request


class Connection:
    """A gateway's."""


class FakeCall:
    """A call whose messages come as the test sends them, and whose answers go out when it says."""

    def __init__(self, service: ExtProcService, connection: object, version: str | None = None) -> None:
        self.connection = connection
        self.is_connected = True
        self.version = version
        self.asked = False
        self.goes_at_once = True
        self.unwritten = 0
        self.written: list[pb.ProcessingResponse] = []
        self.status: StatusCode | None = None
        self.exchange: Any = None
        self.exchange = service._open(self)  # type: ignore[arg-type]

    def metadata(self, _: str) -> str | None:
        return self.version

    def next(self) -> None:
        self.asked = True

    def send(self, message: pb.ProcessingRequest) -> None:
        assert self.asked, "no message was asked for"
        self.asked = False
        self.exchange.message(message.SerializeToString())

    def write(self, *parts: bytes) -> None:
        self.write_all([parts])

    def write_all(self, messages: Any) -> None:
        self.written += [pb.ProcessingResponse.FromString(b"".join(parts)) for parts in messages]
        self.unwritten += 1
        if self.goes_at_once:
            self.goes_out()

    def goes_out(self) -> None:
        self.unwritten -= 1
        self.exchange.written()

    def finish(self, code: StatusCode = StatusCode.OK, _: str = "") -> None:
        self.status = code

    @property
    def kinds(self) -> list[str | None]:
        return [each.WhichOneof("response") for each in self.written]


class Case(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.router = fleet.build()
        self.freed: list[PendingHandoff] = []
        self.router.in_flight.handoffs.release = self.freed.append
        self.service = ExtProcService(self.router)
        self.connection = Connection()

    def open(self, version: str | None = None) -> FakeCall:
        return FakeCall(self.service, self.connection, version)

    async def routed(self, call: FakeCall, *messages: pb.ProcessingRequest) -> None:
        """Send a request, and wait for what is answered."""
        for message in messages or (first(), body(BODY), body(b"", True)):
            call.send(message)
        await until(lambda: call.written)

    def assert_nothing_left(self) -> None:
        self.assertEqual(fleet.in_flight(self.router), 0)
        self.assertEqual(self.service.open_streams, 0)
        self.assertEqual(self.router.body_memory.used, 0)

    @property
    def decision(self) -> Any:
        return next(iter(self.router.decisions.after(self.router.decisions.newest - 1)))

    def failures(self) -> dict[str, float]:
        """Failed attempts by kind."""
        found: dict[str, float] = {}
        for metric in self.router.telemetry.prometheus.collect():
            for sample in metric.samples:
                if sample.name == "pd_scheduler_decode_attempt_failures_total":
                    found[sample.labels["failure"]] = found.get(sample.labels["failure"], 0) + sample.value
        return found
