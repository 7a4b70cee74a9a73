import unittest
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.sim.engine import Engine, EngineRequest, Fetch, HandOff
from vllm_pd_scheduler.sim.leap import Leap
from vllm_pd_scheduler.sim.profile import EngineProfile
from vllm_pd_scheduler.sim.virtual import Snapshot, VirtualClock, VirtualInstance

# Odd numbers, so that no two events of a random workload fall on one moment by accident.
PROFILE = EngineProfile(
    block_size=4,
    num_blocks=24,
    max_num_seqs=3,
    max_num_batched_tokens=16,
    step_overhead=0.003_183_098_861,
    prefill_rate=1_732.050_807,
    prefill_per_kv_token=2.718_281_828e-6,
    decode_base=0.001_414_213_562,
    decode_per_seq=0.000_271_828_182,
    decode_per_kv_token=1.618_033_988e-5,
    kv_bytes_per_token=1000,
    transfer_bandwidth=1.202_056_903e6,
    transfer_latency=0.005_772_156_649,
    lease=0.314_159_265,
)


class ClockTest(unittest.TestCase):
    def test_events_come_in_order_and_those_of_one_moment_as_they_were_asked_for(self) -> None:
        clock, seen = VirtualClock(), list[tuple[str, float]]()

        def see(name: str) -> None:
            seen.append((name, clock.now))
            if name == "b":
                clock.call_at(0.5, partial(see, "late"))

        for name, time in (("c", 2.0), ("a", 1.0), ("b", 1.0), ("never", 1.5), ("d", 3.0)):
            handle = clock.call_at(time, partial(see, name))
            if name == "never":
                handle.cancel()
        clock.run_until(2.0)
        self.assertEqual(seen, [("a", 1.0), ("b", 1.0), ("late", 1.0), ("c", 2.0)])
        clock.run_until(2.5)
        self.assertEqual(clock.now, 2.5)
        clock.run()
        self.assertEqual(seen[4:], [("d", 3.0)])


class LeapTest(unittest.TestCase):
    @given(
        st.floats(0, 1e5),
        st.floats(1e-4, 1),
        st.floats(0, 1),
        st.integers(1, 3000),
        st.integers(0, 3000),
        st.floats(0, 1),
    )
    def test_begun_is_the_inverse_of_end(
        self, start: float, first: float, share: float, steps: int, step: int, part: float
    ) -> None:
        leap = Leap(start, steps, first, first * share, batch=1)
        at, end = leap.end(step), leap.end(step + 1)
        started = leap.started(at + (end - at) * (0.1 + 0.8 * part))
        self.assertEqual(started, min(steps, step + 1))


