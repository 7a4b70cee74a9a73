import unittest
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.sim.engine import Engine, EngineRequest, Fetch, HandOff, State, Step
from vllm_pd_scheduler.sim.profile import EngineProfile


def small(**changes: Any) -> EngineProfile:
    """An engine that is easy to fill: 10 blocks of 4 tokens, 2 requests, 16 tokens a step."""
    sizes = {"block_size": 4, "num_blocks": 10, "max_num_seqs": 2, "max_num_batched_tokens": 16}
    return EngineProfile(**{**sizes, **changes})


def run(engine: Engine, now: float = 0.0, limit: int = 1000) -> list[Step]:
    """Step until the engine is idle; transfers arrive at once."""
    steps = []
    for _ in range(limit):
        step = engine.step(now)
        for request in step.transfers:
            engine.transfer_done(request.request_id)
        if step.idle and not step.transfers:
            return steps
        now += step.duration
        steps.append(step)
    raise AssertionError("the engine does not come to rest")


class BatchingTest(unittest.TestCase):
    def test_prefill_gives_the_first_token_and_each_step_one_more(self) -> None:
        engine = Engine(small())
        engine.add(EngineRequest("a", prompt_tokens=6, output_tokens=3), now=1.0)
        steps = run(engine, now=1.0)
        self.assertEqual([s.prefill_tokens for s in steps], [6, 0, 0])
        self.assertEqual([s.decoding for s in steps], [0, 1, 1])
        self.assertEqual(
            [(o.index, o.finished) for s in steps for o in s.outputs], [(0, False), (1, False), (2, True)]
        )
        self.assertEqual(engine.pool.used, 0)

    def test_times_are_of_the_callers_clock(self) -> None:
        engine = Engine(
            small(step_overhead=0.5, prefill_rate=10, decode_base=1, decode_per_seq=0, decode_per_kv_token=0)
        )
        request = EngineRequest("a", prompt_tokens=10, output_tokens=2)
        engine.add(request, now=100.0)
        run(engine, now=101.0)
        self.assertEqual((request.arrived, request.started), (100.0, 101.0))
        self.assertEqual((request.first_token, request.last_token), (102.5, 104.0))

    def test_a_long_prompt_is_read_in_chunks_while_others_decode(self) -> None:
        engine = Engine(small(num_blocks=20))
        engine.add(EngineRequest("a", 4, 10), 0.0)
        engine.step(0.0)
        engine.add(EngineRequest("long", 40, 1), 0.0)
        steps = [engine.step(0.0) for _ in range(3)]
        self.assertEqual([s.prefill_tokens for s in steps], [15, 15, 10])
        self.assertEqual([s.decoding for s in steps], [1, 1, 1])
        self.assertTrue(steps[2].outputs[1].finished)

    def test_no_more_than_max_num_seqs_run(self) -> None:
        engine = Engine(small())
        for name in "abc":
            engine.add(EngineRequest(name, 2, 5), 0.0)
        engine.step(0.0)
        self.assertEqual((engine.running, engine.queued), (2, 1))
        run(engine)
        self.assertEqual((engine.running, engine.queued), (0, 0))

    def test_waits_when_blocks_are_short(self) -> None:
        engine = Engine(small(num_blocks=4, max_num_batched_tokens=32))
        engine.add(EngineRequest("a", 12, 4), 0.0)
        engine.add(EngineRequest("b", 8, 1), 0.0)
        engine.step(0.0)
        self.assertEqual((engine.running, engine.queued, engine.kv_usage), (1, 1, 0.75))
        outputs = [o for step in run(engine) for o in step.outputs if o.finished]
        self.assertEqual([o.request.request_id for o in outputs], ["a", "b"])

    def test_the_youngest_is_preempted_and_comes_back(self) -> None:
        engine = Engine(small(num_blocks=4))
        engine.add(EngineRequest("old", 7, 9), 0.0)
        engine.add(EngineRequest("young", 7, 9), 0.0)
        steps = run(engine)
        preempted = [r.request_id for step in steps for r in step.preempted]
        self.assertEqual(preempted, ["young"])
        for name in ("old", "young"):
            indices = [o.index for step in steps for o in step.outputs if o.request.request_id == name]
            self.assertEqual(indices, list(range(9)))

    def test_rejects_what_can_never_run(self) -> None:
        engine = Engine(small())
        engine.add(EngineRequest("a", 1, 1), 0.0)
        for request in (EngineRequest("a", 1, 1), EngineRequest("b", 40, 1), EngineRequest("c", 0, 1)):
            with self.assertRaises(ValueError):
                engine.add(request, 0.0)

    def test_a_profile_names_the_bad_value(self) -> None:
        with self.assertRaisesRegex(ValueError, "prefill_rate must be above 0"):
            EngineProfile(prefill_rate=0)
        with self.assertRaisesRegex(ValueError, "lease must not be negative"):
            EngineProfile(lease=-1)


