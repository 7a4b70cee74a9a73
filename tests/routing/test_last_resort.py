"""Who is tried when all others have failed a request, and what that tells of those who answer."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

from tests.support.given import give
from tests.support.in_flight import InFlightCase
from tests.support.routing import BODY, ERROR, answer
from vllm_pd_scheduler.fleet.breaker import BreakerState
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.ends import Ends
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import InstanceRole, InstanceState, PDInstance
from vllm_pd_scheduler.routing.attempts import Failure


class LastResortCase(InFlightCase):
    """Four P and four D, all healthy."""

    def get(self, name: str) -> Endpoint:
        return self.router.registry.get(name)

    def eject(self, name: str) -> None:
        for _ in range(3):
            self.router.registry.ends.failed(self.get(name), "test", self.now)
        self.assertTrue(self.get(name).ejected)

    def on_trial(self, name: str) -> None:
        self.eject(name)
        self.router.registry.probed(self.get(name), None, self.now + 1.0)
        self.router.registry.work.reserve(self.get(name))
        self.assertTrue(self.get(name).on_trial)

    async def decode(self) -> list[str]:
        """Return the ids of a forward's list."""
        forward = await self.forward()
        forward.reservation.release()
        return [endpoint.id for endpoint in forward.decode]


class AliveTest(LastResortCase):
    def test_who_is_ejected_but_alive(self) -> None:
        registry = self.router.registry
        self.eject("d0")
        d0 = self.get("d0")
        self.assertEqual(
            (registry.ejected(InstanceRole.DECODE), registry.ejected(InstanceRole.PREFILL)), ((d0,), ())
        )
        self.assertIs(d0.state, InstanceState.UNHEALTHY, "for Envoy's own choice, and for people")
        for undo, leave in (
            (lambda: registry.undrain("d0"), lambda: registry.drain("d0")),
            (lambda: registry.probed(d0, None), lambda: [registry.probed(d0, "down") for _ in range(2)]),
        ):
            leave()
            self.assertEqual(registry.ejected(InstanceRole.DECODE), ())
            undo()
            self.assertEqual(registry.ejected(InstanceRole.DECODE), (d0,))
        registry.probed(d0, None, self.now + 1.0)
        self.assertEqual(registry.ejected(InstanceRole.DECODE), (), "on trial it is routable")

    def test_one_without_an_address_is_not(self) -> None:
        registry = Registry()
        endpoint = registry.add(PDInstance("d9", InstanceRole.DECODE, "a-name", 8000))
        registry.probed(endpoint, None)
        endpoint.breaker.open(0.0)
        self.assertFalse(endpoint.ejected)


class DecodeTest(LastResortCase):
    async def test_ejected_ones_come_last_if_there_is_room(self) -> None:
        for retries, ejected in ((3, ["d0"]), (2, []), (0, [])):
            with self.subTest(retries):
                self.router = self.start(max_retries=retries)
                self.eject("d0")
                for _ in range(4):
                    found = await self.decode()
                    self.assertEqual(found[3:], ejected)
                    self.assertNotIn("d0", found[:3])

    async def test_the_better_come_before_the_worse(self) -> None:
        self.router = self.start(max_in_flight_tokens=10_000)
        self.eject("d0")
        self.on_trial("d1")
        give(self.get("d2"), tokens=20_000.0)
        self.assertEqual(await self.decode(), ["d3", "d2", "d1", "d0"])

    async def test_of_equals_the_one_with_less_to_do(self) -> None:
        self.router = self.start(max_in_flight_tokens=10_000)
        for name, running in (("d0", 9.0), ("d1", 2.0), ("d2", 5.0)):
            give(self.get(name), others_requests=running, tokens=20_000.0)
        self.assertEqual(await self.decode(), ["d3", "d1", "d2", "d0"])

    async def test_only_with_the_key_of_the_first(self) -> None:
        """The attempts share their headers."""
        for number, key in enumerate(("a", "b", "a", "b")):
            name = f"k{number}"
            self.router.unregister_instance(f"d{number}")
            self.router.register_instance(
                PDInstance(name, InstanceRole.DECODE, f"10.0.0.{number + 1}", 8000, key)
            )
            self.router.registry.probed(self.get(name), None)
        self.eject("k0")
        self.eject("k1")
        self.assertEqual(sorted([await self.decode(), await self.decode()]), [["k2", "k0"], ["k3", "k1"]])


class RescueTest(LastResortCase):
    async def test_for_whom_it_counts(self) -> None:
        """For the one that answered; for none when all have failed it, or the answer was cut."""
        cases: tuple[tuple[tuple[Failure, ...], list[str]], ...] = (
            ((), ["d0"]),
            ((Failure.STATUS,), ["d1"]),
            ((Failure.CONNECT, Failure.TIMEOUT), ["d2"]),
            ((Failure.STATUS,) * 4, []),
            ((Failure.CUT,), []),
            ((Failure.STATUS, Failure.CUT), []),
        )
        for failures, counted in cases:
            with self.subTest(failures):
                self.router = self.start()
                forward = await self.forward()
                for number, failure in enumerate(failures):
                    self.told(forward, failure, number)
                with mock.patch.object(Ends, "succeeded") as succeeded:
                    forward.release()
                    self.wait(0.25)
                self.assertEqual([call.args[0].id for call in succeeded.call_args_list], counted)

    async def test_one_that_is_never_without_a_rescue_ends_its_trial_all_the_same(self) -> None:
        """Else it would be on trial for ever, and the one that fails them could not be ejected."""
        for number in (2, 3):
            self.router.unregister_instance(f"d{number}")
        self.eject("d0")
        first, second = await self.forward(), await self.forward()
        self.router.registry.probed(self.get("d0"), None, self.now + 1.0)
        for forward in (first, second):
            self.assertEqual([endpoint.id for endpoint in forward.decode], ["d1", "d0"])
            self.told(forward, Failure.STATUS)
        self.assertTrue(self.get("d0").on_trial)
        first.release()
        self.wait(0.25)
        self.assertIs(self.get("d0").breaker.state, BreakerState.CLOSED)
        self.router.registry.ends.failed(self.get("d1"), "the third time", self.now)
        self.assertTrue(self.get("d1").ejected)


class PrefillTest(LastResortCase):
    async def outcome(self, **settings: Any) -> str:
        """Have all but p0 fail; p0 is ejected. Return what became of the request."""
        self.router = self.start(**settings)
        self.leg.sent.clear()
        self.leg.answers = {name: answer(500, ERROR) for name in ("p1", "p2", "p3")}
        self.eject("p0")
        raw = json.dumps(BODY).encode()
        found = await self.router.route({":method": "POST", ":path": "/v1/completions"}, raw)
        pending = getattr(found, "pending", None)
        self.assertEqual(sorted(self.leg.tried[:3]), ["p1", "p2", "p3"], "first all others")
        return pending.prefill.id if pending else getattr(found, "reason", "local")

    async def test_an_ejected_one_is_tried_where_decode_may_not_prefill(self) -> None:
        cases: tuple[tuple[dict[str, Any], str], ...] = (
            ({}, "local"),
            ({"on_prefill_failure": "fail"}, "p0"),
            ({"on_prefill_failure": "fail", "max_retries": 2}, "no_prefill"),
            ({"max_local_prefill_share": 0.0}, "p0"),
            ({"max_local_prefill_share": 0.5}, "local"),
        )
        for settings, expected in cases:
            with self.subTest(settings):
                self.assertEqual(await self.outcome(**settings), expected)
                self.assertIs(self.get("p0").breaker.state, BreakerState.OPEN, "the pause is not over")
