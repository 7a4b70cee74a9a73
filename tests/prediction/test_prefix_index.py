import random
import tracemalloc
from collections.abc import Sequence
from hashlib import blake2b
from unittest import TestCase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from vllm_pd_scheduler.prediction.prefix_index import DEFAULT_CAPACITY, Holder, PrefixIndex, PrefixMatch

SLOTS = 20
MAX_BYTES_PER_BLOCK = 220
"""What a block may take, its int with it. Measured: 150 to 205, as the dicts happen to have grown."""


def chain(prompt: str) -> tuple[int, ...]:
    """Return the blocks of a prompt that has a letter in each."""
    ends = range(1, len(prompt) + 1)
    return tuple(int.from_bytes(blake2b(prompt[:end].encode(), digest_size=7).digest()) for end in ends)


class PrefixIndexTest(TestCase):
    def setUp(self) -> None:
        self.index = PrefixIndex()

    def test_the_depth_is_how_many_leading_blocks_are_held(self) -> None:
        one, two, three = (self.index.add() for _ in range(3))
        one.store(chain("system, question"))
        two.store(chain("system, answer"))
        three.store(chain("else"))
        self.assertEqual(self.index.match(chain("system, questions")), {one: 16, two: 8})
        self.assertEqual(list(self.index.match(chain("system, question"))), [two, one])

    def test_nothing_is_held_of_an_empty_or_an_unknown_prompt(self) -> None:
        self.index.add().store(chain("known"))
        self.assertEqual(self.index.match(()), {})
        self.assertEqual(self.index.match(chain("unknown")), {})

    def test_a_long_chain_keeps_its_first_blocks(self) -> None:
        holder = self.index.add(3)
        holder.store(chain("older"))
        holder.store(chain("abcdef"))
        self.assertEqual(self.index.match(chain("abcdef")), {holder: 3})
        self.assertEqual(len(self.index), 3)

    def test_tails_go_before_prefixes_and_old_before_new(self) -> None:
        holder = self.index.add(6)
        holder.store(chain("ab1"))
        holder.store(chain("ab2"))
        holder.store(chain("xyz"))
        self.assertEqual(self.index.match(chain("ab1")), {holder: 2})
        self.assertEqual(self.index.match(chain("ab2")), {holder: 3})

    def test_use_keeps_a_block(self) -> None:
        holder = self.index.add(4)
        holder.store(chain("ab"))
        holder.store(chain("cd"))
        holder.store(chain("ab"))
        holder.store(chain("ef"))
        self.assertEqual(self.index.match(chain("ab")), {holder: 2})
        self.assertEqual(self.index.match(chain("cd")), {})

    def test_less_room_evicts_and_none_holds_nothing(self) -> None:
        holder = self.index.add(5)
        holder.store(chain("abcde"))
        holder.resize(2)
        self.assertEqual(self.index.match(chain("abcde")), {holder: 2})
        holder.resize(0)
        holder.store(chain("abcde"))
        self.assertEqual((len(holder), len(self.index)), (0, 0))

    def test_a_negative_capacity_is_refused(self) -> None:
        holder = self.index.add()
        self.assertEqual(holder.capacity, DEFAULT_CAPACITY)
        with pytest.raises(ValueError, match="negative"):
            holder.resize(-1)
        with pytest.raises(ValueError, match="negative"):
            self.index.add(-1)
        self.assertEqual(holder.capacity, DEFAULT_CAPACITY)

    def test_what_takes_a_slot_again_holds_nothing_of_the_one_before(self) -> None:
        gone, stays = self.index.add(), self.index.add()
        for holder in (gone, stays):
            holder.store(chain("abc"))
        gone.close()
        gone.close()
        new, other = self.index.add(), self.index.add()
        self.assertEqual(self.index.match(chain("abc")), {stays: 3})
        new.store(chain("ab"))
        gone.store(chain("abc"))
        gone.resize(9)
        self.assertEqual(self.index.match(chain("abc")), {new: 2, stays: 3})
        self.assertEqual((len(gone), len(other)), (0, 0))

    def test_a_thousand_holders_with_all_depths(self) -> None:
        blocks = chain("x" * 100)
        depths = {self.index.add(): number % 101 for number in range(1000)}
        for holder, depth in depths.items():
            holder.store(blocks[:depth])
        self.assertEqual(self.index.match(blocks), {h: depth for h, depth in depths.items() if depth})

    def test_one_that_is_gone_has_nothing_of_its_slots_next_holder(self) -> None:
        gone = self.index.add()
        gone.close()
        self.index.add().store(chain("abc"))
        match = self.index.match(chain("abc"))
        self.assertNotIn(gone, match)
        self.assertEqual(match.among([gone]), {})

    def test_of_many_equal_ones_each_has_its_turn(self) -> None:
        holders = [self.index.add() for _ in range(6)]
        for holder in holders:
            holder.store(chain("ab"))
        match, everyone = self.index.match(chain("ab")), self.index.mask_of(holders)
        self.assertEqual(match.longest(2, everyone, 0), holders[:2])
        self.assertEqual(match.longest(2, everyone, 5), [holders[5], holders[0]])
        self.assertEqual(match.longest(9, everyone, 2), holders[2:] + holders[:2])

    def test_a_common_prefix_is_no_long_one(self) -> None:
        holders = [self.index.add() for _ in range(6)]
        for holder in holders:
            holder.store(chain("a"))
        holders[4].store(chain("abc"))
        match, everyone = self.index.match(chain("abc")), self.index.mask_of(holders)
        self.assertEqual(match.longest(9, everyone, 0, common=5), [holders[4]])
        self.assertEqual(len(match.longest(9, everyone, 0, common=6)), 6)

    def test_memory_is_bounded(self) -> None:
        draw = random.Random(7).getrandbits
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        holders = [self.index.add(2_000) for _ in range(100)]
        for number in range(5_000):  # each holder is filled two and a half times
            holders[number % 100].store(tuple([draw(60) for _ in range(100)]))
        used, _ = tracemalloc.get_traced_memory()
        self.assertEqual(len(self.index), 200_000)
        self.assertLess(used / 200_000, MAX_BYTES_PER_BLOCK)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    length=st.integers(1, 150),
    depths=st.lists(st.integers(0, 150), max_size=120),
    count=st.integers(1, 9),
    common=st.integers(0, 120),
)
def test_any_depths(length: int, depths: list[int], count: int, common: int) -> None:
    """Many that differ, a few far apart, or all alike: the same as a look at each of them."""
    index, blocks = PrefixIndex(), chain("x" * length)
    holders = [index.add() for _ in depths]
    for holder, depth in zip(holders, depths, strict=True):
        holder.store(blocks[:depth])
    expected = {h: min(d, length) for h, d in zip(holders, depths, strict=True) if d}
    match = index.match(blocks)
    assert match == expected
    assert [match.get(holder, 0) for holder in holders] == [expected.get(holder, 0) for holder in holders]
    some = holders[::3]
    among = {holder: expected[holder] for holder in some if holder in expected}
    assert match.among(some) == among
    deepest = sorted(among.values(), reverse=True)
    deepest = [d for d in deepest if sum(other >= d for other in deepest) <= common][:count]
    assert [among[h] for h in match.longest(count, index.mask_of(some), common=common)] == deepest
    assert match.holds(index)
    index.add().store(blocks)
    assert not match.holds(index)
    assert not match.holds(PrefixIndex())


