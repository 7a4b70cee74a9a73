"""The fleet's traffic as a trace for ``replay``."""

import json
import math
import random
import tempfile
import unittest
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.records.recording import BLOCK_TOKENS, MAX_LINES, Recording, hash_ids
from vllm_pd_scheduler.replay.trace import read_trace
from vllm_pd_scheduler.request.context import RequestContext


def context(tokens: float, blocks: tuple[int, ...] = (), size: float = 256.0, **more: Any) -> RequestContext:
    return RequestContext("/v1/completions", prompt_tokens=tokens, blocks=blocks, block_tokens=size, **more)


class HashIdsTest(unittest.TestCase):
    def test_an_id_is_that_of_the_block_that_ends_there(self) -> None:
        self.assertEqual(hash_ids(context(1100.0, (1, 2, 3, 4)), 1100), [2, 4])
        self.assertEqual(hash_ids(context(1100.0, (1, 2, 3), 400.0), 1100), [2, 3])
        self.assertEqual(hash_ids(context(500.0, (1, 2)), 500), [])

    def test_behind_the_last_block_nothing_is_shared(self) -> None:
        first = hash_ids(context(1100.0, (1, 2, 3), fingerprint=7), 1100)
        second = hash_ids(context(1100.0, (1, 2, 3), fingerprint=8), 1100)
        self.assertEqual((first[0], second[0]), (2, 2))
        self.assertNotEqual(first[1], second[1])
        self.assertEqual(len(hash_ids(context(1100.0, (), 0.0), 1100)), 2)

    @given(
        st.lists(st.integers(0, 3), max_size=40),
        st.lists(st.integers(0, 3), max_size=40),
        st.floats(50, 2000),
    )
    def test_ids_are_shared_no_further_than_the_prompts(
        self, first: list[int], second: list[int], size: float
    ) -> None:
        def chained(blocks: list[int]) -> tuple[int, ...]:
            return tuple(hash((tuple(blocks[: end + 1]), 1)) & (1 << 60) - 1 for end in range(len(blocks)))

        shared = 0
        while shared < min(len(first), len(second)) and first[shared] == second[shared]:
            shared += 1
        found = [
            hash_ids(
                context(len(each) * size, chained(each), size, fingerprint=number), int(len(each) * size)
            )
            for number, each in enumerate((first, second), 1)
        ]
        alike = sum(a == b for a, b in zip(*found, strict=False))
        self.assertLessEqual(alike * BLOCK_TOKENS, shared * size + 1e-6)
        self.assertGreaterEqual((alike + 1) * BLOCK_TOKENS, math.floor(shared * size) - size)


class RecordingTest(unittest.TestCase):
    def setUp(self) -> None:
        self.recording = Recording(lambda: 50.0, lambda: 1000.0, lambda: 100.0)
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1

    def record(self, bytes_: int = 20_000, **more: Any) -> None:
        begun = self.recording.begin(context(1100.0, (1, 2, 3, 4), arrived=49.0, **more))
        self.recording.answered(begun, bytes_)

    def lines(self, after: int = 0) -> list[dict[str, Any]]:
        found = self.recording.after(after, 10_000)
        assert found is not None
        return [json.loads(line) for line in found]

    def test_no_line_is_made_while_nobody_reads(self) -> None:
        early = self.recording.begin(context(10.0))
        end = self.recording.subscribe(self.wake)
        begun = self.recording.begin(context(10.0))
        self.recording.answered(early, 10)
        end()
        self.recording.answered(begun, 10)
        self.assertEqual((self.recording.readers, self.recording.newest, self.woken), (0, 0, 0))

    def test_a_line(self) -> None:
        self.recording.subscribe(self.wake)
        self.record(stream=True)
        (line,) = self.lines()
        self.assertEqual((line["timestamp"], line["input_length"], line["hash_ids"]), (999_000, 1100, [2, 4]))
        self.assertEqual(self.woken, 1)

    def test_the_mean_answer_has_the_mean_tokens(self) -> None:
        self.recording.subscribe(self.wake)
        chance = random.Random(1)
        for _ in range(1000):
            self.record(chance.randint(1000, 90_000), stream=True)
            self.record(chance.randint(100, 900))
        lengths = [line["output_length"] for line in self.lines(200)]
        self.assertAlmostEqual(sum(lengths) / len(lengths), 100, delta=10)

    def test_an_answer_has_a_token_at_least(self) -> None:
        self.recording.subscribe(self.wake)
        self.record(0)
        self.assertEqual(self.lines()[0]["output_length"], 1)

    def test_whoever_reads_too_slowly_is_told(self) -> None:
        self.recording.subscribe(self.wake)
        for _ in range(MAX_LINES + 1):
            self.record()
        self.assertIsNone(self.recording.after(0, 1))
        self.assertEqual(len(self.lines(1)), MAX_LINES)
        self.assertEqual(self.recording.after(MAX_LINES + 1, 10), [])

    def test_replay_reads_it(self) -> None:
        self.recording.subscribe(self.wake)
        self.record()
        self.record(stream=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.jsonl"
            file.write_bytes(b"\n".join(self.recording.after(0, 10) or []))
            trace = read_trace(file)
        self.assertEqual([each.prompt_tokens for each in trace.requests], [1100, 1100])
        self.assertEqual(trace.requests[0].blocks, trace.requests[1].blocks)
