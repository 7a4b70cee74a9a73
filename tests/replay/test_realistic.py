"""What ``--realistic`` adds: answers in caches, shared links, turns that wait, and routers that hear late."""

from dataclasses import replace
from itertools import pairwise

import pytest

from vllm_pd_scheduler.replay import OVERSUBSCRIPTION
from vllm_pd_scheduler.replay.arrivals import Arrivals
from vllm_pd_scheduler.replay.cache_events import CacheEvents
from vllm_pd_scheduler.replay.conversations import linked
from vllm_pd_scheduler.replay.fleet import FleetSpec, run_variant
from vllm_pd_scheduler.replay.peers import PEERS, Peer
from vllm_pd_scheduler.replay.result import RunResult
from vllm_pd_scheduler.replay.shapes import make
from vllm_pd_scheduler.replay.topology import Topology
from vllm_pd_scheduler.replay.trace import Trace, TraceRequest
from vllm_pd_scheduler.replay.variant import parse_variant, variant_names
from vllm_pd_scheduler.sim.engine import Engine
from vllm_pd_scheduler.sim.virtual import VirtualClock, VirtualInstance

FLEET = FleetSpec(2, 2, realistic=True)
CHAT = linked(make("chat", 60, 2)).scaled(4.0)


def run(name: str, trace: Trace = CHAT, fleet: FleetSpec = FLEET) -> RunResult:
    return run_variant(parse_variant(name), trace, fleet, lambda finished: None)


@pytest.mark.parametrize("name", variant_names())
def test_every_request_is_answered_and_a_run_can_be_repeated(name: str) -> None:
    first, second = run(name), run(name)
    assert first.results == second.results
    assert len(first.results) == len(CHAT.requests)
    assert all(each.reason is None and each.ttft and each.ttft > 0 for each in first.results)


@pytest.mark.parametrize("name", ["least_load", "ppd"])
def test_a_turn_comes_when_the_answer_before_it_has_ended_and_the_user_has_thought(name: str) -> None:
    slow = replace(FLEET, prefill=1, decode=1)
    results = run(name, CHAT.scaled(20.0), slow).results
    places = {each.name: place for place, each in enumerate(CHAT.requests)}
    late = 0
    for request, result in zip(CHAT.scaled(20.0).requests, results, strict=True):
        assert result.arrival >= request.arrival
        for needed in request.after:
            ended = results[places[needed]].finished
            assert ended is not None
            assert result.arrival >= ended + request.pause - 1e-9
            late += result.arrival > request.arrival
    assert late


def test_a_turn_that_stays_on_its_decode_instance_finds_its_answer_there() -> None:
    blocks = tuple(range(1, 40))
    turns = [
        TraceRequest(0.0, 1024, 512, blocks[:2], "s", "a"),
        TraceRequest(30.0, 2100, 10, blocks[:4], "s", "b", ("a",), 1.0),
    ]
    trace = linked(Trace(turns, 512))
    stays = run("conversation", trace).results[1]
    assert (stays.prefill, stays.cached_tokens) == (None, 1024)  # the answer's last token was not computed
    turns[1] = replace(turns[1], prompt_tokens=2600, blocks=blocks[:5])
    turns[0] = replace(turns[0], output_tokens=700)
    trace = linked(Trace(turns, 512))
    assert run("conversation", trace).results[1].cached_tokens == 1536
    assert run("least_load", trace).results[1].cached_tokens in {0, 1024}  # P has only read the prompt
    assert run("conversation", trace, replace(FLEET, realistic=False)).results[1].cached_tokens == 1024


def test_hand_offs_that_share_a_port_are_slower_and_over_a_spine_slower_still() -> None:
    """Four prompts at once, from four P to one D."""
    burst = Trace([TraceRequest(0.0, 40_000, 2, (number,)) for number in range(4)])
    fleet = FleetSpec(4, 1, "deepseek-v3-fp8-8xh200")
    times = [
        max(each.ttft or 0.0 for each in run("round_robin", burst, spec).results)
        for spec in (
            fleet,
            replace(fleet, realistic=True),
            replace(fleet, realistic=True, leaves=4),
        )
    ]
    assert all(one < other for one, other in pairwise(times))


def test_pairs_differ_by_the_switches_between_them() -> None:
    clock, ended = VirtualClock(), list[float]()
    topology = Topology(clock, 2)
    p, near, far = (VirtualInstance(Engine(), clock) for _ in range(3))
    for instance, number in ((p, 0), (near, 2), (far, 1)):
        topology.add(instance, number, 100.0)
    for target in (near, far):
        topology.carry(p, target, 100.0, lambda: ended.append(clock.now))
        start = clock.now
        clock.run()
        ended[-1] -= start
    # Two instances have their ports on the first leaf, one on the second.
    assert ended == pytest.approx([1.0, OVERSUBSCRIPTION])