class Model:
    """What a holder should be: blocks in a list, the least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: list[int] = []
        self.answers: dict[int, int] = {}

    def store(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks[: self.capacity]):
            if block in self.blocks:
                self.blocks.remove(block)
            self.blocks.append(block)
        self.evict()

    def evict(self) -> None:
        del self.blocks[: max(0, len(self.blocks) - self.capacity)]
        self.answers = {block: more for block, more in self.answers.items() if block in self.blocks}

    def depth(self, blocks: Sequence[int]) -> int:
        held = set(self.blocks)
        return next((n for n, block in enumerate(blocks) if block not in held), len(blocks))


prompts = st.text("ab", max_size=9).map(chain)
capacities = st.integers(0, 25)


class PrefixMachine(RuleBasedStateMachine):
    """Any number of instances come, serve, restart, change and go; each does as its model."""

    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.models: dict[Holder, Model] = {}
        self.asked: tuple[tuple[int, ...], PrefixMatch] = (), self.index.match(())
        """The newest prompt, and what was known of it."""

    @precondition(lambda self: len(self.models) < SLOTS)
    @rule(target=holders, capacity=capacities)
    def add(self, capacity: int) -> Holder:
        holder = self.index.add(capacity)
        self.models[holder] = Model(capacity)
        return holder

    @rule(holder=holders, blocks=prompts)
    def store(self, holder: Holder, blocks: tuple[int, ...]) -> None:
        holder.store(blocks)
        self.models[holder].store(blocks)

    @rule(blocks=prompts)
    def store_everywhere(self, blocks: tuple[int, ...]) -> None:
        for holder, model in self.models.items():
            holder.store(blocks)
            model.store(blocks)

    @rule(holder=holders, capacity=capacities)
    def resize(self, holder: Holder, capacity: int) -> None:
        holder.resize(capacity)
        self.models[holder].capacity = capacity
        self.models[holder].evict()

    @rule(holder=holders)
    def clear(self, holder: Holder) -> None:
        holder.clear()
        self.models[holder].blocks.clear()
        self.models[holder].evict()

    @rule(holder=holders, blocks=prompts, more=st.integers(-1, 3))
    def answered(self, holder: Holder, blocks: tuple[int, ...], more: int) -> None:
        holder.answered(blocks, more)
        model = self.models[holder]
        if blocks and blocks[-1] in model.blocks:
            model.answers.pop(blocks[-1], None)
            if more > 0:
                model.answers[blocks[-1]] = more

    @rule(holder=consumes(holders))
    def close(self, holder: Holder) -> None:
        holder.close()
        del self.models[holder]

    @rule(blocks=prompts)
    def match(self, blocks: tuple[int, ...]) -> None:
        depths = {holder: model.depth(blocks) for holder, model in self.models.items()}
        expected = {holder: depth for holder, depth in depths.items() if depth}
        match = self.index.match(blocks)
        self.asked = blocks, match
        assert match == expected
        for holder, depth in depths.items():
            more = self.models[holder].answers.get(blocks[depth - 1], 0) if depth else 0
            assert holder.with_answer(blocks, depth) == min(len(blocks), depth + more)
        assert len(match) == len(expected)
        assert list(match.values()) == sorted(expected.values())
        some = list(self.models)[::2]
        assert match.among(some) == {holder: expected[holder] for holder in some if holder in expected}
        for count, turn in ((1, 0), (3, 2), (SLOTS, 5)):
            longest = match.longest(count, self.index.mask_of(some), turn)
            found = sorted((expected[holder] for holder in some if holder in expected), reverse=True)
            assert [expected[holder] for holder in longest] == found[:count]
            assert len(set(longest)) == len(longest)

    @invariant()
    def what_holds_is_what_the_index_says(self) -> None:
        blocks, match = self.asked
        if match.holds(self.index):
            depths = {holder: model.depth(blocks) for holder, model in self.models.items()}
            assert match == {holder: depth for holder, depth in depths.items() if depth}

    @invariant()
    def all_are_as_full_as_their_models(self) -> None:
        for holder, model in self.models.items():
            assert len(holder) == len(model.blocks) <= holder.capacity
        assert len(self.index) == sum(len(model.blocks) for model in self.models.values())


PrefixMachine.TestCase.settings = settings(
    derandomize=True, deadline=None, max_examples=150, stateful_step_count=40
)
PrefixMachineTest = PrefixMachine.TestCase
