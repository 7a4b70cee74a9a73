"""One who joins comes to know all; one who has missed a message asks for what it told."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.replicas.one import KEY, One, make_registry, sound
from vllm_pd_scheduler.fleet.breaker import BreakerState
from vllm_pd_scheduler.prediction.prefix_index import PrefixIndex
from vllm_pd_scheduler.replicas.message import MAX_BYTES, Held, Message, pack_blocks
from vllm_pd_scheduler.replicas.replica import SILENT_S


@dataclass
class Net:
    """Carries messages between replicas, 10 ms late."""

    ones: list[One]
    now: float = 0.0
    mail: list[tuple[float, One, bytes]] = field(default_factory=list)
    sent: int = 0
    longest: int = 0
    lost: set[int] = field(default_factory=set)
    """Which of all messages are lost."""

    def run(self, seconds: float) -> None:
        """Let time go by."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.005
            for one in self.ones:
                if one.replica.next_publish(self.now) <= self.now:
                    for data in one.publish(self.now):
                        self.sent, self.longest = self.sent + 1, max(self.longest, len(data))
                        if self.sent not in self.lost:
                            others = [other for other in self.ones if other is not one]
                            self.mail += [(self.now + 0.01, other, data) for other in others]
            while self.mail and self.mail[0][0] <= self.now:
                _, other, data = self.mail.pop(0)
                other.hear([data], self.now)


def _hits(one: One, prompts: list[tuple[int, ...]]) -> list[dict[str, int]]:
    """Return how many blocks of each prompt each endpoint is taken to have."""
    found = []
    for blocks in prompts:
        match = one.registry.prefixes.match(blocks)
        found.append({e.id: match[e.holder] for e in one.endpoints if e.holder in match})
    return found


def _prompts(count: int, seed: int = 0, most: int = 40) -> list[tuple[int, ...]]:
    """Return prompts as chains of blocks, of which many begin alike."""
    random, prompts = Random(seed), list[tuple[int, ...]]()
    for _ in range(count):
        before = random.choice(prompts)[: random.randrange(1, most)] if prompts else ()
        prompts.append(before + tuple(random.getrandbits(60) for _ in range(random.randrange(1, most))))
    return prompts


def _learn(one: One, prompts: list[tuple[int, ...]], now: float) -> None:
    for number, blocks in enumerate(prompts):
        claim = one.send(f"prefill-{number % 2}", now, blocks=blocks)
        one.registry.work.prefilled(claim, 1000, 0, now + 0.1)
        one.send(f"decode-{number % 2}", now, blocks=blocks).release(now + 0.2)
        one.claims.clear()


def test_one_who_joins_has_the_same_hits_within_a_second_from_one_of_the_others() -> None:
    a, b, c = One("a"), One("b"), One("c")
    net = Net([a, b])
    prompts = _prompts(1500)
    for number in range(15):
        _learn((a, b)[number % 2], prompts[number * 100 : number * 100 + 100], net.now)
        net.run(0.1)
    net.run(1.5)
    assert _hits(a, prompts) == _hits(b, prompts)
    assert len(a.registry.prefixes) > 30_000
    net.ones.append(c)
    begun, net.longest = net.sent, 0
    net.run(0.5)
    assert _hits(c, prompts) == _hits(a, prompts)
    assert c.replica.missing == 0
    assert net.longest < 25_000 < MAX_BYTES
    told = 8 * sum(len(e.holder) for e in c.endpoints)
    assert net.sent - begun < 40
    assert told > 240_000
    # What comes later evicts the same on both.
    for one in (a, c):
        for endpoint in one.endpoints:
            endpoint.holder.resize(1000)
    assert _hits(c, prompts) == _hits(a, prompts)


@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_several_join_at_once_and_messages_are_lost(loss: float) -> None:
    a, b, c = One("a"), One("b"), One("c")
    net, random = Net([a]), Random(5)
    prompts = _prompts(1200)
    for number in range(12):
        _learn(a, prompts[number * 100 : number * 100 + 100], net.now)
        net.run(0.1)
    net.run(1.0)
    net.ones.append(b)
    net.lost = {number for number in range(net.sent, net.sent + 2000) if random.random() < loss}
    net.run(0.13)
    net.ones.append(c)
    net.run(6.0 if loss else 1.2)
    assert _hits(b, prompts) == _hits(a, prompts)
    assert _hits(c, prompts) == _hits(a, prompts)


def test_it_asks_another_when_the_first_is_gone() -> None:
    a, b, c = One("a"), One("b"), One("c")
    net = Net([a, b])
    prompts = _prompts(50)
    _learn(a, prompts, 0.0)
    net.run(1.5)
    net.ones.append(c)
    net.run(0.05)
    c.replica.publish(net.now + 0.2)
    asked = c.replica._others.joining._source
    gone = a if asked == "a" else b
    net.ones.remove(gone)
    net.run(5.0)
    assert _hits(c, prompts) == _hits(b if gone is a else a, prompts)
    assert c.replica.missing == 0


