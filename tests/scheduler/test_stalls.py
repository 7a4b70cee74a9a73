"""How long answers stood still for prefills on their decode instance."""

from hypothesis import given
from hypothesis import strategies as st

from tests.support.fleet import D, scheduler_of
from vllm_pd_scheduler.scheduler.stalls import FORGET_S, Stalls

DECODES = scheduler_of(1, 3).registry.endpoints(D)
given_to = st.tuples(st.integers(0, 2), st.floats(0, 2 * FORGET_S), st.floats(0, 5))


@given(st.lists(given_to, max_size=30), st.floats(0.1, 100))
def test_no_more_than_was_given_and_no_less_than_the_last(
    steps: list[tuple[int, float, float]], answer_s: float
) -> None:
    stalls, now, total = Stalls(), 0.0, dict.fromkeys(DECODES, 0.0)
    for at, later, seconds in steps:
        now += later
        decode = DECODES[at]
        waited = stalls.wait(decode, now)
        stalls.add(decode, now, answer_s, seconds)
        total[decode] += seconds
        assert seconds <= stalls.recent(decode, now, answer_s) <= total[decode] + 1e-9
        assert abs(stalls.wait(decode, now) - waited - seconds) < 1e-6
        assert len(stalls) <= len(DECODES)


def test_what_is_long_ago_is_forgotten() -> None:
    stalls = Stalls()
    stalls.add(DECODES[0], 0.0, 1.0, 1.0)
    stalls.add(DECODES[1], FORGET_S + 1, 1.0, 1.0)
    assert len(stalls) == 1
    assert stalls.recent(DECODES[0], FORGET_S + 1, 1.0) == 0.0
