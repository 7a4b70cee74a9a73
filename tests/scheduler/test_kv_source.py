"""From whom P pulls what it has not cached: only where that clearly takes less time than to compute it."""

from typing import Any

import pytest

from tests.support.fleet import prompt, scheduler_of
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.reservation import Reservation
from vllm_pd_scheduler.models import ConnectorChoice, InstanceRole, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.scheduler import Scheduler
from vllm_pd_scheduler.scheduler.kv_source import (
    CLEARLY,
    MAX_PAUSE_S,
    PAUSE_S,
    KvSources,
    computed_blocks,
    kv_source,
)

P, D = InstanceRole.PREFILL, InstanceRole.DECODE
BLOCK = 256.0


class Pulls:
    """A fleet with a prompt of 64 blocks, of which instances have leading ones cached."""

    def __init__(self, blocks: int = 64, **cached: int) -> None:
        self.scheduler: Scheduler = scheduler_of(3, 2)
        self.registry = self.scheduler.registry
        chain = [number * 2654435761 % (1 << 60) for number in range(1, blocks + 1)]
        for name, depth in cached.items():
            self.registry.get(name).holder.store(chain[:depth])
        self.request: RequestContext = prompt(blocks * BLOCK, blocks=chain, block_tokens=BLOCK)
        self.request.look_up_in(self.registry.prefixes)
        self.sources = KvSources(self.scheduler, lambda instance: True)

    def found(self, prefill: str = "p0") -> Any:
        others = [each for each in self.registry if each.id != prefill]
        return kv_source(self[prefill], self.request, others, self.registry.load)

    def __getitem__(self, name: str) -> Endpoint:
        return self.registry.get(name)

    def reserve(self, name: str = "p0", at: float = 0.0) -> Reservation:
        self.request.at(at)
        self.request.look_up_in(self.registry.prefixes)
        reservation = self.registry.work.reserve(self[name], self.request)
        self.sources.take(reservation, self.request)
        return reservation


def test_the_one_with_most_of_it() -> None:
    pulls = Pulls(p1=20, d0=60, d1=40)
    found = pulls.found()
    assert (found.endpoint, found.tokens) == (pulls["d0"], 60 * BLOCK)
    load = pulls["p0"].prefill
    cost = load.cost(64 * BLOCK, 64 * BLOCK) - load.cost(4 * BLOCK, 64 * BLOCK)
    assert found.saves == pytest.approx(cost)
    assert found.takes == pulls.registry.load.pull_time(60 * BLOCK)
    assert found.saves > CLEARLY * found.takes


@pytest.mark.parametrize(
    "cached",
    [{}, {"p0": 64}, {"p0": 30, "d0": 30}, {"p0": 60, "d0": 61}, {"d0": 1}],
    ids=["nobody", "P has it", "no more than P", "a block more", "a block"],
)
def test_no_source(cached: dict[str, int]) -> None:
    assert Pulls(**cached).found() is None


def test_what_p_has_of_it_itself_is_not_pulled() -> None:
    found = Pulls(p0=10, d0=60).found()
    assert found.tokens == 50 * BLOCK


def test_a_source_that_keeps_little_of_what_it_should_counts_for_little() -> None:
    pulls = Pulls(p1=60, d0=50)
    for _ in range(20):
        pulls["p1"].prefill.learn_cached(1000, 100)
    assert pulls.found().endpoint is pulls["d0"]


def test_slow_pulls_are_learned_and_end() -> None:
    pulls = Pulls(d0=60)
    for _ in range(20):
        pulls.registry.load.learn_pull(60 * BLOCK, 2.0)
    assert pulls.registry.load.pull_time(60 * BLOCK) == pytest.approx(2.0, rel=0.1)
    assert pulls.found() is None


def test_the_reservation_counts_what_is_pulled_as_cached() -> None:
    pulls = Pulls(p2=60)
    reservation = pulls.reserve("p0")
    p0, load = pulls["p0"], pulls.registry.load
    assert (reservation.source, reservation.pulled, reservation.cached) == (pulls["p2"], 60 * BLOCK, 0.0)
    cost = p0.prefill.cost(4 * BLOCK, 64 * BLOCK) + load.pull_time(60 * BLOCK)
    assert reservation.cost == pytest.approx(cost)
    assert reservation.alone == pytest.approx(p0.prefill.cost(64 * BLOCK, 64 * BLOCK))
    assert p0.tokens == reservation.tokens == 4 * BLOCK
    assert p0.prefill.remaining(0.0) == pytest.approx(cost)
    reservation.release(0.0)
    assert (p0.tokens, p0.prefill.remaining(0.0), p0.in_flight) == (0.0, 0.0, 0)


