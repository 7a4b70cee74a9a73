"""What is learned of hand-offs by pair."""

from __future__ import annotations

import math
from itertools import product
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.prediction.load_model import FleetLoad
from vllm_pd_scheduler.prediction.transfer_rates import MAX_PAIRS, PairRate, TransferRates

NAMES = ["0", "1", "2", "3"]


def taught(slow: dict[tuple[str, str], float], rounds: int = 60, seed: int = 1) -> TransferRates:
    """Return what 4 P and 4 D have taught, with 10 ms and 20 µs a token, and noise; some pairs are slower."""
    rates, random = TransferRates(), Random(seed)
    for _ in range(rounds):
        for prefill, decode in product(NAMES, NAMES):
            tokens = random.choice([500.0, 2000.0, 8000.0])
            times = slow.get((prefill, decode), 1.0) * random.lognormvariate(0.0, 0.2)
            rates.learn(f"p{prefill}", f"d{decode}", tokens, times * (0.01 + 2e-5 * tokens))
    return rates


def test_the_fleets_time_is_learned() -> None:
    rates = taught({})
    for tokens in (500.0, 2000.0, 8000.0):
        expected = 0.01 + 2e-5 * tokens
        assert 0.7 < rates.predict("p0", "d0", tokens) / expected < 1.4
    assert not rates.slow


def test_a_slow_pair_is_found_and_no_other() -> None:
    told: list[PairRate] = []
    rates = taught({})
    rates.on_slow = told.append
    for _ in range(40):
        for prefill, decode in product(NAMES, NAMES):
            slow = 10.0 if (prefill, decode) == ("1", "2") else 1.0
            rates.learn(f"p{prefill}", f"d{decode}", 2000.0, slow * 0.05)
    assert rates.slow == {("p1", "d2")}
    assert [(each.prefill, each.decode, each.slow) for each in told] == [("p1", "d2", True)], "once"
    assert rates.slowest(1)[0].decode == "d2"
    assert rates.slowest(1)[0].times > 4.0
    assert 5.0 < rates.predict("p1", "d2", 2000.0) / rates.predict("p1", "d1", 2000.0) < 15.0
    for _ in range(80):
        for prefill, decode in product(NAMES, NAMES):
            rates.learn(f"p{prefill}", f"d{decode}", 2000.0, 0.05)
    assert not rates.slow
    assert [each.slow for each in told] == [True, False]


def test_a_new_pair_starts_from_its_p_and_d() -> None:
    of_d0 = {(prefill, "0"): 3.0 for prefill in NAMES[1:]}
    rates, random = TransferRates(), Random(2)
    for _ in range(60):
        for prefill, decode in product(NAMES, NAMES):
            if (prefill, decode) != ("0", "0"):
                times = of_d0.get((prefill, decode), 1.0) * random.lognormvariate(0.0, 0.1)
                rates.learn(f"p{prefill}", f"d{decode}", 2000.0, times * 0.05)
    assert rates.predict("p0", "d0", 2000.0) > 1.8 * rates.predict("p0", "d1", 2000.0)


def test_a_few_wild_ones_move_little() -> None:
    rates = taught({})
    before = rates.predict("p0", "d0", 2000.0)
    for _ in range(3):
        rates.learn("p0", "d0", 2000.0, 60.0)
    assert rates.predict("p0", "d0", 2000.0) < 2.5 * before
    assert not rates.slow


def test_what_nobody_feels_is_not_slow() -> None:
    rates = TransferRates()
    for _ in range(60):
        for prefill, decode in product(NAMES, NAMES):
            slow = 10.0 if (prefill, decode) == ("1", "2") else 1.0
            rates.learn(f"p{prefill}", f"d{decode}", 100.0, slow * 0.0011)
    assert not rates.slow


def test_pairs_are_bounded_and_go_with_their_instances() -> None:
    rates = TransferRates()
    for number in range(MAX_PAIRS + 50):
        rates.learn("p0", f"d{number}", 1000.0, 0.03)
    assert len(rates.slowest(10**6)) == MAX_PAIRS
    rates.forget("p0")
    assert rates.slowest(9) == []


