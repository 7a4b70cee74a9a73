"""Requests whose clients left before Envoy had our answer."""

from __future__ import annotations

from unittest import mock

from tests.support.in_flight import InFlightCase
from vllm_pd_scheduler.fleet.ends import Ends
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure
from vllm_pd_scheduler.routing.forward import Forward
from vllm_pd_scheduler.routing.never_sent import KEPT_S, MAX_ID, MAX_KEPT, NeverSent


class NeverSentTest(InFlightCase):
    """A client that left before Envoy had our answer: Envoy tells of it by its ``X-Request-Id`` alone."""

    def left(self, request_id: str) -> None:
        attempt = FailedAttempt("", Failure.UNSENT, None, request_id=request_id)
        self.router.in_flight.attempt_failed(attempt)

    def stranded(self) -> float:
        value = self.router.telemetry.prometheus.get_sample_value
        labels = {"prefill": "p0", "outcome": "stranded"}
        return value("pd_scheduler_handoffs_unused_total", labels) or 0.0

    async def ended(self, request_id: str = "r") -> Forward:
        forward = await self.forward(request_id)
        forward.ended_by_envoy = True
        forward.release()
        return forward

    async def test_its_hand_off_is_freed_once_and_no_d_has_served_it(self) -> None:
        for told_first in (True, False):
            with self.subTest(told_first=told_first):
                self.router = self.start()
                forward = await self.forward("r")
                with mock.patch.object(Ends, "succeeded") as succeeded:
                    forward.ended_by_envoy = True
                    if told_first:
                        self.left("r")
                    forward.release()
                    if not told_first:
                        self.left("r")
                    self.assertEqual(self.freed, [], "D may have it, as far as is known")
                    self.wait(10.0)
                    self.assertEqual(self.freed, [forward.pending])
                    succeeded.assert_not_called()

    async def test_what_is_told_late_frees_too(self) -> None:
        forward = await self.ended()
        self.wait(1.0)
        self.left("r")
        self.wait(10.0)
        self.assertEqual(self.freed, [forward.pending])

    async def test_one_that_goes_on_keeps_its_hand_off(self) -> None:
        await self.forward("r")
        self.left("r")
        self.wait(10.0)
        self.assertEqual((self.freed, self.stranded()), ([], 0.0))

    async def test_one_of_which_more_is_told_was_sent(self) -> None:
        for failure in (Failure.TIMEOUT, Failure.CUT, Failure.ABANDONED):
            forward = await self.ended()
            self.told(forward, failure)
            self.left("r")
        self.wait(10.0)
        self.assertEqual((self.freed, self.stranded()), ([], 0.0))

    async def test_others_are_not_meant(self) -> None:
        await self.ended("other")
        await self.ended("")
        self.left("r")
        self.left("")
        self.wait(10.0)
        self.assertEqual((self.freed, self.stranded()), ([], 0.0))

    async def test_one_whose_call_was_lost_is_left_to_the_lease_and_counted(self) -> None:
        """Envoy may have gone on without us: what it tells of may be another request with that id."""
        forward = await self.forward("r")
        assert forward.prefill is not None
        self.assertEqual(forward.prefill.id, "p0")
        forward.release()
        self.left("r")
        self.wait(10.0)
        self.assertEqual((self.freed, self.stranded()), ([], 1.0))

    async def test_what_was_told_long_ago_is_forgotten(self) -> None:
        self.left("r")
        self.wait(10.0)
        await self.ended()
        self.wait(10.0)
        self.assertEqual(self.freed, [])

    async def test_what_is_remembered_is_bounded(self) -> None:
        left = NeverSent()
        for number in range(3 * MAX_KEPT):
            left.add(str(number), 0.0)
        left.add("x" * (MAX_ID + 1), 0.0)
        self.assertEqual(len(left), MAX_KEPT)
        left.add("r", KEPT_S + 1.0)
        self.assertEqual(len(left), 1)
