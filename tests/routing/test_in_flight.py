"""What becomes of requests that are with decode: attempts that fail, reservations, hand-offs."""

from __future__ import annotations

from unittest import mock

from tests.support.in_flight import InFlightCase
from vllm_pd_scheduler.fleet.breaker import BreakerState
from vllm_pd_scheduler.fleet.ends import Ends
from vllm_pd_scheduler.models import InstanceRole, InstanceState
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure, Retry
from vllm_pd_scheduler.routing.result import Result
from vllm_pd_scheduler.routing.time_limits import LEASE_SHARE
from vllm_pd_scheduler.telemetry import Ending, Stray

_FREE = (Failure.CONNECT, Failure.RESET, Failure.STATUS)


class IdTest(InFlightCase):
    async def test_ids_begin_with_the_schedulers_name(self) -> None:
        ids = []
        for name in ("w0", "w0", ""):
            self.router = self.start(name=name)
            ids += [(await self.forward()).id for _ in range(2)]
        self.assertRegex(ids[0], r"^w0\.[0-9a-f]{8}-0$")
        self.assertEqual(ids[1], f"{ids[0][:-1]}1")
        self.assertNotEqual(ids[2], ids[0], "after a restart")
        self.assertRegex(ids[4], r"^[0-9a-f]{8}-0$")


class StrayTest(InFlightCase):
    """What Envoy tells and asks of requests that are not of this run."""

    def strays(self) -> dict[str, float]:
        values = self.router.telemetry.prometheus.get_sample_value
        found = {what: values("pd_scheduler_strays_total", {"what": what}) for what in Stray}
        return {str(what): count for what, count in found.items() if count}

    async def test_each_is_counted_and_the_instance_too(self) -> None:
        own = await self.forward()
        in_flight, address = self.router.in_flight, str(own.decode[0].address)
        for request in ("00000000-7", "w1.00000000-7"):
            self.assertFalse(in_flight.is_for_us(request))
            in_flight.attempt_failed(FailedAttempt(address, Failure.STATUS, request, status=500))
            in_flight.told(Result(request, Ending.OK, 200, 1.0, 0.5, 0.1, address, 100))
            self.assertIs(in_flight.may_try_again(request, 1), Retry.UNKNOWN)
        self.assertEqual(self.strays(), {"attempt": 2, "result": 2, "question": 2})
        failures = self.router.telemetry.prometheus.get_sample_value(
            "pd_scheduler_decode_attempt_failures_total", {"decode": own.decode[0].id, "failure": "status"}
        )
        self.assertEqual(failures, 2)

    async def test_no_stray_is_what_has_no_id_or_one_of_this_run(self) -> None:
        ended = await self.forward()
        ended.release()
        in_flight, address = self.router.in_flight, str(ended.decode[0].address)
        self.wait(10.0)
        for request in (None, "", ended.id):
            in_flight.attempt_failed(FailedAttempt(address, Failure.CONNECT, request))
        in_flight.told(Result(ended.id, Ending.OK, 200, 1.0, 0.5, 0.1, address, 100))
        self.assertTrue(in_flight.is_for_us(ended.id))
        self.assertEqual(self.strays(), {})

    async def test_ids_with_our_name_are_for_us_also_from_before_a_restart(self) -> None:
        before = (await self.forward()).id
        self.router = self.start(name="w0")
        in_flight = self.router.in_flight
        self.assertTrue(in_flight.is_for_us("w0.00000000-1"))
        self.assertIs(in_flight.may_try_again("w0.00000000-1", 1), Retry.UNKNOWN)
        for request in (before, "w00.00000000-1", "w1.00000000-1"):
            self.assertFalse(in_flight.is_for_us(request))


