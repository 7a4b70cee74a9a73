"""A pair that gave wrong texts gets no hand-off, also not one that is on its way."""

import asyncio
import unittest
import unittest.mock

from tests.support.routing import Case


class WrongPairsTest(Case):
    def leave_out(self, prefill: str, *decode: str) -> None:
        registry = self.router.registry
        for name in decode:
            registry.wrong_pairs.leave_out(registry.get(prefill), registry.get(name), "wrong")

    async def test_p_hands_over_to_others(self) -> None:
        self.leave_out("p0", "d0", "d2")
        for _ in range(6):
            forward = await self.route()
            self.assertFalse(forward.prefill.id == "p0" and forward.decode[0].id != "d1")
            allowed = ["d1"] if forward.prefill.id == "p0" else ["d0", "d1", "d2"]
            addresses = {name: self.router.registry.get(name).address for name in ("d0", "d1", "d2")}
            self.assertEqual([n for n, address in addresses.items() if forward.fits(str(address))], allowed)
            self.assertEqual(len(forward.decode), 3, "further ones get no hand-off")
            forward.release()

    async def test_one_that_has_nobody_left_prefills_nothing(self) -> None:
        self.leave_out("p0", "d0", "d1", "d2")
        for _ in range(6):
            (await self.route()).release()
        self.assertEqual(set(self.leg.tried), {"p1", "p2"})

    async def test_it_is_left_out_while_p_works(self) -> None:
        """The hand-off is given back, and D prefills."""
        self.leg.hold = asyncio.Event()
        routed = asyncio.ensure_future(self.route())
        await self.leg.entered.wait()
        freed = self.router.in_flight.handoffs.release = unittest.mock.Mock()
        self.leave_out(self.leg.tried[0], "d0", "d1", "d2")
        self.leg.hold.set()
        forward = await routed
        self.assertLocal(forward)
        freed.assert_called_once()
        forward.release()
        self.assertIdle()


if __name__ == "__main__":
    unittest.main()