def test_it_is_learned_what_a_pull_takes_and_not_that_p_computes_so_fast() -> None:
    pulls = Pulls(p2=60)
    before, pull = pulls["p0"].prefill.cost(1000, 1000), pulls.registry.load.pull_time(60 * BLOCK)
    for _ in range(10):
        pulls["p0"].holder.clear()
        reservation = pulls.reserve("p0")
        took = pulls["p0"].prefill.cost(4 * BLOCK, 64 * BLOCK) + 1.5 * pull
        pulls.registry.work.prefilled(reservation, int(64 * BLOCK), None, took)
    assert pulls["p0"].prefill.cost(1000, 1000) == before
    assert pulls.registry.load.pull_time(60 * BLOCK) == pytest.approx(1.5 * pull, rel=0.1)


def test_what_another_p_is_still_to_compute_is_not_there() -> None:
    """Requests with the same prompt that come at once do not wait for each other."""
    pulls = Pulls(p1=30)
    first = pulls.reserve("p1")
    assert (first.cached_blocks, computed_blocks(pulls["p1"], pulls.request)) == (30, 30)
    second = pulls.reserve("p0")
    assert (second.source, second.pulled) == (pulls["p1"], 30 * BLOCK)
    pulls.registry.work.prefilled(first, int(64 * BLOCK), None, 1.0)
    third = pulls.reserve("p2", at=1.0)
    assert (third.source, third.pulled) == (pulls["p1"], 64 * BLOCK - 1)


def test_a_queue_of_other_prompts_hides_nothing() -> None:
    pulls = Pulls(p1=64)
    pulls.registry.work.reserve(pulls["p1"], prompt(512.0, blocks=[7, 8], block_tokens=BLOCK))
    assert computed_blocks(pulls["p1"], pulls.request) == 64


def test_those_that_cannot_be_pulled_from() -> None:
    pulls = Pulls(p1=60, d0=64)
    pulls.sources = KvSources(pulls.scheduler, lambda instance: False)
    assert pulls.reserve().source is None


@pytest.mark.parametrize("why", ["down", "draining", "other kind"])
def test_those_that_are_not_there(why: str) -> None:
    pulls = Pulls(p1=60, d0=64)
    d0 = pulls["d0"]
    if why == "down":
        pulls.registry.probed(d0, "down")
        pulls.registry.probed(d0, "down")
    elif why == "draining":
        pulls.registry.drain("d0")
    else:
        pulls.registry.remove("d0")
        store = PDInstance("d9", D, "10.9.0.1", 80, connector=ConnectorChoice("shared-store"))
        other = pulls.registry.add(store)
        pulls.registry.probed(other, None)
        other.holder.store(pulls.request.blocks)
    assert pulls.reserve().source is pulls["p1"]


def test_a_prompt_that_was_not_hashed() -> None:
    pulls = Pulls(d0=64)
    pulls.request = prompt(64 * BLOCK)
    assert pulls.reserve().source is None


@pytest.mark.parametrize(
    ("cached", "late", "paid"),
    [
        (None, 0.0, True),
        (60 * 256, 0.0, True),
        (31 * 256, 0.0, True),
        (0, 0.0, False),
        (None, 30.0, False),
        (60 * 256, 30.0, False),
    ],
)
def test_whether_it_has_paid(cached: int | None, late: float, paid: bool) -> None:
    pulls = Pulls(p2=60)
    reservation = pulls.reserve()
    assert pulls.sources.ended(reservation, cached, reservation.cost + late) is paid


def test_a_source_that_was_asked_in_vain_is_left_alone_for_longer_each_time() -> None:
    pulls, now, pause = Pulls(p2=60), 0.0, PAUSE_S
    for _ in range(8):
        pulls["p0"].holder.clear()
        reservation = pulls.reserve(at=now)
        assert reservation.source is pulls["p2"]
        pulls.sources.ended(reservation, 0, now)
        reservation.release(now)
        pulls["p0"].holder.clear()
        assert pulls.reserve(at=now + pause - 0.1).source is None
        now += pause
        pause = min(MAX_PAUSE_S, 2 * pause)
    pulls["p0"].holder.clear()
    pulls.sources.ended(pulls.reserve(at=now), None, now)
    pulls["p0"].holder.clear()
    again = pulls.reserve(at=now)
    pulls.sources.ended(again, 0, now)
    pulls["p0"].holder.clear()
    assert pulls.reserve(at=now + PAUSE_S).source is pulls["p2"]