class HandOffTest(unittest.TestCase):
    def pinned(self, engine: Engine, now: float = 0.0) -> list[int]:
        engine.add(EngineRequest("p", 9, 1, HandOff.SEND), now)
        run(engine, now)
        return engine.pinned_blocks("p")

    def test_blocks_stay_pinned_and_count_in_usage_only(self) -> None:
        engine = Engine(small())
        self.assertEqual(len(self.pinned(engine)), 3)
        self.assertEqual((engine.running, engine.queued, engine.deferred, engine.pinned), (0, 0, 0, 1))
        self.assertAlmostEqual(engine.kv_usage, 0.3)

    def test_one_fetch_is_good_and_a_second_is_stale(self) -> None:
        engine = Engine(small())
        blocks = self.pinned(engine)
        self.assertIs(engine.fetch("p", blocks, 1.0), Fetch.GOOD)
        self.assertEqual(engine.pool.used, 0)
        self.assertIs(engine.fetch("p", blocks, 1.0), Fetch.STALE)

    def test_wrong_blocks_are_stale_and_impossible_ones_invalid(self) -> None:
        engine = Engine(small())
        self.pinned(engine)
        self.assertIs(engine.fetch("p", [1, 2, 11], 1.0), Fetch.INVALID)
        self.assertIs(engine.fetch("p", [1, 2, 4], 1.0), Fetch.STALE)

    def test_the_lease_ends(self) -> None:
        engine = Engine(small(lease=5.0))
        blocks = self.pinned(engine)
        end = engine.next_expiry()
        assert end is not None
        self.assertEqual(engine.expire(end - 0.001), [])
        self.assertEqual(engine.step(end).expired, ["p"])
        self.assertIs(engine.fetch("p", blocks, end), Fetch.STALE)
        self.assertEqual((engine.pool.used, engine.next_expiry()), (0, None))

    def test_release(self) -> None:
        engine = Engine(small())
        self.pinned(engine)
        self.assertTrue(engine.release("p"))
        self.assertFalse(engine.release("p"))
        self.assertEqual(engine.pool.used, 0)

    def test_receiving_takes_blocks_waits_and_then_only_decodes(self) -> None:
        engine = Engine(small())
        engine.add(EngineRequest("d", 9, 3, HandOff.RECEIVE), 0.0)
        step = engine.step(0.0)
        self.assertEqual([r.request_id for r in step.transfers], ["d"])
        self.assertTrue(step.idle)
        self.assertEqual((engine.deferred, engine.queued, engine.pool.used), (1, 0, 3))
        self.assertTrue(engine.step(0.0).idle)
        engine.transfer_done("d")
        steps = run(engine)
        self.assertEqual((sum(s.prefill_tokens for s in steps), sum(s.decoding for s in steps)), (0, 3))
        self.assertEqual(engine.pool.used, 0)

    def test_a_failed_transfer_is_dropped_or_computed_here(self) -> None:
        for recompute in (False, True):
            engine = Engine(small())
            engine.add(EngineRequest("d", 9, 2, HandOff.RECEIVE), 0.0)
            engine.step(0.0)
            engine.transfer_failed("d", recompute=recompute)
            steps = run(engine)
            self.assertEqual(sum(s.prefill_tokens for s in steps), 9 if recompute else 0)
            self.assertEqual(engine.pool.used, 0)

    def test_abort_in_every_state_frees_the_blocks(self) -> None:
        def at(state: State) -> Engine:
            engine = Engine(small(num_blocks=3))
            hand_off = {State.PINNED: HandOff.SEND, State.DEFERRED: HandOff.RECEIVE}.get(state, HandOff.NONE)
            engine.add(EngineRequest("a", 8, 1 if state is State.PINNED else 3, hand_off), 0.0)
            if state is not State.WAITING:
                engine.step(0.0)
            return engine

        for state in (State.WAITING, State.RUNNING, State.DEFERRED, State.PINNED):
            with self.subTest(state):
                engine = at(state)
                self.assertTrue(engine.abort("a"))
                self.assertFalse(engine.abort("a"))
                self.assertEqual(engine.pool.used, 0)
                self.assertTrue(engine.step(0.0).idle)

    def test_abort_of_a_fetched_request_that_waits_for_a_place(self) -> None:
        engine = Engine(small(max_num_seqs=1))
        engine.add(EngineRequest("d", 8, 3, HandOff.RECEIVE), 0.0)
        engine.step(0.0)
        engine.transfer_done("d")
        self.assertEqual((engine.queued, engine.pool.used), (1, 2))
        engine.abort("d")
        self.assertEqual((engine.queued, engine.pool.used), (0, 0))


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 10), st.sampled_from(HandOff)),
    st.tuples(st.sampled_from(["abort", "fetch", "done", "drop", "recompute"]), st.integers(0, 9)),
    st.tuples(st.just("step"), st.floats(0, 3)),
)


