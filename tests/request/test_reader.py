"""What is read of a request: sizes, lengths, and what its headers ask for."""

import json
import unittest
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.prediction.load_model import BYTES_PER_TOKEN, OUTPUT_TOKENS, FleetLoad
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.request.json_text import finish
from vllm_pd_scheduler.request.objectives import MAX_PRIORITY
from vllm_pd_scheduler.request.prompt import BLOCK_BYTES
from vllm_pd_scheduler.request.reader import HeaderError, RequestReader

TEXT = "word " * 800


class RequestReaderTest(unittest.TestCase):
    def setUp(self) -> None:
        self.fleet = FleetLoad()
        self.reader = RequestReader(SchedulerConfig(ttft_slo=3.0, session_header="x-chat"), self.fleet)

    def read(
        self, headers: dict[str, str] | None = None, prefixes: bool = True, **fields: Any
    ) -> RequestContext:
        body = JsonBody.parse(json.dumps({"model": "m", "prompt": TEXT, **fields}).encode())
        return finish(self.reader.read("/v1/completions", headers or {}, body, 5.0, prefixes=prefixes))

    def test_prompt(self) -> None:
        for prefixes in (True, False):
            with self.subTest(prefixes=prefixes):
                request = self.read(prefixes=prefixes)
                self.assertEqual((request.model, request.arrived, request.now), ("m", 5.0, 5.0))
                self.assertAlmostEqual(request.prompt_tokens, 4000 / BYTES_PER_TOKEN, delta=1)
                self.assertAlmostEqual(request.prompt_bytes, 4000, delta=2)
                self.assertEqual(len(request.blocks), 4000 // BLOCK_BYTES if prefixes else 0)

    def test_lengths_are_learned(self) -> None:
        self.fleet.learn_bytes("m", 4000, 2000)
        request = self.read()
        self.assertEqual((request.prompt_tokens, request.block_tokens), (2000.0, BLOCK_BYTES / 2))
        self.assertEqual(self.read(model="other").prompt_tokens, 4000 / BYTES_PER_TOKEN)

    def test_token_ids_are_counted(self) -> None:
        request = self.read(prompt=list(range(10000, 11000)))
        self.assertEqual((request.prompt_tokens, request.prompt_bytes), (1000, 0))
        self.assertAlmostEqual(request.block_tokens * len(request.blocks), 1000, delta=200)

    def test_a_chat(self) -> None:
        body = JsonBody.parse(json.dumps({"messages": [{"role": "user", "content": TEXT}]}).encode())
        for prefixes in (True, False):
            request = finish(self.reader.read("/v1/chat/completions", {}, body, 0.0, prefixes=prefixes))
            self.assertAlmostEqual(request.prompt_tokens, 4000 / BYTES_PER_TOKEN, delta=20)

    def test_what_is_malformed_has_no_prompt(self) -> None:
        for prompt in (5, {}, None, [{}]):
            with self.subTest(prompt):
                request = self.read(prompt=prompt)
                self.assertEqual(request.blocks, ())
                self.assertLess(request.prompt_tokens, 2)

    def test_answers(self) -> None:
        for fields, expected in (
            ({}, OUTPUT_TOKENS),
            ({"max_tokens": 10}, 10),
            ({"max_tokens": 10, "max_completion_tokens": 20}, 10),
            ({"max_tokens": 10, "max_completion_tokens": 20, "messages": []}, 20),
            ({"max_tokens": 10**9}, OUTPUT_TOKENS),
            ({"max_tokens": 0}, OUTPUT_TOKENS),
            ({"max_tokens": -1}, OUTPUT_TOKENS),
            ({"max_tokens": True}, OUTPUT_TOKENS),
            ({"max_tokens": "10"}, OUTPUT_TOKENS),
        ):
            with self.subTest(fields):
                self.assertEqual(self.read(**fields).output_tokens, expected)
        for _ in range(3):  # none is believed at once if it is far off what was expected
            self.fleet.learn_output(2000.0, 100.0)
        self.assertLess(self.read().output_tokens, 25.0)

    def test_sessions(self) -> None:
        for headers, fields, expected in (
            ({}, {}, None),
            ({"x-chat": "h"}, {"user": "u"}, "h"),
            ({"x-session-id": "h"}, {}, None),
            ({}, {"user": "u", "prompt_cache_key": "k"}, "k"),
            ({}, {"user": "u", "prompt_cache_key": 5}, "u"),
            ({}, {"user": ["u"]}, None),
            ({"x-chat": "x" * 1000}, {}, "x" * 256),
        ):
            with self.subTest(headers=headers, fields=fields):
                self.assertEqual(self.read(headers, **fields).session, expected)

    def test_headers(self) -> None:
        request = self.read(
            {
                "x-pd-priority": "-7",
                "x-pd-tenant": "t" * 300,
                "x-pd-ttft-slo-ms": "250",
                "x-pd-tpot-slo-ms": "1",
            }
        )
        self.assertEqual((request.priority, request.tenant), (-7, "t" * 256))
        self.assertEqual((request.ttft_slo, request.tpot_slo), (0.25, 0.001))
        request = self.read()
        self.assertEqual((request.priority, request.tenant), (0, ""))
        self.assertEqual((request.ttft_slo, request.tpot_slo), (3.0, None))

    def test_headers_that_are_wrong(self) -> None:
        for name, values in (
            ("x-pd-priority", ("", "high", "1.5", str(MAX_PRIORITY + 1), str(-MAX_PRIORITY - 1), "9" * 5000)),
            ("x-pd-priority", ("1_0", " 5 ", "5\n", "+5", "--5", "-", "\u0665", "\uff15", "²")),
            ("x-pd-ttft-slo-ms", ("", "0", "-1", "1.5", "fast", "²", "1" * 11)),
            ("x-pd-tpot-slo-ms", ("0", "1s")),
        ):
            for value in values:
                with self.subTest(name, value=value[:20]), self.assertRaisesRegex(HeaderError, name):
                    self.read({name: value})

    def test_llmds_headers(self) -> None:
        """As it names them now, and has named them before."""
        self.reader.objectives.update("cluster", {"batch": -5, "chat": 7})
        for now, before in ((True, False), (False, True), (True, True)):
            headers = {}
            if before:
                headers |= {
                    "x-gateway-inference-objective": "batch" if not now else "nobody's",
                    "x-gateway-inference-fairness-id": "t" if not now else "another",
                    "x-slo-ttft-ms": "250.5" if not now else "1",
                    "x-slo-tpot-ms": "20" if not now else "1",
                }
            if now:
                headers |= {
                    "x-llm-d-inference-objective": "batch",
                    "x-llm-d-inference-fairness-id": "t",
                    "x-llm-d-slo-ttft-ms": "250.5",
                    "x-llm-d-slo-tpot-ms": "20",
                }
            request = self.read(headers)
            self.assertEqual((request.priority, request.tenant), (-5, "t"))
            self.assertEqual((request.ttft_slo, request.tpot_slo), (0.2505, 0.02))

    def test_our_own_headers_come_first(self) -> None:
        self.reader.objectives.update("cluster", {"batch": -5})
        request = self.read(
            {
                "x-llm-d-inference-objective": "batch",
                "x-pd-priority": "0",
                "x-llm-d-inference-fairness-id": "theirs",
                "x-pd-tenant": "ours",
                "x-llm-d-slo-ttft-ms": "1",
                "x-pd-ttft-slo-ms": "2",
            }
        )
        self.assertEqual((request.priority, request.tenant, request.ttft_slo), (0, "ours", 0.002))

    def test_what_llmd_could_not_read_asks_for_nothing(self) -> None:
        for text in ("", "0", "0.0", "fast", "-1", "1e9", "nan", "inf", "²", "1" * 11, " 5"):
            request = self.read({"x-llm-d-slo-ttft-ms": text, "x-llm-d-inference-objective": text})
            self.assertEqual((request.ttft_slo, request.priority), (3.0, 0), text)

    @given(text=st.text(max_size=30), name=st.sampled_from(["priority", "ttft-slo-ms", "tpot-slo-ms"]))
    @settings(derandomize=True, deadline=None, max_examples=300)
    def test_any_header_is_understood_or_refused(self, text: str, name: str) -> None:
        try:
            request = RequestReader(SchedulerConfig(), FleetLoad()).passed(
                "/", {f"x-pd-{name}": text}, b"", False, 0.0
            )
        except HeaderError:
            return
        self.assertLessEqual(abs(request.priority), MAX_PRIORITY)
        for slo in (request.ttft_slo, request.tpot_slo):
            self.assertTrue(slo is None or 0.001 <= slo < 1e7)


if __name__ == "__main__":
    unittest.main()
