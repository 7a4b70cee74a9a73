"""The rules of other routers, as their documentation has them."""

from typing import Any

import pytest

from tests.support.fleet import D, P, prompt, registry_of
from tests.support.given import give
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import InstanceRole, MetricsSnapshot
from vllm_pd_scheduler.replay.cache_events import CacheEvents
from vllm_pd_scheduler.replay.peers import PEERS, Peer, Site
from vllm_pd_scheduler.replay.peers.llm_d import LlmD, peak_throughput
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.sim.profile import EngineProfile
from vllm_pd_scheduler.sim.setups import setup

BLOCKS = tuple(range(1, 11))
PROFILE = EngineProfile()


@pytest.fixture
def fleet() -> Registry:
    return registry_of(3, 3)


def policy(name: str) -> Peer:
    made = PEERS[name](SchedulerConfig())
    assert isinstance(made, Peer)
    made.deployed(Site(PROFILE))
    return made


def ask(fleet: Registry, tokens: float = 1000.0, **more: Any) -> RequestContext:
    """A prompt of ten blocks, if it is not said otherwise."""
    request = prompt(tokens, blocks=BLOCKS, block_tokens=tokens / 10, **more)
    request.look_up_in(fleet.prefixes)
    return request


def first(one: Peer, fleet: Registry, role: InstanceRole, request: RequestContext) -> str:
    return one.rank(fleet.endpoints(role), request, 1)[0].id


def at(fleet: Registry, name: str) -> Endpoint:
    return next(each for each in fleet if each.id == name)


def scraped(fleet: Registry, name: str, **seen: Any) -> None:
    fleet.scraped(at(fleet, name), MetricsSnapshot(0.0, **seen), at(fleet, name).in_flight, 0)


class TestLlmD:
    def test_it_sticks_from_four_fifths_of_the_prompt_on(self, fleet: Registry) -> None:
        one = policy("llm_d")
        at(fleet, "p1").holder.store(BLOCKS[:8])
        at(fleet, "p2").holder.store(BLOCKS[:7])
        give(at(fleet, "p1"), tokens=700.0, in_flight=1)
        assert first(one, fleet, P, ask(fleet)) == "p1"
        # With less it is one of all, and the fewest uncached tokens count.
        at(fleet, "p1").holder.clear()
        at(fleet, "p1").holder.store(BLOCKS[:7])
        give(at(fleet, "p0"), tokens=600.0)
        assert first(one, fleet, P, ask(fleet)) == "p2"

    def test_a_backlog_that_is_too_long_ends_that(self, fleet: Registry) -> None:
        one = policy("llm_d")
        assert isinstance(one, LlmD)
        at(fleet, "p1").holder.store(BLOCKS)
        limit = one.throughput * one.max_penalty_s
        give(at(fleet, "p1"), tokens=limit * 0.999)
        assert first(one, fleet, P, ask(fleet)) == "p1"
        give(at(fleet, "p1"), tokens=limit * 1.001)
        assert first(one, fleet, P, ask(fleet)) != "p1"
        for name in ("p0", "p2"):
            give(at(fleet, name), tokens=1000.0)
        assert first(one, fleet, P, ask(fleet)) == "p1"

    def test_its_throughput_is_measured_as_its_guide_says(self) -> None:
        """It has 15,928 tokens a second for Qwen 32B on two H100."""
        assert peak_throughput(setup("qwen2.5-32b-2xh100")) == pytest.approx(15_928, rel=0.15)

    def test_decode_has_the_fewest_requests(self, fleet: Registry) -> None:
        for name, count in (("d0", 2), ("d1", 1), ("d2", 3)):
            give(at(fleet, name), in_flight=count)
        assert first(policy("llm_d"), fleet, D, ask(fleet)) == "d1"


class TestDynamo:
    def test_cost_is_active_and_new_less_cached(self, fleet: Registry) -> None:
        at(fleet, "p1").holder.store(BLOCKS[:6])
        give(at(fleet, "p1"), tokens=550.0)
        assert first(policy("dynamo"), fleet, P, ask(fleet)) == "p1"
        give(at(fleet, "p1"), tokens=650.0)
        assert first(policy("dynamo"), fleet, P, ask(fleet)) != "p1"

    def test_the_product_asks_how_many_there_are(self, fleet: Registry) -> None:
        at(fleet, "p1").holder.store(BLOCKS[:6])
        for name in ("p0", "p2"):
            give(at(fleet, name), in_flight=1, tokens=10.0)
        give(at(fleet, "p1"), in_flight=3)
        assert first(policy("dynamo"), fleet, P, ask(fleet)) == "p1"  # 400 tokens against 1010
        assert first(policy("dynamo_lmetric"), fleet, P, ask(fleet)) == "p1"  # 1600 against 2020
        give(at(fleet, "p1"), in_flight=5)
        assert first(policy("dynamo_lmetric"), fleet, P, ask(fleet)) != "p1"  # 2400

    @pytest.mark.parametrize(
        ("tokens", "cached", "stays"),
        [(1000.0, 4, True), (1000.0, 3, False), (10_000.0, 8, True), (10_000.0, 7, False)],
    )
    def test_what_is_short_on_decode_stays_there(
        self, fleet: Registry, tokens: float, cached: int, stays: bool
    ) -> None:
        """Less than 2048 tokens are new, and less than 0.7 of the prompt."""
        at(fleet, "d1").holder.store(BLOCKS[:cached])
        found = policy("dynamo_conditional").alone(fleet.endpoints(D), ask(fleet, tokens))
        assert (found and found.id) == ("d1" if stays else None)

    def test_events_are_what_it_knows(self, fleet: Registry) -> None:
        one, events = policy("dynamo"), CacheEvents(0.01)
        one.deployed(Site(PROFILE, events))
        at(fleet, "p1").holder.store(BLOCKS)
        events.happened("p2", [(block, True) for block in BLOCKS], 1.0)
        assert first(one, fleet, P, ask(fleet, now=1.02)) == "p2"
        assert first(policy("dynamo"), fleet, P, ask(fleet, now=1.02)) == "p1"


