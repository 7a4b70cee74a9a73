"""What becomes of a request whose prefill fails, with a prefill leg that is no I/O."""

import json
from collections.abc import Mapping
from typing import Any
from unittest import mock

from tests.support.in_flight import InFlightCase
from tests.support.routing import BODY, ERROR, Case, answer
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer, PrefillFailed
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.request.errors import Reject


class PrefillFailsTest(Case):
    CONFIG: Mapping[str, Any] = {"max_retries": 1}

    async def test_another_p_is_tried(self) -> None:
        cases: list[tuple[PrefillAnswer | Exception, str]] = [
            (answer(500, ERROR), "status_500"),
            (answer(503, ERROR), "status_503"),
            (answer(429, ERROR), "status_429"),
            (answer(408, ERROR), "status_408"),
            (answer(302, ERROR), "status_302"),
            (PrefillFailed("connect"), "connect"),
            (PrefillFailed("timeout"), "timeout"),
            (PrefillFailed("reset"), "reset"),
        ]
        for failure, reason in cases:
            with self.subTest(reason):
                self.setUp()
                self.leg.answers = {"p0": failure}
                forward = await self.route()
                self.assertEqual(len(self.leg.tried), 2)
                self.assertNotEqual(self.leg.tried[1], "p0")
                self.assertSplit(forward, self.leg.tried[1])
                self.assertEqual(self.count("pd_prefill_failures_total", prefill="p0", reason=reason), 1.0)
                forward.release()
                self.assertIdle()

    async def test_max_retries_then_decode_prefills(self) -> None:
        self.fail_all(answer(500, ERROR))
        forward = await self.route()
        self.assertLocal(forward)
        self.assertEqual(len(set(self.leg.tried)), 2)
        self.assertEqual(self.count("pd_requests_total", decode="d0", served="local"), 1.0)
        forward.release()
        self.assertIdle()

    async def test_what_every_p_would_refuse_goes_to_the_client_as_it_is(self) -> None:
        for status in (400, 401, 403, 404, 413, 422):
            with self.subTest(status):
                self.setUp()
                self.leg.answers = {"p0": answer(status, ERROR)}
                outcome = await self.route()
                self.assertRejected(outcome, status, "prefill_4xx")
                self.assertEqual(outcome.body, ERROR)
                self.assertEqual(self.leg.tried, ["p0"])

    async def test_a_p_that_does_not_take_its_key_is_replaced(self) -> None:
        """The key is the scheduler's, not the client's."""
        for status in (401, 403):
            with self.subTest(status), mock.patch.object(Case, "KEYS", {"p0": "old"}):
                self.setUp()
                self.leg.answers = {"p0": answer(status, ERROR)}
                forward = await self.route()
                self.assertSplit(forward, self.leg.tried[1])
                reason = f"status_{status}"
                self.assertEqual(self.count("pd_prefill_failures_total", prefill="p0", reason=reason), 1.0)
                forward.release()

    async def test_an_answer_without_a_hand_off_lets_decode_prefill(self) -> None:
        for found in (
            answer(params=None),
            answer(params={"do_remote_prefill": True}),
            answer(body=b"not json"),
        ):
            with self.subTest(found.body[:30]):
                self.setUp()
                self.leg.answers = {"p0": found}
                forward = await self.route()
                self.assertLocal(forward)
                self.assertEqual(self.leg.tried, ["p0"], "another P is configured the same")
                reason = "no_handoff"
                self.assertEqual(self.count("pd_prefill_failures_total", prefill="p0", reason=reason), 1.0)
                forward.release()
                self.assertIdle()

    async def test_a_leg_that_breaks_reserves_nothing(self) -> None:
        self.fail_all(RuntimeError("a bug"))
        with self.assertRaisesRegex(RuntimeError, "a bug"):
            await self.route()
        self.assertIdle()


class NeverTwiceTest(Case):
    CONFIG: Mapping[str, Any] = {"max_retries": 9, "strategy": "least_load"}

    async def test_no_p_is_tried_twice(self) -> None:
        self.fail_all(PrefillFailed("connect"))
        forward = await self.route()
        self.assertLocal(forward)
        self.assertEqual(sorted(self.leg.tried), ["p0", "p1", "p2"])


class NoRetriesTest(Case):
    CONFIG: Mapping[str, Any] = {"max_retries": 0}

    async def test_one_attempt_and_one_d(self) -> None:
        self.fail_all(answer(500, ERROR))
        forward = await self.route()
        self.assertLocal(forward)
        self.assertEqual(self.leg.tried, ["p0"])
        self.assertEqual(len(forward.decode), 1)


class OnPrefillFailureTest(InFlightCase):
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