class InvariantTest(unittest.TestCase):
    """Whatever happens, every block has one holder, and in the end none has."""

    def check(self, engine: Engine) -> None:
        holders = engine.pool.holders()
        held = [block for holder in holders for block in engine.pool.blocks(holder)]
        self.assertEqual(engine.pool.used, len(held))
        self.assertEqual(len(held), len(set(held)))
        self.assertLessEqual(engine.pool.used, engine.pool.size)
        self.assertLessEqual(engine.running, engine.profile.max_num_seqs)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(ACTIONS, max_size=60))
    @example([("add", 1, 2, HandOff.SEND), ("step", 0.0)] * 2)
    def test_blocks_in_use_are_those_of_the_holders(self, actions: list[Any]) -> None:
        # Steps are long, so that a request without room beside pinned blocks soon sees these freed.
        engine = Engine(small(max_num_seqs=3, lease=2.0, step_overhead=0.1))
        now, added, transfers = 0.0, [], []
        for number, (action, *values) in enumerate(actions):
            if action == "add":
                added.append(f"r{number}")
                engine.add(EngineRequest(f"r{number}", *values), now)
            elif action == "step":
                now += values[0]
                step = engine.step(now)
                self.assertLessEqual(step.prefill_tokens + step.decoding, 16)
                transfers += [request.request_id for request in step.transfers]
            elif action in ("abort", "fetch") and added:
                name = added[values[0] % len(added)]
                if action == "abort":
                    engine.abort(name)
                    transfers = [other for other in transfers if other != name]
                else:
                    engine.fetch(name, engine.pinned_blocks(name), now)
            elif action in ("done", "drop", "recompute") and transfers:
                name = transfers.pop(values[0] % len(transfers))
                if action == "done":
                    engine.transfer_done(name)
                else:
                    engine.transfer_failed(name, recompute=action == "recompute")
            self.check(engine)
        self.finish(engine, now, transfers)

    def finish(self, engine: Engine, now: float, transfers: list[str]) -> None:
        for name in transfers:
            engine.transfer_done(name)
        for _ in range(2000):
            step = engine.step(now)
            self.check(engine)
            for request in step.transfers:
                engine.transfer_done(request.request_id)
            expiry = engine.next_expiry()
            now = expiry if step.idle and expiry is not None else now + step.duration
            if step.idle and not step.transfers and not engine.queued and expiry is None:
                break
        self.assertEqual((engine.running, engine.queued, engine.deferred, engine.pinned), (0, 0, 0, 0))
        self.assertEqual((engine.pool.used, engine.pool.holders()), (0, {}))


if __name__ == "__main__":
    unittest.main()
