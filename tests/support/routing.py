"""A router whose prefill leg is no I/O, for the tests of the request path."""

import asyncio
import json
import time
import unittest
from collections.abc import Callable, Mapping
from typing import Any

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.connectors import Attempt, Connector, NixlConnector, Question
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.request.errors import Reject
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.routing.forward import Forward
from vllm_pd_scheduler.routing.later import in_this_loop

P, D = InstanceRole.PREFILL, InstanceRole.DECODE
PARAMS = {
    "do_remote_prefill": True,
    "remote_block_ids": [[1, 2]],
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "10.0.0.1",
    "remote_port": 5600,
}
BODY: dict[str, Any] = {"model": "m", "prompt": "你好", "max_tokens": 100}
ERROR = b'{"error":{"message":"as the instance wrote it"}}'


def answer(status: int = 200, body: bytes | None = None, params: Any = PARAMS) -> PrefillAnswer:
    content = body or json.dumps({"usage": {"prompt_tokens": 5}, "kv_transfer_params": params}).encode()
    return PrefillAnswer(status, "application/json", content)


class Leg:
    """A prefill leg that answers as it is told, instance by instance, and notes what it was sent."""

    def __init__(self) -> None:
        self.answers: dict[str, PrefillAnswer | Exception] = {}
        self.sent: list[tuple[str, str, dict[str, str], Any]] = []
        self.in_flight: list[int] = []
        self.hold: asyncio.Event | None = None
        self.entered = asyncio.Event()

    async def __call__(
        self,
        endpoint: Endpoint,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        attempt: Attempt,
        sent: Any = None,
    ) -> PrefillAnswer:
        self.sent.append((endpoint.id, path, {**headers, **attempt.prefill_headers()}, json.loads(body)))
        self.in_flight.append(endpoint.in_flight)
        self.entered.set()
        if self.hold is not None:
            await self.hold.wait()
        found = self.answers.get(endpoint.id, answer())
        if isinstance(found, Exception):
            raise found
        return found

    @property
    def tried(self) -> list[str]:
        return [name for name, *_ in self.sent]


def decode_body(forward: Forward, body: Mapping[str, Any] = BODY) -> Any:
    """What the first D gets for a client's body."""
    raw = json.dumps(body).encode() if forward.body is None else forward.body
    return json.loads(raw if forward.splice is None else forward.splice.into(raw))


class Ask:
    """Answers questions as it is told, instance by instance."""

    def __init__(self) -> None:
        self.failures: dict[str, Exception] = {}
        self.asked: list[tuple[str, Question]] = []
        self.forgotten: list[str] = []

    async def __call__(self, endpoint: Endpoint, question: Question, attempt: Attempt) -> Any:
        self.asked.append((endpoint.id, question))
        if endpoint.id in self.failures:
            raise self.failures[endpoint.id]
        return ((0, f"engine of {endpoint.id}"),)

    def forget(self, endpoint: Endpoint) -> None:
        self.forgotten.append(endpoint.id)


class Case(unittest.IsolatedAsyncioTestCase):
    CONFIG: Mapping[str, Any] = {}
    KEYS: Mapping[str, str] = {}
    CONNECTOR: Callable[[], Connector] = NixlConnector

    def setUp(self) -> None:
        self.leg = Leg()
        config = SchedulerConfig(**{"strategy": "round_robin", **self.CONFIG})
        self.ahead = 0.0  # seconds that a test has let pass
        self.router = PDRouter(
            config,
            prefill_leg=self.leg,
            connector=self.CONNECTOR(),
            clock=self.clock,
            later=self.later,
        )
        for role, name, host in ((P, "p", "10.0.0.1"), (D, "d", "10.0.0.2")):
            for number in range(3):
                one = f"{name}{number}"
                self.router.register_instance(PDInstance(one, role, host, 8000 + number, self.KEYS.get(one)))
        for endpoint in self.router.registry:
            self.router.registry.probed(endpoint, None)

    def clock(self) -> float:
        return time.monotonic() + self.ahead

    def later(self, delay: float, call: Callable[[], None]) -> object:
        return in_this_loop(delay, call)

    def down(self, *names: str) -> None:
        for name in names:
            for _ in range(2):
                self.router.registry.probed(self.router.registry.get(name), "down")

    def fail_all(self, found: PrefillAnswer | Exception) -> None:
        self.leg.answers = dict.fromkeys(("p0", "p1", "p2"), found)

    async def route(
        self, body: Any = BODY, path: str = "/v1/completions", method: str = "POST", **headers: str
    ) -> Any:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.router.route({":method": method, ":path": path, **more}, raw)

    def count(self, name: str, **labels: str) -> float:
        return self.router.telemetry.prometheus.get_sample_value(name, labels) or 0.0

    def assertIdle(self) -> None:
        busy = {endpoint.id: endpoint.in_flight for endpoint in self.router.registry if endpoint.in_flight}
        self.assertEqual(busy, {})

    def assertSplit(self, forward: Any, prefill: str) -> None:
        self.assertNotIsInstance(forward, Reject)
        self.assertEqual(forward.prefill.id, prefill)
        self.assertIsNone(forward.body, "Envoy has it")
        self.assertEqual(decode_body(forward), {**BODY, "kv_transfer_params": PARAMS})
        self.assertEqual(forward.headers()["x-pd-prefill"], prefill)

    def assertLocal(self, forward: Any) -> None:
        """On D alone, with the client's own bytes."""
        self.assertNotIsInstance(forward, Reject)
        self.assertIsNone(forward.prefill)
        self.assertIsNone(forward.body)
        self.assertNotIn("x-pd-prefill", forward.headers())

    def assertRejected(self, outcome: Any, status: int, reason: str) -> dict[str, Any]:
        self.assertIsInstance(outcome, Reject)
        self.assertEqual((outcome.status, outcome.reason), (status, reason))
        self.assertEqual(outcome.headers["content-type"], "application/json")
        self.assertEqual(
            self.count("pd_scheduler_requests_rejected_total", status=str(status), reason=reason), 1.0
        )
        self.assertIdle()
        error: dict[str, Any] = json.loads(outcome.body)["error"]
        return error