class TestKvAware:
    def test_the_longest_prefix_wins_however_busy(self, fleet: Registry) -> None:
        one = policy("kv_aware")
        at(fleet, "p0").holder.store(BLOCKS[:2])
        at(fleet, "p1").holder.store(BLOCKS[:1])
        give(at(fleet, "p0"), in_flight=99, tokens=1e6)
        assert first(one, fleet, P, ask(fleet)) == "p0"

    def test_without_one_the_fewest_requests(self, fleet: Registry) -> None:
        for name, count in (("p0", 2), ("p1", 1), ("p2", 3)):
            give(at(fleet, name), in_flight=count)
        assert first(policy("kv_aware"), fleet, P, ask(fleet)) == "p1"

    def test_what_it_has_sent_counts_for_two_seconds(self, fleet: Registry) -> None:
        one = policy("kv_aware")
        one.deployed(Site(PROFILE, CacheEvents(0.05)))
        chosen = first(one, fleet, P, ask(fleet, now=1.0))
        give(at(fleet, chosen), in_flight=9)
        assert first(one, fleet, P, ask(fleet, now=2.9)) == chosen
        assert first(one, fleet, P, ask(fleet, now=6.0)) != chosen

    def test_a_session_stays_on_its_decode_instance(self, fleet: Registry) -> None:
        one = policy("kv_aware")
        found = {first(one, fleet, D, ask(fleet, session="s")) for _ in range(5)}
        assert len(found) == 1
        assert len({first(one, fleet, D, ask(fleet, session=str(number))) for number in range(40)}) == 3


class TestAibrix:
    def test_a_prefix_outweighs_all_load_that_is_even_enough(self, fleet: Registry) -> None:
        one = policy("aibrix")
        at(fleet, "p1").holder.store(BLOCKS[:2])
        for name, count in (("p0", 9), ("p1", 10), ("p2", 10)):
            give(at(fleet, name), in_flight=count)
        assert first(one, fleet, P, ask(fleet)) == "p1"
        give(at(fleet, "p1"), in_flight=13)  # more than the mean and the standard deviation
        assert first(one, fleet, P, ask(fleet)) == "p0"
        give(at(fleet, "p1"), in_flight=27)
        give(at(fleet, "p0"), in_flight=26)
        assert first(one, fleet, P, ask(fleet)) == "p2"  # 17 requests apart

    def test_decode_by_requests_speed_and_room(self, fleet: Registry) -> None:
        one = policy("aibrix")
        for name, usage in (("d0", 0.5), ("d1", 0.2), ("d2", 0.5)):
            scraped(fleet, name, running=4.0, step_time=0.02, kv_usage=usage)
        assert first(one, fleet, D, ask(fleet)) == "d1"
        scraped(fleet, "d1", running=60.0, step_time=0.02)  # 3,000 tokens a second; the others 200
        scraped(fleet, "d0", running=50.0, step_time=0.3)
        scraped(fleet, "d2", running=48.0, step_time=0.3)
        assert first(one, fleet, D, ask(fleet)) == "d2"
        scraped(fleet, "d0", running=30.0, step_time=0.02)
        assert first(one, fleet, D, ask(fleet)) == "d0"  # 30 requests fewer than d1


class TestConversation:
    def test_the_first_turn_goes_where_there_is_room_and_all_others_stay(self, fleet: Registry) -> None:
        one = policy("conversation")
        give(at(fleet, "d0"), tokens=900.0)
        give(at(fleet, "d2"), tokens=800.0)
        assert one.alone(fleet.endpoints(D), ask(fleet, session="s")) is None
        assert first(one, fleet, D, ask(fleet, session="s")) == "d1"
        give(at(fleet, "d1"), tokens=1e9)
        stays = one.alone(fleet.endpoints(D), ask(fleet, session="s"))
        assert stays is not None
        assert stays.id == "d1"
        assert one.alone(fleet.endpoints(D), ask(fleet, session="other")) is None
        assert one.alone(fleet.endpoints(D), ask(fleet)) is None


class TestPpd:
    def turns(self, fleet: Registry, one: Peer, tokens: float, answering: int) -> Endpoint | None:
        """A first turn of 10,000 tokens, and a second one of ``tokens`` more beside some answers."""
        begin = ask(fleet, 10_000.0, session="s")
        assert one.alone(fleet.endpoints(D), begin) is None
        begun = at(fleet, first(one, fleet, D, begin))
        give(begun, in_flight=answering, tokens=answering * 10_000.0)
        later = ask(fleet, 10_100.0 + tokens, session="s")
        stays = one.alone(fleet.endpoints(D), later)
        assert stays in {None, begun}
        assert first(one, fleet, D, later) == begun.id  # where its KV is, also over P
        return stays

    def test_little_that_is_new_stays(self, fleet: Registry) -> None:
        assert self.turns(fleet, policy("ppd"), 500.0, 40) is not None

    def test_much_that_is_new_stays_where_it_disturbs_nobody(self, fleet: Registry) -> None:
        assert self.turns(fleet, policy("ppd"), 30_000.0, 0) is not None
        assert self.turns(registry_of(3, 3), policy("ppd"), 30_000.0, 40) is None
