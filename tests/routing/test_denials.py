"""A 404 for an adapter that an instance lists: its list is read again before that is its fault."""

from tests.support.routing import Case
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure
from vllm_pd_scheduler.routing.denials import FORGET_S, STALE_S, Denials


class DenialsTest(Case):
    def setUp(self) -> None:
        super().setUp()
        self.read = 0
        self.router.in_flight.blame.denials = self.denials = Denials(self._read)
        self.endpoint: Endpoint = self.router.registry.get("d0")
        self.router.registry.models.listed(self.endpoint, frozenset({"m", "base"}), frozenset({"m"}))

    def _read(self) -> None:
        self.read += 1

    def test_the_first_ones_have_the_list_read_again(self) -> None:
        for at in (0.0, 1.0, STALE_S):
            self.assertFalse(self.denials.count(self.endpoint, "m", at))
        self.assertEqual(self.read, 3)
        self.assertTrue(self.denials.count(self.endpoint, "m", STALE_S + 0.1))
        self.assertEqual(self.read, 3)

    def test_after_a_while_it_is_a_first_one_again(self) -> None:
        self.denials.count(self.endpoint, "m", 0.0)
        self.assertTrue(self.denials.count(self.endpoint, "m", STALE_S + 1.0))
        self.assertFalse(self.denials.count(self.endpoint, "m", STALE_S + 2.0 + FORGET_S))

    def test_a_base_model_and_one_that_lists_nothing(self) -> None:
        self.assertTrue(self.denials.count(self.endpoint, "base", 0.0))
        self.assertTrue(self.denials.count(self.endpoint, None, 0.0))
        self.assertTrue(self.denials.count(self.router.registry.get("d1"), "m", 0.0))
        self.assertEqual(self.read, 0)

    def test_what_was_under_way_while_the_list_was_read(self) -> None:
        self.denials.count(self.endpoint, "m", 0.0)
        self.router.registry.models.listed(self.endpoint, frozenset({"base"}))
        self.assertFalse(self.denials.count(self.endpoint, "m", 0.5))
        self.assertTrue(self.denials.count(self.endpoint, "m", STALE_S + 0.5))

    async def test_many_at_once_eject_nobody(self) -> None:
        """Clients that go on to ask for an adapter that was just unloaded."""
        for _ in range(60):
            forward = await self.route()
            for endpoint in self.router.registry:
                self.router.registry.models.listed(endpoint, frozenset({"m"}), frozenset({"m"}))
            self.router.in_flight.attempt_failed(
                FailedAttempt(
                    str(forward.decode[0].address), Failure.REFUSED, forward.id, status=404, first=True
                )
            )
            forward.release()
        self.assertGreater(self.read, 0)
        self.assertEqual([e.id for e in self.router.registry if not e.routable], [])

    async def test_one_that_goes_on_is_ejected(self) -> None:
        self.router.registry.models.listed(self.endpoint, frozenset({"m"}), frozenset({"m"}))
        self.denials.count(self.endpoint, "m", self.router._core._clock())
        self.ahead += STALE_S + 1.0
        for _ in range(40):
            forward = await self.route()
            if forward.decode[0] is self.endpoint:
                address = str(self.endpoint.address)
                self.router.in_flight.attempt_failed(
                    FailedAttempt(address, Failure.REFUSED, forward.id, status=404, first=True)
                )
            forward.release()
            self.ahead += 0.3
            self.router.in_flight.ended.settle()
        self.assertTrue(self.endpoint.ejected)
