"""What the core makes of attempts that failed: reservations, hand-offs, limits. And how they are read."""

from __future__ import annotations

import json
import unittest
from typing import Any
from unittest import mock

from envoy.service.accesslog.v3 import als_pb2

from tests.support.routing import BODY, Leg
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.envoy.access_log import read_attempts
from vllm_pd_scheduler.fleet.breaker import BreakerState
from vllm_pd_scheduler.handoff.pending import PendingHandoff
from vllm_pd_scheduler.models import InstanceRole, InstanceState, PDInstance
from vllm_pd_scheduler.request import headers as names
from vllm_pd_scheduler.request.errors import Reject
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure
from vllm_pd_scheduler.routing.forward import Forward
from vllm_pd_scheduler.routing.time_limits import LEASE_SHARE

_FREE = (Failure.CONNECT, Failure.RESET, Failure.STATUS)


class Case(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.now = 100.0
        self.leg = Leg()
        self.router = self.start()

    def start(self, **config: Any) -> PDRouter:
        settings = SchedulerConfig(**{"strategy": "round_robin", **config})
        router = PDRouter(settings, prefill_leg=self.leg, clock=lambda: self.now)
        for number in range(4):
            for role in InstanceRole:
                name = f"{role[0]}{number}"
                router.register_instance(PDInstance(name, role, f"10.0.0.{number + 1}", 8000))
        for endpoint in router.registry:
            router.registry.probed(endpoint, None)
        self.freed: list[PendingHandoff] = []
        router.in_flight.release_handoff = self.freed.append
        return router

    async def forward(self, **body: Any) -> Forward:
        raw = json.dumps({**BODY, **body}).encode()
        outcome = await self.router.route({":method": "POST", ":path": "/v1/completions"}, raw)
        assert isinstance(outcome, Forward), outcome
        return outcome

    def told(self, forward: Forward, failure: Failure, number: int = 0) -> None:
        address = str(forward.decode[number].address)
        self.router.in_flight.attempt_failed(FailedAttempt(address, failure, forward.id, number == 0))

    def in_flight(self) -> dict[str, int]:
        return {e.id: e.in_flight for e in self.router.registry if e.in_flight}


class FailedAttemptTest(Case):
    async def test_the_reservation_moves_along_the_list(self) -> None:
        forward = await self.forward()
        ids = [endpoint.id for endpoint in forward.decode]
        self.assertEqual(self.in_flight(), {ids[0]: 1})
        for number in range(3):
            self.told(forward, Failure.RESET, number)
            self.assertEqual(self.in_flight(), {ids[number + 1]: 1})
        self.told(forward, Failure.RESET, 3)
        self.assertEqual(self.in_flight(), {ids[3]: 1}, "there is no further one")
        forward.release()
        self.assertEqual(self.in_flight(), {})

    async def test_whose_hand_off_is_freed(self) -> None:
        """After a time-out the hung D may still fetch it; after a cut it was fetched."""
        freed = {}
        for failure in set(Failure) - {Failure.LEFT}:
            forward = await self.forward()
            self.freed.clear()
            self.told(forward, failure)
            freed[failure] = self.freed == [forward.pending]
            forward.release()
        self.assertEqual(
            freed,
            {
                Failure.CONNECT: True,
                Failure.RESET: True,
                Failure.STATUS: True,
                Failure.TIMEOUT: False,
                Failure.CUT: False,
            },
        )

    async def test_a_client_that_left_before_an_answer_began(self) -> None:
        """Envoy tells of it after the end. It is nobody's failure, and frees once."""
        forward = await self.forward()
        forward.release()
        for _ in range(2):
            self.told(forward, Failure.LEFT)
            self.assertEqual(self.freed, [forward.pending])
        second = await self.forward()
        second.release()
        self.told(second, Failure.LEFT, 1)
        self.assertEqual(self.freed, [forward.pending], "the second attempt went without it")
        self.assertEqual({e.breaker.state for e in self.router.registry}, {BreakerState.CLOSED})

    async def test_a_further_attempt_has_no_hand_off_to_free(self) -> None:
        forward = await self.forward()
        self.told(forward, Failure.RESET, 1)
        self.assertEqual(self.freed, [])

    async def test_what_is_told_after_the_end_still_frees(self) -> None:
        """A quick answer of the next D can overtake what Envoy tells of the first."""
        freed = {}
        for failure in (*_FREE, Failure.TIMEOUT, Failure.CUT):
            forward = await self.forward()
            forward.release()
            self.freed.clear()
            self.told(forward, failure, 1)
            self.assertEqual(self.freed, [], "a further attempt has none")
            self.told(forward, failure)
            self.told(forward, failure)
            freed[failure] = self.freed == [forward.pending]
            self.assertEqual(self.in_flight(), {})
        self.assertEqual(freed, {failure: failure in _FREE for failure in freed})

    async def test_what_is_told_of_strangers_changes_nothing(self) -> None:
        forward = await self.forward()
        forward.release()
        self.router.in_flight.attempt_failed(FailedAttempt("10.9.9.9:1", Failure.RESET, forward.id))
        self.router.in_flight.attempt_failed(FailedAttempt("10.0.0.1:8000", Failure.RESET, None))
        self.assertEqual((self.in_flight(), self.freed), ({}, []))

    async def test_an_instance_is_ejected_and_tried_with_one_request(self) -> None:
        bad = self.router.registry.get("d1")
        for _ in range(3):
            self.router.in_flight.attempt_failed(FailedAttempt(str(bad.address), Failure.STATUS))
        self.assertIs(bad.state, InstanceState.EJECTED)
        self.router.registry.probed(bad, None, self.now + 0.5)
        self.assertIs(bad.state, InstanceState.EJECTED, "the pause is 1 s")
        self.router.registry.probed(bad, None, self.now + 1.0)
        self.assertIs(bad.state, InstanceState.HEALTHY)
        forwards = [await self.forward() for _ in range(12)]
        trials = [forward for forward in forwards if forward.decode[0] is bad]
        self.assertEqual(len(trials), 1, "one at a time")
        trials[0].release()
        forwards = [await self.forward() for _ in range(8)]
        self.assertGreater(sum(forward.decode[0] is bad for forward in forwards), 1)

    async def test_the_last_one_serves_even_on_trial_or_ejected(self) -> None:
        registry, last = self.router.registry, self.router.registry.get("d3")
        for _ in range(3):
            self.router.in_flight.attempt_failed(FailedAttempt(str(last.address), Failure.STATUS))
        self.assertIs(last.state, InstanceState.EJECTED)
        for number in range(3):
            registry.drain(f"d{number}")
        self.assertIs(last.state, InstanceState.HEALTHY, "one that may fail is better than none")
        forwards = [await self.forward() for _ in range(3)]
        self.assertEqual([forward.decode for forward in forwards], [[last]] * 3)

    async def test_half_of_a_role_stays(self) -> None:
        for number in range(4):
            for _ in range(5):
                self.router.in_flight.attempt_failed(
                    FailedAttempt(f"10.0.0.{number + 1}:8000", Failure.STATUS)
                )
        self.assertEqual(len(self.router.registry.routable(InstanceRole.DECODE)), 2)

    async def test_a_restarted_instance_has_no_reservations_of_the_one_before(self) -> None:
        forward = await self.forward()
        endpoint, registry = forward.decode[0], self.router.registry
        self.assertFalse(registry.started(endpoint, 1000.0))
        self.assertFalse(registry.started(endpoint, 1000.0))
        self.assertTrue(registry.started(endpoint, 2000.0))
        self.assertEqual(endpoint.in_flight, 0)
        later = registry.reserve(endpoint)
        forward.release()
        self.assertEqual(endpoint.in_flight, 1, "what ended was the old one's")
        later.release()
        self.assertEqual(endpoint.in_flight, 0)


class HandoffTest(Case):
    async def test_pending_hand_offs_are_counted_on_p(self) -> None:
        forward = await self.forward()
        assert forward.prefill is not None
        self.assertEqual(forward.prefill.pending_handoffs, 1)
        forward.release()
        forward.release()
        self.assertEqual(forward.prefill.pending_handoffs, 0)

    async def test_a_client_that_left_before_decode(self) -> None:
        forward = await self.forward()
        self.router.in_flight.unused(forward)
        self.assertEqual((self.freed, self.in_flight()), ([forward.pending], {}))

    async def test_a_late_hand_off_is_not_used(self) -> None:
        """P answers at 0; then the event loop is held up for longer than the hand-off may wait."""
        self.router = self.start(kv_lease_duration=10.0)
        limit = self.router._core._local
        with mock.patch.object(limit, "take", wraps=limit.take) as take:
            take.side_effect = lambda _: setattr(self, "now", self.now + 10.0 * LEASE_SHARE + 0.1)
            forward = await self.forward()
        self.assertEqual((forward.pending, forward.body), (None, None))
        late = self.router.telemetry.prometheus.get_sample_value(
            "pd_handoffs_unused_total", {"prefill": "p0", "outcome": "late"}
        )
        self.assertEqual(late, 1.0)


class FirstByteTest(Case):
    async def test_limits(self) -> None:
        self.router = self.start(decode_first_byte_timeout=5.0, decode_seconds_per_token=0.5)
        for body, expected in (
            ({"stream": True, "max_tokens": 100}, 5.0),
            ({"max_tokens": 10}, 10.0),
            ({"max_tokens": 10, "max_completion_tokens": 4}, 7.0),
            ({"max_tokens": 1000}, 505.0),  # in one piece: may outlast the lease
            ({"max_tokens": None}, None),
            ({"max_tokens": -5000}, None),
            ({"max_tokens": True}, None),
            ({"max_tokens": "many"}, None),
        ):
            with self.subTest(body):
                forward = await self.forward(**body)
                self.assertEqual(forward.first_byte_timeout, expected)
                header = forward.headers().get(names.FIRST_BYTE_TIMEOUT)
                self.assertEqual(header, None if expected is None else str(int(expected * 1000)))

    async def test_a_stream_must_begin_before_its_hand_off_is_too_old(self) -> None:
        self.router = self.start(decode_first_byte_timeout=100.0, kv_lease_duration=30.0)
        forward = await self.forward(stream=True)
        self.assertEqual(forward.first_byte_timeout, 30.0 * LEASE_SHARE)

    async def test_so_must_an_answer_in_one_piece_that_is_expected_by_then(self) -> None:
        self.router = self.start(decode_first_byte_timeout=20.0, decode_seconds_per_token=0.1)
        for tokens, expected in ((30, 23.0), (200, 24.0), (300, 50.0)):
            forward = await self.forward(max_tokens=tokens)
            self.assertEqual(forward.first_byte_timeout, expected)

    async def test_a_limit_beyond_all_bounds(self) -> None:
        forward = await self.forward(n=2, max_tokens=10**300)
        self.assertLess(forward.first_byte_timeout or 0, 2e6)


class OnPrefillFailureTest(Case):
    async def reject(self) -> Reject:
        raw = json.dumps(BODY).encode()
        outcome = await self.router.route({":method": "POST", ":path": "/v1/completions"}, raw)
        assert isinstance(outcome, Reject), outcome
        return outcome

    async def test_fail(self) -> None:
        self.router = self.start(on_prefill_failure="fail")
        for endpoint in self.router.registry.endpoints(InstanceRole.PREFILL):
            self.router.drain_instance(endpoint.id)
        outcome = await self.reject()
        self.assertEqual((outcome.status, outcome.reason), (503, "no_prefill"))
        self.assertIn("retry-after", outcome.headers)

    async def test_local_for_a_share_of_the_requests(self) -> None:
        self.router = self.start(max_local_prefill_share=0.02)
        for endpoint in self.router.registry.endpoints(InstanceRole.PREFILL):
            self.router.drain_instance(endpoint.id)
        for _ in range(2):
            self.assertIsNone((await self.forward()).pending)
        self.assertEqual((await self.reject()).status, 503)


class ReadTest(unittest.TestCase):
    def read(self, status: int = 0, attempt: str = "1", port: int = 8000, **flags: bool) -> Any:
        message = als_pb2.StreamAccessLogsMessage()
        entry = message.http_logs.log_entry.add()
        entry.common_properties.upstream_remote_address.socket_address.address = "10.0.0.1"
        entry.common_properties.upstream_remote_address.socket_address.port_value = port
        for name, value in flags.items():
            setattr(entry.common_properties.response_flags, name, value)
        if status:
            entry.response.response_code.value = status
        entry.request.request_headers[names.ID] = "id-1"
        entry.request.request_headers[names.ATTEMPT] = attempt
        return list(read_attempts(message.SerializeToString()))

    def test_how_it_failed(self) -> None:
        for found, failure in (
            (self.read(upstream_connection_failure=True), Failure.CONNECT),
            (self.read(upstream_connection_termination=True), Failure.RESET),
            (self.read(upstream_remote_reset=True), Failure.RESET),
            (self.read(upstream_request_timeout=True), Failure.TIMEOUT),
            (self.read(status=503), Failure.STATUS),
            (self.read(), Failure.LEFT),
            (self.read(upstream_protocol_error=True), Failure.RESET),
            (self.read(status=200, upstream_connection_termination=True), Failure.CUT),
            (self.read(status=200, upstream_protocol_error=True), Failure.CUT),
        ):
            self.assertEqual(found, [FailedAttempt("10.0.0.1:8000", failure, "id-1", True)])

    def test_further_attempts(self) -> None:
        self.assertFalse(self.read(status=500, attempt="2")[0].first)

    def test_what_is_nobodys_fault(self) -> None:
        self.assertEqual(self.read(status=503, port=0), [])
        self.assertEqual(list(read_attempts(b"\xff\xff")), [])
