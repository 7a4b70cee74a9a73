"""Freeing a hand-off that nobody uses: some D must refuse it, at the second try at the latest."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.support.in_flight import InFlightCase
from vllm_pd_scheduler.handoff import release
from vllm_pd_scheduler.handoff.release import HandoffReleaser
from vllm_pd_scheduler.instance_http.errors import ConnectionLost
from vllm_pd_scheduler.instance_http.exchange import Answer


class Pool:
    """Answers requests with these statuses, in turn; 0 is a lost connection."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.asked: list[str] = []

    def post(self, to: tuple[str, object], *_: object, **__: object) -> asyncio.Future[Answer]:
        self.asked.append(to[0])
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        status = self.statuses.pop(0)
        if status:
            answer.set_result(Answer(status, {}, b""))
        else:
            answer.set_exception(ConnectionLost("reset"))
        return answer


class ReleaseTest(InFlightCase):
    def setUp(self) -> None:
        super().setUp()
        patch = pytest.MonkeyPatch()
        patch.setattr(release, "SECOND_TRY_S", 0.01)
        self.addCleanup(patch.undo)

    def counted(self, outcome: str) -> float:
        labels = {"prefill": "p0", "outcome": outcome}
        found = self.router.telemetry.prometheus.get_sample_value(
            "pd_scheduler_handoffs_unused_total", labels
        )
        return found or 0.0

    async def release(self, *statuses: int) -> list[int]:
        """Free a hand-off with D that answer so; return the answers that nobody has asked for."""
        pool, router = Pool(*statuses), self.router
        releaser = HandoffReleaser(pool, router.registry, router.telemetry, router.scheduler.fitting)  # type: ignore[arg-type]
        forward = await self.forward()
        assert forward.pending is not None
        self.assertEqual(forward.pending.prefill.id, "p0")
        releaser(forward.pending)
        await asyncio.gather(*releaser._tasks)
        return pool.statuses

    async def test_the_first_that_refuses_ends_it(self) -> None:
        self.assertEqual(await self.release(503, 0, 400, 400), [400])
        self.assertEqual((self.counted("released"), self.counted("stranded")), (1.0, 0.0))

    async def test_all_fail_now_and_one_refuses_later(self) -> None:
        self.assertEqual(await self.release(503, 0, 500, 400), [])
        self.assertEqual((self.counted("released"), self.counted("stranded")), (1.0, 0.0))

    async def test_all_fail(self) -> None:
        self.assertEqual(await self.release(503, 0, 500, 503, 0, 200, 400), [400])
        self.assertEqual((self.counted("released"), self.counted("stranded")), (0.0, 1.0))

    async def test_the_end_waits_for_no_second_try(self) -> None:
        release.SECOND_TRY_S = 3600.0
        pool, router = Pool(503, 503, 503, 400), self.router
        releaser = HandoffReleaser(pool, router.registry, router.telemetry, router.scheduler.fitting)  # type: ignore[arg-type]
        forward = await self.forward()
        assert forward.pending is not None
        releaser(forward.pending)
        await asyncio.sleep(0)
        await releaser.close()
        self.assertEqual(self.counted("released"), 1.0)

    async def test_no_d_is_asked_that_does_not_fit_p(self) -> None:
        """What asks one of them to free a hand-off may be what ends another."""
        registry = self.router.registry
        for name in ("d0", "d1", "d3", "p1", "p2", "p3"):
            registry.describe(name, replace(registry.get(name).instance, revision="other"))
        pool = Pool(500, 400)
        releaser = HandoffReleaser(pool, registry, self.router.telemetry, self.router.scheduler.fitting)  # type: ignore[arg-type]
        forward = await self.forward()
        assert forward.pending is not None
        self.assertEqual((forward.pending.prefill.id, forward.decode[0].id), ("p0", "d2"))
        releaser(forward.pending)
        await asyncio.gather(*releaser._tasks)
        self.assertEqual(pool.asked, ["10.0.0.3:8000"] * 2)
        self.assertEqual(self.counted("released"), 1.0)

    async def test_what_is_gone_has_no_series(self) -> None:
        pool, router = Pool(400), self.router
        releaser = HandoffReleaser(pool, router.registry, router.telemetry, router.scheduler.fitting)  # type: ignore[arg-type]
        forward = await self.forward()
        assert forward.pending is not None
        router.unregister_instance("p0")
        releaser(forward.pending)
        await asyncio.gather(*releaser._tasks)
        self.assertEqual(pool.statuses, [], "it is freed all the same")
        self.assertEqual((self.counted("released"), self.counted("stranded")), (0.0, 0.0))