@dataclass
class Pair:
    """A prefill and a decode instance, and a workload that runs through them."""

    leaping: bool
    clock: VirtualClock = field(default_factory=VirtualClock)
    requests: dict[str, EngineRequest] = field(default_factory=dict)
    told: list[tuple[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.p = VirtualInstance(Engine(PROFILE), self.clock, leaping=self.leaping)
        self.d = VirtualInstance(Engine(PROFILE), self.clock, leaping=self.leaping)

    def request(
        self, name: str, prompt: int, output: int, common: int, hand_off: HandOff = HandOff.NONE
    ) -> EngineRequest:
        shared = min(common, prompt // 4)  # what follows the prompt is its own answer
        hashes = [hash((i, name[1:] if i >= shared else "")) for i in range((prompt + output) // 4)]
        request = self.requests[name] = EngineRequest(name, prompt, output, hand_off, hashes)
        return request

    def tell(self, what: str, request: EngineRequest, time: float) -> None:
        assert time == self.clock.now
        self.told.append((request.request_id, what))
        self.times.append(time)

    def local(self, name: str, prompt: int, output: int, common: int) -> None:
        request = self.request("d" + name, prompt, output, common)
        self.d.add(request, on_first_token=partial(self.tell, "first"), on_finished=partial(self.tell, "end"))

    def split(self, name: str, prompt: int, output: int, common: int, pause: float = 0.0) -> None:
        def decode() -> None:
            request = self.request("d" + name, prompt, output, common, HandOff.RECEIVE)
            self.d.add(
                request,
                offer=offer,
                on_first_token=partial(self.tell, "first"),
                on_finished=partial(self.tell, "end"),
            )

        def prefilled(request: EngineRequest, time: float) -> None:
            nonlocal offer
            self.tell("prefilled", request, time)
            offer = self.p.offer(request.request_id)
            self.clock.call_at(time + pause, decode)

        offer = None
        self.p.add(self.request("p" + name, prompt, 1, common, HandOff.SEND), on_finished=prefilled)

    def run(self, workload: list[Any]) -> None:
        for number, (kind, time, *values) in enumerate(workload):
            if kind == "abort":
                name = f"d{values[0]}"
                call = partial(self.d.abort, name)
            else:
                call = partial(getattr(self, kind), str(number), *values)
            self.clock.call_at(time, call)
        for look in range(40):
            self.clock.call_at(0.0123 + look * 0.0567, self.look)
        self.clock.run()
        self.look()

    def look(self) -> None:
        self.snapshots += [self.p.snapshot(), self.d.snapshot()]


TIMES = st.floats(0.0, 1.5)
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 8))
WORK = st.lists(
    st.one_of(
        st.tuples(st.just("local"), TIMES, SIZES).map(lambda item: (*item[:2], *item[2])),
        st.tuples(st.just("split"), TIMES, SIZES, st.sampled_from([0.0, 0.0, 0.0417, 0.3337])).map(
            lambda item: (*item[:2], *item[2], item[3])
        ),
        st.tuples(st.just("abort"), TIMES, st.integers(0, 12)),
    ),
    max_size=14,
)


class VirtualInstanceTest(unittest.TestCase):
    @settings(max_examples=200, deadline=None)
    @given(WORK)
    @example([("local", 0.0, 8, 40, 0), ("split", 0.1, 30, 40, 2, 0.0), ("local", 0.15, 40, 38, 0)])
    @example([("split", 0.01 * i, 33, 30, 3, 0.0) for i in range(9)])
    def test_leaping_gives_what_stepping_gives(self, workload: list[Any]) -> None:
        stepping, leaping = Pair(leaping=False), Pair(leaping=True)
        for pair in (stepping, leaping):
            pair.run(workload)
        self.assertEqual(leaping.told, stepping.told)
        for one, other in zip(leaping.times, stepping.times, strict=True):
            self.assertAlmostEqual(one, other, delta=1e-9 * max(1.0, other))
        for one, other in zip(leaping.snapshots, stepping.snapshots, strict=True):
            self.assertAlmostEqual(one.busy, other.busy)
            self.assertAlmostEqual(one.gap_seconds, other.gap_seconds)
            rounded = {"busy": 0.0, "gap_seconds": 0.0}
            self.assertEqual(replace(one, **rounded), replace(other, **rounded))
        self.assertEqual(leaping.d.hand_offs, stepping.d.hand_offs)
        for name, request in leaping.requests.items():
            other = stepping.requests[name]
            self.assertEqual(
                (request.state, request.generated, request.computed, request.cached),
                (other.state, other.generated, other.computed, other.cached),
            )
            self.assertAlmostEqual(request.last_token, other.last_token)
        for p, d in ((pair.p.engine, pair.d.engine) for pair in (stepping, leaping)):
            self.assertEqual((p.running, p.queued, d.running, d.queued, d.deferred), (0, 0, 0, 0, 0))
            self.assertEqual((d.pool.used, p.pool.used == 0), (0, not p.pinned))

    def test_a_leap_is_one_event(self) -> None:
        pair = Pair(leaping=True)
        pair.local("a", 8, 40, 0)
        events = 0
        call_at = pair.clock.call_at

        def counting(*arguments: Any) -> Any:
            nonlocal events
            events += 1
            return call_at(*arguments)

        pair.clock.call_at = counting  # type: ignore[method-assign]
        pair.clock.run()
        self.assertEqual((pair.d.snapshot().generation_tokens, pair.d.snapshot().finished), (40, 1))
        self.assertLessEqual(events, 4)

    def test_tokens_are_counted_while_a_leap_is_under_way(self) -> None:
        pair = Pair(leaping=True)
        pair.local("a", 8, 40, 0)
        seen = []
        for number in range(1, 60):
            pair.clock.run_until(number * 0.005)
            seen.append(pair.d.snapshot().generation_tokens)
        self.assertEqual(seen, sorted(seen))
        self.assertGreater(len(set(seen)), 30)
        self.assertEqual(seen[-1], 40)

    def test_a_hand_off_is_fetched_and_frees_its_sender(self) -> None:
        pair = Pair(leaping=True)
        pair.split("a", 17, 5, 0)
        pair.clock.run()
        self.assertEqual(pair.told, [("pa", "prefilled"), ("da", "first"), ("da", "end")])
        self.assertEqual(pair.d.hand_offs, {Fetch.GOOD: 1})
        self.assertEqual((pair.p.snapshot().pinned, pair.p.engine.pool.used), (0, 0))
        travel = PROFILE.transfer_time(17)
        decode = PROFILE.step_time(0, 1, 16)
        self.assertAlmostEqual(pair.times[1] - pair.times[0], travel + decode)
        self.assertEqual(pair.d.snapshot().prompt_tokens, 17)

    def test_a_hand_off_whose_lease_has_ended_is_prefilled_here(self) -> None:
        pair = Pair(leaping=True)
        pair.split("a", 17, 5, 0, pause=PROFILE.lease)
        pair.clock.run()
        self.assertEqual(pair.d.hand_offs, {Fetch.STALE: 1})
        self.assertEqual(pair.told[-1], ("da", "end"))

    def test_an_abort_lets_go_of_what_was_not_fetched(self) -> None:
        pair = Pair(leaping=True)
        pair.split("a", 17, 5, 0)
        while not pair.d.snapshot().deferred:
            pair.clock.run_until(pair.clock.now + 0.001)
        self.assertEqual(pair.p.snapshot().pinned, 1)
        self.assertTrue(pair.d.abort("da"))
        self.assertEqual((pair.p.snapshot().pinned, pair.d.snapshot().waiting), (0, 0))
        pair.clock.run()
        self.assertEqual(pair.told, [("pa", "prefilled")])

    def test_a_request_runs_until_its_last_token_is_out(self) -> None:
        pair = Pair(leaping=True)
        pair.local("a", 16, 1, 0)
        pair.clock.run_until(PROFILE.step_time(16, 0, 0) / 2)
        self.assertEqual(pair.d.snapshot().running, 1)
        pair.clock.run()
        self.assertEqual(pair.d.snapshot().running, 0)

    def test_what_waits_for_pinned_blocks_starts_when_their_lease_ends(self) -> None:
        pair = Pair(leaping=True)
        for name in "ab":
            pair.p.add(pair.request("p" + name, 40, 1, 0, HandOff.SEND))
        pair.clock.run_until(0.2)
        waiting = pair.request("pc", 30, 1, 0, HandOff.SEND)
        pair.p.add(waiting)
        pair.clock.run()
        first = min(pair.requests[name].last_token for name in ("pa", "pb"))
        self.assertAlmostEqual(waiting.started or 0.0, first + PROFILE.lease)

    def test_who_watches_knows_what_is_cached(self) -> None:
        """And not before the end of the step that has computed it."""
        clock, seen = VirtualClock(), dict[int, float]()

        def changed(changes: list[tuple[int, bool]], at: float) -> None:
            for key, cached in changes:
                self.assertEqual(key not in seen, cached)
                seen.pop(key, None)
                if cached:
                    seen[key] = at

        instance = VirtualInstance(Engine(PROFILE), clock, on_cache=changed)
        for name in "abcdef":
            hashes = [hash((name, number)) for number in range(12)]
            instance.add(EngineRequest(name, 17, 31, block_hashes=hashes))
        prefilled = PROFILE.step_time(16, 0, 0, 16 * 8)
        clock.run_until(prefilled / 2)
        self.assertEqual(set(seen.values()), {prefilled})
        clock.run()
        self.assertEqual(set(seen), set(instance.engine.pool._cached))

    def test_receiving_needs_an_offer(self) -> None:
        with self.assertRaisesRegex(ValueError, "offer"):
            Pair(leaping=True).d.add(EngineRequest("a", 4, 1, HandOff.RECEIVE))


if __name__ == "__main__":
    unittest.main()
