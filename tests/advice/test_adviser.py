"""An advice, by a process of its own, of what a router has seen; and why there is none."""

import asyncio
import os
from typing import Any

import pytest

from tests.support.given import give
from tests.support.traffic import BASE, OVERHEAD, PER_KV_TOKEN, PER_SEQ, PER_TOKEN, Traffic, served
from tests.support.waiting import until
from vllm_pd_scheduler.advice import Advice, Adviser, adviser, observation
from vllm_pd_scheduler.advice.observation import LEAST_REQUESTS, observe
from vllm_pd_scheduler.advice.question import Answer, Size
from vllm_pd_scheduler.advice.seen import seen_by
from vllm_pd_scheduler.advice.verdict import Kind
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.router import PDRouter

LONG_PROMPTS = Traffic(4.0, 4500.0, 20.0)
SOME = 300


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a process of low priority takes its time, so it has as little to do as can be."""
    monkeypatch.setattr(adviser, "WALL_S", 10 * adviser.WALL_S)
    monkeypatch.setattr(observation, "MOST_MOVES", 1)


async def advised(router: PDRouter, *asks: Any) -> Advice:
    return await Adviser(router, router.clock).advise(900.0, *asks)


async def test_it_advises_more_prefill_for_long_prompts() -> None:
    found = await advised(served(LONG_PROMPTS.requests(SOME), prefill=2, decode=4))
    assert found.kind is Kind.MOVE, found
    assert found.text.startswith("move one D to P: -")
    assert found.outcomes[0].size == Size(2, 4)


async def test_another_fleet_is_compared_at_once() -> None:
    found = await advised(served(LONG_PROMPTS.requests(SOME), prefill=2, decode=1), Size(4, 1))
    assert found.outcomes[1].size == Size(4, 1)
    assert any(each.startswith("4 P + 1 D: -") for each in found.why)


async def test_it_knows_what_was_learned() -> None:
    learned = observe(served(LONG_PROMPTS.requests(SOME)), 0.0, None, 1.0).question.learned
    assert learned.overhead == pytest.approx(OVERHEAD, abs=0.003)
    assert learned.per_token == pytest.approx(PER_TOKEN, rel=0.05)
    assert learned.base == pytest.approx(BASE, rel=0.1)
    assert learned.per_seq == pytest.approx(PER_SEQ, rel=0.2)
    assert learned.per_kv_token == pytest.approx(PER_KV_TOKEN, rel=0.2)
    assert (learned.prefill_capacity, learned.decode_capacity) == (1e7, 1e6)


async def test_of_several_schedulers_each_replays_the_load_of_all() -> None:
    requests = LONG_PROMPTS.requests(SOME)
    router = served(requests)
    assert observe(router, 0.0, None, 1.0).question.rate == 1.0
    router.recording.ended, router.registry.learning.finished = SOME, 3.0 * SOME
    assert observe(router, 0.0, None, 1.0).question.rate == pytest.approx(3.0)
    router.registry.learning.finished = 1.1 * SOME
    assert observe(router, 0.0, None, 1.0).question.rate == 1.0


async def test_what_other_workers_have_seen_counts_as_seen() -> None:
    requests = LONG_PROMPTS.requests(SOME)
    whole, one, other = served(requests), served(requests[::2]), served(requests[1::2])
    for router in (one, other):
        router.recording.ended, router.registry.learning.finished = SOME // 2, float(SOME)
    seen = observe(one, 0.0, None, 1.0, [seen_by(other, 0.0)])
    expected = observe(whole, 0.0, None, 1.0)
    assert [each.arrived for each in seen.requests] == [each.arrived for each in expected.requests]
    assert len(seen.replayed) == len(expected.replayed)
    assert seen.question.rate == 1.0
    assert observe(one, 0.0, None, 1.0).question.rate == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("count", "per_second"), [(0, 1.0), (LEAST_REQUESTS - 1, 1.0), (LEAST_REQUESTS + 1, 100.0)]
)
async def test_too_little_traffic(count: int, per_second: float) -> None:
    found = await advised(served(Traffic(per_second, 100.0, 10.0).requests(count)))
    assert found.kind is Kind.UNKNOWN
    assert found.text.startswith(f"not enough traffic seen: {count} requests in ")


async def test_only_the_newest_count() -> None:
    requests = LONG_PROMPTS.requests(SOME)
    router = served(requests)
    found = await Adviser(router, lambda: requests[-1].arrived + 1000.0).advise(60.0)
    assert found.text.startswith("not enough traffic seen: 0 requests")


async def test_the_fleet_is_loaded_when_the_first_request_counts() -> None:
    """Long answers that began before the time that is asked for fill D still."""
    requests = Traffic(2.0, 200.0, 500.0).requests(SOME)
    router = served(requests)
    middle = requests[SOME // 2].arrived
    seen = observe(router, middle, None, 1.0)
    assert (len(seen.requests), seen.question.count_since) == (SOME // 2, middle)
    answer = seen.output_tokens * router.registry.get("decode-0").decode_step
    first = seen.replayed[0]
    assert first is requests[0] or 0.0 <= first.arrived - (middle - 2.0 * answer) < 5.0
    assert seen.replayed[-1] is requests[-1]


async def test_what_is_not_learned_is_not_guessed() -> None:
    router = served(LONG_PROMPTS.requests(SOME))
    router.registry.load.decode._samples = 3
    found = await advised(router)
    assert found.kind is Kind.UNKNOWN
    assert found.text.startswith("what a decode instance takes is not learned yet (3 of 10")


async def test_a_role_without_instances() -> None:
    router = served(LONG_PROMPTS.requests(SOME), prefill=1)
    router.drain_instance("prefill-0")
    assert (await advised(router)).text == "no prefill instance can serve"


async def test_several_models_are_not_told_apart() -> None:
    router = served(LONG_PROMPTS.requests(SOME))
    for each in router.registry:
        give(each.models, names=frozenset({"other" if each.id == "decode-0" else "one"}))
    assert "same models" in (await advised(router)).text


async def test_an_instance_whose_models_are_not_known_yet_serves_no_others() -> None:
    router = served(LONG_PROMPTS.requests(SOME))
    for each in router.registry:
        give(each.models, names=None if each.id == "decode-0" else frozenset({"one"}))
    assert "same models" not in (await advised(router)).text


async def test_an_instance_with_ranks_moves_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    router = served(LONG_PROMPTS.requests(SOME), prefill=1, decode=3)
    router.register_instance(PDInstance("ranks", InstanceRole.PREFILL, "10.0.9.1", 1, data_parallel_size=4))
    router.registry.probed(router.registry.get("ranks"), None)
    monkeypatch.setattr(observation, "MOST_MOVES", 4)
    sizes = observe(router, 0.0, None, 1.0).question.sizes
    assert sizes == [Size(5, 3), Size(1, 7), Size(6, 2), Size(7, 1)]


async def test_one_at_a_time_and_the_same_answer_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, runs = 0, 0, 0

    async def rehearsed(_: Any) -> Answer:
        nonlocal running, most, runs
        running, runs = running + 1, runs + 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return Answer([])

    monkeypatch.setattr(adviser, "_rehearsed", rehearsed)
    router, now = served(LONG_PROMPTS.requests(SOME)), 200.0
    asks = Adviser(router, lambda: now)
    monkeypatch.setattr(adviser, "judge", lambda *_: Advice(Kind.KEEP, f"run {runs}"))
    first, second, other = await asyncio.gather(
        asks.advise(900.0), asks.advise(900.0), asks.advise(900.0, Size(1, 2))
    )
    assert (first.text, second.text, other.text, most) == ("run 1", "run 1", "run 2", 1)
    assert (await asks.advise(900.0, Size(1, 2))).text == "run 2"
    now += adviser.FRESH_S
    assert (await asks.advise(900.0, Size(1, 2))).text == "run 3"


async def test_a_process_that_fails_or_hangs_is_no_failure_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    router = served(LONG_PROMPTS.requests(SOME), strategy="least_load")
    router.scheduler.strategies.names[InstanceRole.DECODE] = "no_such_strategy"
    found = await advised(router)
    assert found.kind is Kind.UNKNOWN
    assert "no_such_strategy" in found.text
    assert "Traceback" not in found.text
    router.scheduler.strategies.names[InstanceRole.DECODE] = "least_load"
    monkeypatch.setattr(adviser, "WALL_S", 0.01)
    found = await advised(router)
    assert (found.kind, found.text.partition(":")[0]) == (Kind.UNKNOWN, "the replay takes too long")
    monkeypatch.setattr(adviser.sys, "executable", "/no/such/python")
    found = await advised(router)
    assert "no process can be started" in found.text


async def test_who_leaves_takes_the_process_along() -> None:
    router = served(LONG_PROMPTS.requests(SOME))
    before = _children()
    task = asyncio.create_task(advised(router))
    started: set[str] = set()
    await until(lambda: started.update(_children() - before) or started)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (_children() & started)


def _children() -> set[str]:
    """Processes of this one."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid():
                found.add(name)
    return found
