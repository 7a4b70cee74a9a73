"""The lists of models are read again before a refusal: for all that wait at once, and not too often."""

import asyncio
import unittest
from unittest import mock

from vllm_pd_scheduler.routing.rereading import MAX_A_SECOND, MAX_WAITING, PAUSE_S, Rereading


class RereadingTest(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.now = 0.0
        self.size = 4
        self.begun = 0
        self.go = asyncio.Event()
        self.go.set()
        self.again = Rereading(lambda: self.size, lambda: self.now)
        self.again.read = self.read

    async def asyncTearDown(self) -> None:
        await self.again.close()

    async def read(self) -> None:
        self.begun += 1
        await self.go.wait()

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def test_all_that_wait_share_one(self) -> None:
        await asyncio.gather(*(self.again() for _ in range(100)))
        self.assertEqual(self.begun, 1)

    async def test_who_comes_while_one_runs_needs_another(self) -> None:
        """What that has read may be older than what it is about."""
        self.go.clear()
        first = asyncio.ensure_future(self.again())
        await self.settle()
        self.now += PAUSE_S
        second = asyncio.ensure_future(self.again())
        await self.settle()
        self.assertEqual(self.begun, 2)
        self.assertFalse(first.done() or second.done())
        self.go.set()
        await asyncio.gather(first, second)

    async def test_the_next_one_is_due_a_while_later(self) -> None:
        await self.again()
        self.now += 0.9 * PAUSE_S
        with mock.patch.object(asyncio, "sleep", side_effect=self.slept) as sleep:
            await self.again()
        self.assertAlmostEqual(sleep.call_args[0][0], 0.1 * PAUSE_S)
        self.assertEqual(self.begun, 2)

    async def slept(self, seconds: float) -> None:
        self.now += seconds

    async def test_a_large_fleet_is_asked_less_often(self) -> None:
        self.size = int(10 * MAX_A_SECOND)
        await self.again()
        self.now += 8.0
        await self.again()
        self.assertEqual(self.begun, 1, "nobody waits so long")
        self.now += 3.0
        await self.again()
        self.assertEqual(self.begun, 2)

    async def test_a_flood_waits_in_a_bounded_queue(self) -> None:
        self.go.clear()
        waiting = [asyncio.ensure_future(self.again()) for _ in range(MAX_WAITING)]
        await self.settle()
        await asyncio.gather(*(self.again() for _ in range(1000)))
        self.assertEqual(self.begun, 1)
        self.go.set()
        await asyncio.gather(*waiting)
        self.now += PAUSE_S
        await self.again()
        self.assertEqual(self.begun, 2, "there is room again")

    async def test_a_client_that_leaves_ends_it_for_no_other(self) -> None:
        self.go.clear()
        leaving, staying = (asyncio.ensure_future(self.again()) for _ in range(2))
        await self.settle()
        leaving.cancel()
        await self.settle()
        self.go.set()
        await staying
        self.assertEqual(self.begun, 1)

    async def test_without_a_reader_nothing_waits(self) -> None:
        self.again.read = None
        await self.again()

    async def test_the_end_of_the_scheduler(self) -> None:
        self.go.clear()
        waiting = asyncio.ensure_future(self.again())
        await self.settle()
        await self.again.close()
        await waiting


if __name__ == "__main__":
    unittest.main()