def test_those_who_were_apart_tell_each_other_what_was_cached_meanwhile() -> None:
    a, b = One("a"), One("b")
    net = Net([a, b])
    net.run(1.5)
    net.ones.remove(b)
    mine, theirs = _prompts(50, 1), _prompts(50, 2)
    _learn(a, mine, net.now)
    _learn(b, theirs, net.now)
    net.run(SILENT_S + 1.0)
    b.publish(net.now)  # into the void
    net.ones.append(b)
    net.run(2.0)
    assert _hits(a, mine + theirs) == _hits(b, mine + theirs)
    assert all(_hits(a, mine + theirs))


def test_it_is_told_what_stands_and_what_was_learned() -> None:
    a, b = One("a"), One("b")
    for _ in range(3):
        a.registry.ends.failed(a.registry.get("decode-0"), "it fails", 0.0)
    prefill, decode = a.registry.get("prefill-0"), a.registry.get("decode-1")
    a.registry.wrong_pairs.leave_out(prefill, decode, "wrong")
    for number in range(20):
        a.registry.load.transfers.learn("prefill-1", "decode-1", 1000.0 + number, 0.5)
    _learn(a, _prompts(3), 0.0)
    net = Net([a])
    net.run(0.1)
    net.ones.append(b)
    net.run(0.5)
    assert b.registry.get("decode-0").breaker.state is BreakerState.OPEN
    assert [(p.id, d.id) for p, d, _ in b.registry.wrong_pairs] == [("prefill-0", "decode-1")]
    load = a.registry.load
    assert b.registry.load.handoff("prefill-1", "decode-1", 1000.0) == pytest.approx(
        load.handoff("prefill-1", "decode-1", 1000.0), rel=0.01
    )


def test_pairs_are_told_where_no_prompts_are_known_and_unknown_instances_hold_nothing_up() -> None:
    a, b, c = One("a"), One("b"), One("c", registry=make_registry(12))
    for number in range(20):
        a.registry.load.transfers.learn("prefill-1", "decode-1", 1000.0 + number, 0.5)
    net = Net([a])
    net.run(0.1)
    net.ones.append(b)
    net.run(0.5)
    assert b.registry.load.transfers.has_learned
    prompts = _prompts(20)
    _learn(a, prompts, net.now)
    net.run(0.5)
    net.ones.append(c)
    net.run(1.0)
    assert _hits(c, prompts) == _hits(a, prompts)
    assert c.replica.missing == 0


@pytest.mark.parametrize("lost", range(2, 14))
def test_a_lost_message_loses_no_placement(lost: int) -> None:
    a, b = One("a"), One("b")
    net = Net([a, b])
    net.run(0.02)
    net.sent, net.lost = 0, {lost}
    prompts = _prompts(6, 3)
    for blocks in prompts:
        _learn(a, [blocks], net.now)
        net.run(0.02)
    net.run(1.5)
    assert _hits(a, prompts) == _hits(b, prompts)


def test_the_blocks_of_a_prompt_are_told_once() -> None:
    a, b = One("a"), One("b")
    b.hear(a.publish(0.0), 0.0)
    blocks = tuple(range(1000, 1500))
    a.send("prefill-0", 0.1, blocks=blocks)
    first = a.publish(0.1)
    a.send("decode-0", 0.2, blocks=blocks)
    second = a.publish(0.2)
    b.hear(first + second, 0.2)
    assert _hits(b, [blocks]) == [{"prefill-0": 500, "decode-0": 500}]
    assert len(first[0]) > 4000
    assert len(second[0]) < 100


def test_a_pull_is_counted_as_no_work_and_teaches_nothing() -> None:
    a, b = One("a"), One("b")
    b.hear(a.publish(0.0), 0.0)
    claim = a.send("prefill-0", 0.1, tokens=10_000)
    claim.source, claim.pulled = a.registry.get("prefill-1"), 9_000.0
    b.hear(a.publish(0.1), 0.1)
    assert [each.cached for each in b.registry.get("prefill-0").prefill.pending] == [9000]  # type: ignore[attr-defined]
    a.registry.work.prefilled(claim, 10_000, 9_000, 0.3)
    b.hear(a.publish(0.3), 0.3)
    assert b.registry.get("prefill-0").prefill.queued == 0.0
    assert b.registry.load.prefill.samples == 0


@given(st.lists(st.lists(st.integers(0, 8), max_size=6), max_size=12), st.integers(0, 6))
def test_blocks_that_are_no_chain_end_in_no_error(stored: list[list[int]], capacity: int) -> None:
    index = PrefixIndex()
    holder, other = index.add(capacity), index.add()
    for number, blocks in enumerate(stored):
        if number % 4 == 3:
            holder.restore(blocks)
        else:
            holder.store(blocks)
        other.store(blocks[::-1])
        index.match(blocks)
        assert len(holder) <= capacity
    holder.resize(1)
    holder.clear()
    other.clear()
    assert not any(index._tables)


def test_what_nobody_asked_for_is_not_taken() -> None:

    one = One("a")
    told = Message("x", 1, True, (0, 0), ["prefill-0"], held=Held(0, pack_blocks([1, 2])), blocks=2)
    one.hear([KEY.encode(told)], 0.0)
    assert len(one.registry.prefixes) == 0
    sound(one)
