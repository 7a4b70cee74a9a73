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

    def test_a_prompt_begins_when_all_of_it_has_room(self) -> None:
        engine = Engine(small())
        engine.add(EngineRequest("a", 12, 9), 0.0)
        engine.add(EngineRequest("b", 32, 1), 0.0)
        engine.step(0.0)
        self.assertEqual((engine.running, engine.queued, engine.pool.used), (1, 1, 3))
        steps = run(engine)
        self.assertEqual([step.prefill_tokens for step in steps if step.prefill_tokens], [16, 16])

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


class StepTimeTest(unittest.TestCase):
    def test_a_chunk_attends_to_all_before_it(self) -> None:
        engine = Engine(small(step_overhead=1, prefill_rate=10, prefill_per_kv_token=0.01, num_blocks=20))
        engine.add(EngineRequest("a", 24, 1), 0.0)
        one, two = run(engine)
        self.assertAlmostEqual(one.duration, 1 + 1.6 + 0.01 * 16 * 8)
        self.assertAlmostEqual(two.duration, 1 + 0.8 + 0.01 * 8 * (16 + 4))
        self.assertAlmostEqual(one.duration + two.duration - 2, 2.4 + 0.01 * 24 * 12)

    def test_a_decoding_request_reads_its_whole_context(self) -> None:
        engine = Engine(small(step_overhead=0, decode_base=0, decode_per_seq=0, decode_per_kv_token=1))
        engine.add(EngineRequest("a", 7, 4), 0.0)
        self.assertEqual([step.duration for step in run(engine)[1:]], [7, 8, 9])

    def test_a_short_prompt_costs_no_less_than_reading_the_weights(self) -> None:
        profile = EngineProfile(step_overhead=1, prefill_rate=10, prefill_min=2)
        self.assertEqual([profile.step_time(n, 0, 0) for n in (0, 1, 20, 30)], [1, 3, 3, 4])


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


def hashes(tokens: int, common: int, name: str) -> list[int]:
    """Of a prompt in blocks of 4, whose first `common` blocks are everybody's."""
    return [hash((number, name if number >= common else "")) for number in range(tokens // 4)]


class PrefixCacheTest(unittest.TestCase):
    def prompt(
        self, name: str, tokens: int, common: int, output: int = 1, hand_off: HandOff = HandOff.NONE
    ) -> EngineRequest:
        return EngineRequest(name, tokens, output, hand_off, hashes(tokens, common, name))

    def serve(self, engine: Engine, *requests: EngineRequest) -> list[int]:
        """Cached tokens of the requests, one after the other."""
        for request in requests:
            engine.add(request, 0.0)
            run(engine)
        return [request.cached for request in requests]

    def test_what_is_common_is_computed_once(self) -> None:
        engine = Engine(small())
        one, two = self.prompt("a", 14, 2), self.prompt("b", 14, 2)
        self.assertEqual(self.serve(engine, one), [0])
        engine.add(two, 0.0)
        self.assertEqual([step.prefill_tokens for step in run(engine)], [6])
        self.assertEqual((two.cached, engine.pool.used), (8, 0))

    @given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=17), min_size=1, max_size=8))
    def test_hits_are_the_longest_common_beginning(self, prompts: list[list[int]]) -> None:
        engine = Engine(small(num_blocks=40))
        seen: list[tuple[int, ...]] = []
        for number, tokens in enumerate(prompts):
            blocks = [tuple(tokens[: end + 4]) for end in range(0, len(tokens) - 3, 4)]
            request = EngineRequest(str(number), len(tokens), 1, block_hashes=list(map(hash, blocks)))
            expected = sum(4 for block in blocks if block in seen and len(block) < len(tokens))
            self.assertEqual(self.serve(engine, request), [expected])
            seen += blocks

    def test_the_last_token_is_always_computed(self) -> None:
        cached = self.serve(Engine(small()), *(self.prompt(name, 8, 2) for name in "ab"))
        self.assertEqual(cached, [0, 4])

    def test_two_at_once_share_blocks_while_the_first_computes_them(self) -> None:
        engine = Engine(small(num_blocks=7, max_num_batched_tokens=32))
        for name in "ab":
            engine.add(self.prompt(name, 14, 3, output=4), 0.0)
        step = engine.step(0.0)
        self.assertEqual((step.prefill_tokens, engine.running, engine.pool.used), (14 + 2, 2, 5))
        self.assertEqual(engine.pool.blocks("a")[:3], engine.pool.blocks("b")[:3])
        engine.abort("a")
        self.assertEqual(engine.pool.used, 4)

    def test_ends_are_forgotten_before_beginnings(self) -> None:
        engine = Engine(small(num_blocks=6))
        first, again = self.prompt("a", 16, 4), self.prompt("a2", 17, 4)
        self.assertEqual(self.serve(engine, first, self.prompt("b", 16, 0), again), [0, 0, 8])

    def test_the_longest_unused_is_forgotten_first(self) -> None:
        engine = Engine(small(num_blocks=5))
        a, b, c = (self.prompt(name, 9, 0) for name in "abc")
        again = [EngineRequest(f"{r.request_id}2", 9, 1, block_hashes=r.block_hashes) for r in (b, c, a)]
        self.assertEqual(self.serve(engine, a, b, c, *again), [0, 0, 0, 8, 8, 0])

    def test_a_preempted_request_finds_its_own_prompt_again(self) -> None:
        engine = Engine(small(num_blocks=5))
        for name in ("old", "young"):
            engine.add(self.prompt(name, 8, 0, output=9), 0.0)
        steps = run(engine)
        self.assertEqual([r.request_id for step in steps for r in step.preempted], ["young"])
        self.assertLess(sum(step.prefill_tokens for step in steps), 8 + 8 + 12)

    def test_only_what_is_not_cached_is_transferred(self) -> None:
        engine = Engine(small())
        requests = [self.prompt(name, 14, 2, 2, HandOff.RECEIVE) for name in "ab"]
        self.assertEqual(self.serve(engine, *requests), [0, 8])
        self.assertEqual([request.transfer_tokens for request in requests], [14, 6])

    def test_a_failed_transfer_leaves_nothing_in_the_cache(self) -> None:
        engine = Engine(small())
        engine.add(self.prompt("d", 14, 2, 2, HandOff.RECEIVE), 0.0)
        engine.step(0.0)
        engine.transfer_failed("d", recompute=False)
        self.assertEqual(self.serve(engine, self.prompt("e", 14, 2)), [0])

    def test_without_prefix_caching_all_is_computed(self) -> None:
        cached = self.serve(Engine(small(prefix_caching=False)), *(self.prompt(n, 14, 2) for n in "ab"))
        self.assertEqual(cached, [0, 0])

    def test_a_partial_block_has_no_hash(self) -> None:
        with self.assertRaisesRegex(ValueError, "full blocks"):
            Engine(small()).add(EngineRequest("a", 6, 1, block_hashes=[1, 2]), 0.0)

    def test_the_next_turn_finds_the_answer_where_that_was_written(self) -> None:
        first = EngineRequest("a", 14, 12, block_hashes=[1, 2, 3, 4, 5, 6])
        following = [
            EngineRequest(f"b{tokens}", tokens, 1, block_hashes=[1, 2, 3, 4, 5, 6]) for tokens in (25, 24)
        ]
        # The answer's last token was never computed. So the block of which it is the last is not there.
        whole = EngineRequest("c", 30, 2, block_hashes=[1, 2, 3, 4, 5, 6, 7, 8])
        self.assertEqual(self.serve(Engine(small(num_blocks=40)), first, *following), [0, 24, 20])
        self.assertEqual(
            self.serve(
                Engine(small(num_blocks=40)), whole, EngineRequest("d", 33, 1, block_hashes=range(1, 9))
            ),
            [0, 28],
        )

    def test_who_only_reads_the_prompt_has_no_answer(self) -> None:
        engine = Engine(small())
        prefill = EngineRequest("p", 14, 1, HandOff.SEND, [1, 2, 3])
        self.assertEqual(
            self.serve(engine, prefill, EngineRequest("q", 25, 1, block_hashes=[1, 2, 3, 4, 5, 6])), [0, 12]
        )

    def test_a_prompt_that_is_read_in_chunks_makes_answers_slower(self) -> None:
        """Wherever it is read, also on a decode instance."""
        engine = Engine(small(num_blocks=40, max_num_batched_tokens=8))
        engine.add(EngineRequest("answer", 4, 40), 0.0)
        engine.step(0.0)
        alone = engine.step(0.0).duration
        engine.add(EngineRequest("prompt", 20, 1), 0.0)
        steps = [engine.step(0.0) for _ in range(4)]
        self.assertEqual([(s.decoding, s.prefill_tokens) for s in steps], [(1, 7), (1, 7), (1, 6), (1, 0)])
        self.assertGreater(min(s.duration for s in steps[:3]), alone)


