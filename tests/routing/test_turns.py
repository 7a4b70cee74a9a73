"""Long work in turns: nobody waits for more than a step of it, and a short request overtakes a long one."""

import asyncio
import unittest

from tests.support.bodies import HARMLESS, REFUSED
from tests.support.routing import Case
from vllm_pd_scheduler.request.errors import BodyError
from vllm_pd_scheduler.request.json_text import STEP_BYTES, Steps
from vllm_pd_scheduler.routing.turns import Turns


class TurnsTest(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.turns = Turns()
        self.done: list[str] = []

    def work(self, name: str, steps: int) -> Steps[str]:
        for _ in range(steps):
            self.done.append(name)
            yield
        self.done.append(name.upper())
        return name

    async def test_what_has_one_step_is_done_at_once(self) -> None:
        long = asyncio.ensure_future(self.turns.take(self.work("long", 5)))
        await asyncio.sleep(0)
        self.assertEqual(await self.turns.take(self.work("short", 0)), "short")
        self.assertFalse(long.done())
        self.assertEqual(await long, "long")

    async def test_one_step_between_two_turns_of_the_loop(self) -> None:
        works = asyncio.gather(*(self.turns.take(self.work(name, 6)) for name in "abc"))
        await asyncio.sleep(0)
        before = len(self.done)
        while not works.done():
            await asyncio.sleep(0)
            self.assertLessEqual(len(self.done), before + 1)
            before = len(self.done)
        self.assertEqual(await works, ["a", "b", "c"])
        self.assertEqual("".join(self.done).lower(), "abc" * 7, "each in its turn")

    async def test_errors_and_cancellation(self) -> None:
        def fails(steps: int) -> Steps[None]:
            for _ in range(steps):
                yield
            raise BodyError("bad")

        for steps in (0, 2):
            with self.assertRaisesRegex(BodyError, "bad"):
                await self.turns.take(fails(steps))
        gone = asyncio.ensure_future(self.turns.take(self.work("gone", 1_000_000)))
        await asyncio.sleep(0)
        gone.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await gone
        self.assertEqual(await self.turns.take(self.work("next", 3)), "next")


class RequestsTest(Case):
    SIZE = 1 << 20

    async def test_a_short_request_overtakes_a_long_one(self) -> None:
        for path in ("/v1/completions", "/v1/embeddings"):
            for name in ("elements", "text", "hand-off's name"):
                headers = {":method": "POST", ":path": path}
                body = HARMLESS[name](self.SIZE)
                with self.subTest(name, path=path):
                    long = asyncio.ensure_future(self.router.route(headers, body))
                    await asyncio.sleep(0)
                    (await self.route()).release()
                    self.assertFalse(long.done())
                    (await long).release()
        self.assertIdle()

    async def test_other_requests_have_their_turn_between_its_steps(self) -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.ensure_future(count())
        headers = {":method": "POST", ":path": "/v1/completions"}
        (await self.router.route(headers, HARMLESS["elements"](self.SIZE))).release()
        counting.cancel()
        self.assertGreater(turns, self.SIZE // STEP_BYTES)

    async def test_what_is_refused(self) -> None:
        for name, shape in REFUSED.items():
            with self.subTest(name):
                outcome = await self.route(shape(self.SIZE))
                self.assertEqual((outcome.status, outcome.reason), (400, "bad_body"))
        self.assertIdle()


if __name__ == "__main__":
    unittest.main()