class TestArrivals:
    def sent(self, requests: list[TraceRequest], lasts: float, *, waits: bool) -> list[tuple[int, float]]:
        clock, seen = VirtualClock(), list[tuple[int, float]]()

        def send(place: int) -> None:
            seen.append((place, clock.now))
            clock.call_at(clock.now + lasts, lambda: arrivals.ended(place))

        arrivals = Arrivals(clock, Trace(requests), send, waits=waits)
        arrivals.start()
        clock.run()
        return seen

    def test_who_waits_for_several(self) -> None:
        requests = [
            TraceRequest(0.0, 1, 1, name="a"),
            TraceRequest(1.0, 1, 1, name="b", after=("a",), pause=2.0),
            TraceRequest(2.0, 1, 1, name="c", after=("a", "b"), pause=0.5),
            TraceRequest(40.0, 1, 1, name="d", after=("a", "c")),
        ]
        assert self.sent(requests, 5.0, waits=True) == [(0, 0.0), (1, 7.0), (2, 12.5), (3, 40.0)]
        assert self.sent(requests, 5.0, waits=False) == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 40.0)]

    def test_circles_and_names_that_nobody_has_hold_nothing_up(self) -> None:
        requests = [
            TraceRequest(0.0, 1, 1, name="a", after=("b", "a", "gone")),
            TraceRequest(1.0, 1, 1, name="b", after=("a", "a")),
        ]
        assert self.sent(requests, 0.5, waits=True) == [(0, 0.0), (1, 1.0)]


class TestCacheEvents:
    def test_they_come_late(self) -> None:
        events = CacheEvents(0.5)
        events.happened("p", [(1, True), (2, True)], 1.0)
        events.happened("p", [(3, True), (2, False)], 2.0)
        known = [events.cached_blocks("p", (1, 2, 3), now) for now in (1.4, 1.5, 2.4, 2.5)]
        assert known == [0, 2, 2, 1]
        assert events.cached_blocks("q", (1,), 9.0) == 0

    def test_what_was_sent_may_be_taken_for_cached_for_a_while(self) -> None:
        events = CacheEvents(0.5)
        events.expect("p", (1, 2), 3.0)
        assert [events.cached_blocks("p", (1, 2, 3), now) for now in (1.0, 3.0, 3.1)] == [2, 2, 0]


@pytest.mark.parametrize("name", ["dynamo", "kv_aware"])
def test_routers_that_hear_later_find_less(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> int:
        return sum(each.cached_tokens for each in run(name, CHAT.scaled(8.0)).results)

    policy = PEERS[name]
    assert issubclass(policy, Peer)
    soon = found()
    monkeypatch.setattr(policy, "event_delay_s", 600.0)
    monkeypatch.setattr(policy, "speculative_s", 0.0, raising=False)
    assert found() < soon


def test_how_often_each_looks() -> None:
    policies = {name: policy for name, policy in PEERS.items() if issubclass(policy, Peer)}
    for name, policy in policies.items():
        if policy.scrape_interval_s is not None:
            assert parse_variant(name).config().health_check_interval == policy.scrape_interval_s
            given = parse_variant(f"{name}+health_check_interval=7").config()
            assert given.health_check_interval == 7
    assert {name for name, policy in policies.items() if policy.scrape_interval_s == 0.05} == {
        "llm_d_weighted",
        "aibrix",
    }


def test_by_tpot_a_turn_is_read_where_the_answer_before_it_was_written() -> None:
    blocks = tuple(range(1, 40))
    turns = [
        TraceRequest(0.0, 1024, 520, blocks[:2], "s", "a"),
        TraceRequest(30.0, 1600, 10, blocks[:3], "s", "b", ("a",), 1.0),
    ]
    first, second = run("predicted_latency+disaggregation=tpot", linked(Trace(turns, 512))).results
    assert (second.prefill, second.decode, second.cached_tokens) == (None, first.decode, 3 * 512)


def test_d_is_chosen_by_the_link_from_that_p() -> None:
    """Two racks with two D each, and between them a tenth of what a port carries."""
    fleet = FleetSpec(3, 4, realistic=True, leaves=2, oversubscription=40.0)
    found, chat = {}, linked(make("chat", 500, 2)).scaled(4.0)
    for name in ("least_load", "predicted_latency"):
        results = run(name, chat, fleet).results
        pairs = [(each.prefill, each.decode) for each in results[len(results) // 2 :]]
        within = [int(str(p)[-1]) % 2 == int(str(d)[-1]) % 2 for p, d in pairs if p is not None]
        found[name] = sum(within) / len(within)
    assert found["least_load"] < 0.7
    assert found["predicted_latency"] > 0.85