class FailedAttemptTest(InFlightCase):
    async def test_the_reservation_moves_along_the_list(self) -> None:
        forward = await self.forward()
        ids = [endpoint.id for endpoint in forward.decode]
        self.assertEqual(self.in_flight(), {ids[0]: 1})
        for number in range(3):
            self.told(forward, Failure.CONNECT, number)
            self.assertEqual(self.in_flight(), {ids[number + 1]: 1})
        self.told(forward, Failure.CONNECT, 3)
        self.assertEqual(self.in_flight(), {ids[3]: 1}, "there is no further one")
        forward.release()
        self.assertEqual(self.in_flight(), {})

    async def test_one_that_is_not_tried_again_is_no_success_of_the_next(self) -> None:
        for failure in (Failure.RESET, Failure.STATUS):
            forward = await self.forward(prompt=failure)
            for number in range(2):
                self.told(forward, failure, number)
            forward.release()
            with mock.patch.object(Ends, "succeeded") as succeeded:
                self.wait(1.0)
            succeeded.assert_not_called()

    async def test_nor_is_one_that_has_timed_out_and_may_not_be_tried_elsewhere(self) -> None:
        retry = None
        while retry is not Retry.SLOW:
            forward = await self.forward()
            self.told(forward, Failure.TIMEOUT)
            retry = self.router.in_flight.may_try_again(forward.id, 1)
            forward.release()
        self.assertIsNone(forward.answering)

    async def test_whose_hand_off_is_freed(self) -> None:
        """After a time-out the hung D may still fetch it; after a cut it was fetched."""
        freed = {}
        for failure in Failure:
            forward = await self.forward(prompt=failure)
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
                Failure.OVERLOADED: True,
                Failure.REFUSED: True,
                Failure.UNSENT: True,
                Failure.TIMEOUT: False,
                Failure.CUT: False,
                Failure.ABANDONED: False,
                Failure.BROKEN_OFF: False,
                Failure.PASSED_OVER: False,  # another has what was sent to it, then
                Failure.LEFT: False,  # at once
            },
        )

    async def test_a_client_that_left_before_an_answer_began(self) -> None:
        """Envoy tells of it after the end. Nobody has failed; it frees once, when D has had its time."""
        forward = await self.forward()
        forward.release()
        for _ in range(2):
            self.told(forward, Failure.LEFT)
        self.assertEqual(self.freed, [])
        self.wait(1.0)
        self.assertEqual(self.freed, [forward.pending])
        second = await self.forward()
        second.release()
        self.told(second, Failure.LEFT, 1)
        self.wait(1.0)
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
            forward = await self.forward(prompt=failure)
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
        self.router.in_flight.attempt_failed(FailedAttempt("10.9.9.9:1", Failure.RESET, "another"))
        self.router.in_flight.attempt_failed(FailedAttempt("10.0.0.1:8000", Failure.RESET, None))
        self.assertEqual((self.in_flight(), self.freed), ({}, []))

    async def test_what_is_told_of_an_instance_that_was_removed_frees(self) -> None:
        forward = await self.forward()
        self.router.unregister_instance(forward.decode[0].id)
        self.told(forward, Failure.RESET)
        self.assertEqual(self.freed, [forward.pending])

    async def test_an_instance_is_ejected_and_tried_with_one_request(self) -> None:
        bad = self.router.registry.get("d1")
        for _ in range(3):
            self.router.in_flight.attempt_failed(FailedAttempt(str(bad.address), Failure.STATUS))
        self.assertIs(bad.state, InstanceState.UNHEALTHY)
        self.router.registry.probed(bad, None, self.now + 0.5)
        self.assertIs(bad.state, InstanceState.UNHEALTHY, "the pause is 1 s")
        self.router.registry.probed(bad, None, self.now + 1.0)
        self.assertIs(bad.state, InstanceState.HEALTHY)
        forwards = [await self.forward() for _ in range(12)]
        trials = [forward for forward in forwards if forward.decode[0] is bad]
        self.assertEqual(len(trials), 1, "one at a time")
        trials[0].release()
        self.wait(0.25)
        forwards = [await self.forward() for _ in range(8)]
        self.assertGreater(sum(forward.decode[0] is bad for forward in forwards), 1)

    async def test_the_last_one_serves_even_on_trial_or_ejected(self) -> None:
        registry, last = self.router.registry, self.router.registry.get("d3")
        for _ in range(3):
            self.router.in_flight.attempt_failed(FailedAttempt(str(last.address), Failure.STATUS))
        self.assertIs(last.state, InstanceState.UNHEALTHY)
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
        later = registry.work.reserve(endpoint)
        forward.release()
        self.assertEqual(endpoint.in_flight, 1, "what ended was the old one's")
        later.release()
        self.assertEqual(endpoint.in_flight, 0)


class HandoffTest(InFlightCase):
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
            "pd_scheduler_handoffs_unused_total", {"prefill": "p0", "outcome": "late"}
        )
        self.assertEqual(late, 1.0)