def test_before_anything_is_learned_the_prior_holds() -> None:
    load = FleetLoad()
    assert load.handoff("p", "d", 1e6) == load.transfer
    load.transfers.learn("p", "d", 1000.0, 0.04)
    assert load.handoff("p", "d", 1000.0) != load.transfer


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES), st.floats(), st.floats()), max_size=60)
)
def test_nothing_makes_nonsense_of_it(samples: list[tuple[str, str, float, float]]) -> None:
    rates = TransferRates()
    for prefill, decode, tokens, seconds in samples:
        rates.learn(prefill, decode, tokens, seconds)
        predicted = rates.predict(prefill, decode, 1000.0)
        assert math.isfinite(predicted)
        assert predicted >= 0.0


def test_a_choice_counts_with_what_is_predicted_and_with_usual_times_for_what_is_not_known() -> None:
    rates = taught({("1", "2"): 10.0})
    found = rates.of("p1")
    assert found is not None
    for decode in ("d0", "d2"):
        expected = rates.predict("p1", decode, 2000.0)
        counted = (found.overhead + found.per_token * 2000.0) * found.times[decode]
        assert math.isclose(counted, expected, rel_tol=0.1), "of D it is as of the pair's last turn"
    assert found.times["d2"] > 4.0 * found.times["d0"]
    assert found.times["never seen"] == 1.0
    assert rates.of("never seen") is None


def test_an_unknown_pair_is_taken_for_what_others_of_its_d_are() -> None:
    rates = taught({(prefill, "0"): 5.0 for prefill in NAMES})
    rates.learn("new", "d1", 2000.0, 0.05)
    found = rates.of("new")
    assert found is not None
    assert found.times["d0"] > 3.0 * found.times["d1"]


def test_what_is_usual_of_a_d_is_what_its_unknown_pairs_have() -> None:
    taught_here, heard = taught({(prefill, "0"): 5.0 for prefill in NAMES}), TransferRates()
    heard.adopt(taught_here.known(1))
    taught_here.learn("new", "d1", 2000.0, 0.05)
    (known,) = heard.known(1).pairs
    for rates, (prefill, known_of_it) in ((taught_here, ("new", "d1")), (heard, known)):
        found, factors = rates.of(prefill), rates.known(0).instances
        assert found is not None
        for decode in {"d0", "d1", "d2", "d3"} - {known_of_it}:
            assert found.times.get(decode) is None
            assert found.times[decode] == found.usual[decode] == math.exp(factors[decode])
        rates.forget("d2")
        assert "d2" not in found.usual
        assert found.times["d2"] == 1.0


def test_a_pair_that_is_avoided_is_tried_again_and_a_link_that_has_recovered_is_noticed() -> None:
    """P hands over where that seems to be fastest. Nothing else tells of the slow pair."""
    rates = taught({("1", "2"): 10.0})
    tried_after = []
    for number in range(400):
        for prefill, decode in product(NAMES, NAMES):
            found = rates.of("p1")
            assert found is not None
            if (prefill, decode) == ("1", "2"):
                if found.times["d2"] > 1.5:
                    continue
                tried_after.append(number)
            rates.learn(f"p{prefill}", f"d{decode}", 2000.0, 0.05)
    assert 10 < tried_after[0] < 100, "not often, and not never"
    assert tried_after[-300:] == list(range(100, 400)), "as often as others, once it is known to be as fast"
    assert rates.predict("p1", "d2", 2000.0) < 1.2 * rates.predict("p1", "d1", 2000.0)


def test_of_a_pair_that_is_still_slow_one_try_is_enough() -> None:
    rates = taught({("1", "2"): 10.0})
    for _ in range(100):
        for prefill, decode in product(NAMES, NAMES):
            if (prefill, decode) != ("1", "2"):
                rates.learn(f"p{prefill}", f"d{decode}", 2000.0, 0.05)
    found = rates.of("p1")
    assert found is not None
    assert found.times["d2"] < 1.5
    rates.learn("p1", "d2", 2000.0, 0.5)
    assert found.times["d2"] > 4.0
