"""Who does what, of replicas that come and go."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.replicas.rendezvous import first

REPLICAS = st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=8)
THINGS = [f"prefill-{number}" for number in range(200)]


@given(REPLICAS, st.randoms(use_true_random=False))
def test_all_that_know_the_same_replicas_choose_the_same(replicas: set[str], random: object) -> None:
    for thing in THINGS[:20]:
        assert (
            first(thing, replicas) == first(thing, sorted(replicas)) == first(thing, [*replicas, *replicas])
        )
        assert first(thing, replicas, 2)[:1] == first(thing, replicas)
        assert len(first(thing, replicas, 2)) == min(2, len(replicas))


@given(REPLICAS, st.text(min_size=9, max_size=9))
def test_one_that_comes_takes_its_share_and_nothing_else_moves(replicas: set[str], new: str) -> None:
    for thing in THINGS[:50]:
        before, after = first(thing, replicas), first(thing, replicas | {new})
        assert after in (before, (new,))


@given(REPLICAS.filter(lambda replicas: len(replicas) > 1), st.data())
def test_one_that_goes_leaves_its_share_to_the_second(replicas: set[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(sorted(replicas)))
    for thing in THINGS[:50]:
        one, other = first(thing, replicas, 2)
        assert first(thing, replicas - {gone}) == ((other,) if one == gone else (one,))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_shares_are_even(size: int) -> None:
    replicas = [f"scheduler-{number}-7f3a" for number in range(size)]
    tally = Counter(first(f"instance-{number}", replicas)[0] for number in range(4000))
    mean = 4000 / size
    assert all(abs(tally[each] - mean) < 5 * mean**0.5 for each in replicas)