ACTIONS = st.one_of(
    st.tuples(
        st.just("add"), st.integers(1, 30), st.integers(1, 10), st.sampled_from(HandOff), st.integers(0, 7)
    ),
    st.tuples(st.sampled_from(["abort", "fetch", "done", "drop", "recompute"]), st.integers(0, 9)),
    st.tuples(st.just("step"), st.floats(0, 3)),
)


class InvariantTest(unittest.TestCase):
    """Whatever happens, blocks in use are those that somebody holds, and in the end nobody holds any."""

    def check(self, engine: Engine) -> None:
        holders = engine.pool.counts()
        lists = [engine.pool.blocks(holder) for holder in holders]
        self.assertEqual(engine.pool.used, len({block for blocks in lists for block in blocks}))
        self.assertEqual(engine.pool.used + engine.pool.free, engine.pool.size)
        for blocks in lists:
            self.assertEqual(len(blocks), len(set(blocks)))
        self.assertLessEqual(engine.pool.used, engine.pool.size)
        self.assertLessEqual(engine.running, engine.profile.max_num_seqs)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(ACTIONS, max_size=60))
    @example([("add", 1, 2, HandOff.SEND, 0), ("step", 0.0)] * 2)
    def test_blocks_in_use_are_those_of_the_holders(self, actions: list[Any]) -> None:
        # Steps are long, so that a request without room beside pinned blocks soon sees these freed.
        engine = Engine(small(max_num_seqs=3, lease=2.0, step_overhead=0.1))
        now, added, transfers = 0.0, [], []
        for number, (action, *values) in enumerate(actions):
            if action == "add":
                name, (prompt, output, hand_off, common) = f"r{number}", values
                added.append(name)
                request = EngineRequest(name, prompt, output, hand_off, hashes(prompt, common, name))
                engine.add(request, now)
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
        self.assertEqual((engine.pool.used, engine.pool.counts()), (0, {}))


if __name__ == "__main__":
    unittest.main()
