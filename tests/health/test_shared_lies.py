"""What one scheduler tells the others that is not so."""

from __future__ import annotations

import msgspec

from vllm_pd_scheduler.replicas import Disbelieved
from vllm_pd_scheduler.replicas.message import Found, Message

from .instances import Server
from .schedulers import INTERVAL_S, KEY, Scheduler, Schedulers


class TestLiars:
    """What one replica tells that is not so."""

    async def lie(self, schedulers: Schedulers, told: bytes, times: int = 1) -> tuple[Scheduler, bool]:
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        number = owner.replica._number
        for _ in range(times):
            number += 1
            message = Message(owner.name, number, False, (0, 0), ["d0"], probing=[0], found=[Found(0, told)])
            used = other.replica.receive(KEY.encode(message), schedulers.now)
        return other, used

    async def prepared(self, schedulers: Schedulers) -> Server:
        schedulers.join("a", "b")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        return server

    async def test_that_it_is_dead(self, schedulers: Schedulers) -> None:
        await self.prepared(schedulers)
        other, _ = await self.lie(schedulers, b"", times=50)
        assert other["d0"].routable
        assert other.looks("d0")

    async def test_that_it_runs_a_nonsense_number_of_requests(self, schedulers: Schedulers) -> None:
        await self.prepared(schedulers)
        before = schedulers.other("d0")["d0"].metrics
        told = msgspec.msgpack.encode(
            ["", b"", [[float("nan"), 0, 0, [], 1.7e9, None, 0, 0, 0, None, [], 0]]]
        )
        other, used = await self.lie(schedulers, told)
        assert used
        assert other["d0"].metrics is before
        assert other.replica.disbelieved[Disbelieved.FINDINGS] == 1

    async def test_of_other_ranks_than_it_has(self, schedulers: Schedulers) -> None:
        await self.prepared(schedulers)
        page = [0, 0, 0, [], 1.7e9, None, 0, 0, 0, None, [], 0]
        other, _ = await self.lie(schedulers, msgspec.msgpack.encode(["", b"", [page, page]]))
        assert other.replica.disbelieved[Disbelieved.FINDINGS] == 1

    async def test_too_often(self, schedulers: Schedulers) -> None:
        await self.prepared(schedulers)
        page = [9, 9, 0, [], 1.7e9, None, 0, 0, 0, None, [], 0]
        other, seen = schedulers.other("d0"), []
        other.registry.on_scraped = lambda: seen.append(1)
        await self.lie(schedulers, msgspec.msgpack.encode(["", b"", [page]]), times=100)
        assert len(seen) <= 5

    async def test_that_one_is_well_which_is_not(self, schedulers: Schedulers) -> None:
        server = await self.prepared(schedulers)
        server.status = 503
        other = schedulers.other("d0")
        await other.monitor.check(other["d0"])
        page = [0, 0, 0, [], 1.7e9, None, 0, 0, 0, None, [], 0]
        for _ in range(4):
            schedulers.now += INTERVAL_S
            await self.lie(schedulers, msgspec.msgpack.encode(["", b"", [page]]))
            assert other.looks("d0")
            await other.look()
        assert other["d0"].probes.healthy is False

    async def test_that_it_was_restarted(self, schedulers: Schedulers) -> None:
        await self.prepared(schedulers)
        other = schedulers.other("d0")
        other.registry.work.reserve(other["d0"])
        page = [0, 0, 0, [], 1.8e9, None, 0, 0, 0, None, [], 0]
        await self.lie(schedulers, msgspec.msgpack.encode(["", b"", [page]]))
        assert other["d0"].generation == 0
        assert other["d0"].in_flight == 1
        assert other.looks("d0")
