"""What a plain request costs: the calls of our own functions, which are the same on any machine."""

import asyncio
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

import vllm_pd_scheduler
from tests.support.ext_proc import prefill
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.envoy.ext_proc.server import ENVOY_CONFIG_VERSION, ExtProcService
from vllm_pd_scheduler.models import PD_ROLES, PDInstance
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.routing.result import Result
from vllm_pd_scheduler.telemetry import Ending

CALLS = 440
"""What a request may take, a tenth more than it took when this was written. Before it is made larger: is what
was added in use here at all? What is off is to cost a test of an attribute, not a call."""

HEADERS = {
    ":method": "POST",
    ":path": "/v1/completions",
    ":authority": "127.0.0.1:10000",
    "content-type": "application/json",
    "x-request-id": "0b3c0a4e-5a1e-4cf8-9f0a-0d7e5f6f2f11",
}
BODY = b'{"model": "m", "prompt": "Once upon a time", "max_tokens": 8, "stream": false}'
_OURS = str(Path(vllm_pd_scheduler.__file__).parent)


class Call:
    """A call of Envoy's to which each message goes out at once."""

    connection = object()
    is_connected = True

    def __init__(self) -> None:
        self.receiver: Any = None
        self.written: list[bytes] = []
        self.answered = asyncio.Event()

    def metadata(self, name: str) -> str | None:
        return ENVOY_CONFIG_VERSION if name == "pd-envoy-config" else None

    def next(self) -> None:
        pass

    def write(self, *parts: bytes) -> None:
        self.written.append(b"".join(parts))
        self.receiver.written()
        if len(self.written) == 2:
            self.answered.set()

    def finish(self, *_: object) -> None:
        pass


class Path1P1D:
    """A router with one P and one D, and the requests through it. Each takes a second of its clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.router = PDRouter(
            SchedulerConfig(strategy="round_robin"),
            prefill_leg=prefill,
            clock=lambda: self.now,
            later=lambda *_: None,
        )
        for number, role in enumerate(PD_ROLES):
            self.router.register_instance(PDInstance(role, role, "10.0.0.1", 80 + number))
        for endpoint in self.router.registry:
            self.router.registry.probed(endpoint, None)
        self.service = ExtProcService(self.router)

    async def request(self) -> None:
        """Have a request split, and its answer end well."""
        call: Any = Call()
        (opened,) = self.service.methods().values()
        call.receiver = exchange = opened.open(call)
        headers = pb.ProcessingRequest()
        for name, value in {**HEADERS, "content-length": str(len(BODY))}.items():
            headers.request_headers.headers.headers.add(key=name, raw_value=value.encode())
        body = pb.ProcessingRequest(request_body=pb.HttpBody(body=BODY, end_of_stream=True))
        exchange.message(headers.SerializeToString())
        exchange.message(body.SerializeToString())
        await call.answered.wait()
        answer = pb.ProcessingResponse.FromString(call.written[1]).request_body.response
        given = answer.header_mutation.set_headers
        sent = {each.header.key: each.header.raw_value.decode() for each in given}
        assert sent["x-pd-prefill"] == "prefill"
        exchange.half_closed()
        self.now += 1.0
        ended = Result(sent["x-pd-id"], Ending.OK, 200, 0.5, 0.25, 0.1, "10.0.0.1:81", 500)
        self.router.in_flight.told(ended)
        await asyncio.sleep(0)


async def calls_of(path: Path1P1D) -> Counter[str]:
    """Return how often each function of ours is called for one request."""
    found = Counter[str]()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_OURS):
            found[f"{code.co_filename[len(_OURS) + 1 :]}: {code.co_qualname}"] += 1

    sys.setprofile(note)
    try:
        await path.request()
    finally:
        sys.setprofile(None)
    return found


async def test_a_plain_request_takes_no_more_calls_than_before() -> None:
    path = Path1P1D()
    for _ in range(20):
        await path.request()
    calls = await calls_of(path)
    most = "\n".join(f"{count:5} {name}" for name, count in calls.most_common(25))
    assert calls.total() <= CALLS, (
        f"A plain request takes {calls.total()} calls of our functions, {CALLS} at most are allowed. Compare "
        f"these with those of the commit before, to see what has come, and whether it must:\n{most}"
    )
