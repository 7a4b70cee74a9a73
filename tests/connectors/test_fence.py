"""Whatever a connector does, a request can still be served by decode alone."""

import json
import math
import unittest
from typing import Any
from unittest import mock

from tests.support.connectors import LEGS, PEER
from vllm_pd_scheduler.connectors import (
    Abort,
    Attempt,
    ConnectorFailed,
    ConnectorFence,
    Handoff,
    NixlConnector,
    Order,
    Question,
    Splice,
)
from vllm_pd_scheduler.connectors.fence import CHECKED_BYTES
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.errors import BodyError

BODY = JsonBody.parse(b'{"model":"m","prompt":"x"}')
HANDOFF = Handoff(b"{}", 1, 0)
CALLS: dict[str, tuple[Any, ...]] = {
    "can_split": (BODY,),
    "order": (PEER,),
    "question": (PEER,),
    "understood": (b"{}", PEER),
    "prefill_body": (BODY, LEGS),
    "prefill_headers": (LEGS,),
    "handoff": (b"{}", LEGS),
    "promised": (LEGS,),
    "abort": (LEGS,),
    "ended": (b"{}",),
    "splice": (BODY, HANDOFF),
    "release_body": (HANDOFF, "m"),
}
END = len(BODY.raw) - 1
NO_OBJECTS = [b"{", b"[]", b"5", b'{"a":1,}', b'{"a":1}x', b'{"a":"}', b"not json", b'{"a" 1}']
NO_TAILS = [
    b",",
    b",}",
    b"x}",
    b'"a":1}',
    b',"a":1',
    b',"a":1}}',
    b',"a":1,}',
    b',"a":nope}',
    b",a:1}",
    b"]}",
]
"""What makes no object of ``BODY`` when it takes the place of its last brace."""
NO_QUESTIONS: list[Any] = [
    (0, "/a"),
    (1 << 16, "/a"),
    ("80", "/a"),
    (80, "a"),
    (80, "/a b"),
    (80, "/\r\n"),
    (80, b"/a"),
]
DEFAULTS = {"can_split": False, "abort": None, "release_body": None}
"""What stands for an answer; the other calls raise ``ConnectorFailed``."""


class Custom:
    """Returns what ``answer`` is, or raises it, in place of every call."""

    answer: Any = None

    def __getattr__(self, name: str) -> Any:
        if name not in CALLS:
            raise AttributeError(name)
        return self._answer

    def _answer(self, *_: Any) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class ConnectorFenceTest(unittest.TestCase):
    def setUp(self) -> None:
        self.custom: Any = Custom()
        self.fence = ConnectorFence(self.custom)

    def ask(self, call: str) -> Any:
        return getattr(self.fence, call)(*CALLS[call])

    def assertFails(self, call: str) -> None:
        before = self.fence.failures.counts["Custom", call]
        if call in DEFAULTS:
            self.assertIs(self.ask(call), DEFAULTS[call])
        else:
            with self.assertRaises(ConnectorFailed) as raised:
                self.ask(call)
            self.assertEqual(raised.exception.args, (call,))
        self.assertEqual(self.fence.failures.counts["Custom", call], before + 1)

    def test_whatever_is_raised(self) -> None:
        with self.assertLogs("vllm_pd_scheduler.telemetry.failures", "ERROR") as logged:
            for call in CALLS:
                for self.custom.answer in (ValueError("odd"), RecursionError(), StopIteration()):
                    with self.subTest(call, answer=self.custom.answer):
                        self.assertFails(call)
        self.assertEqual(len(logged.output), len(CALLS), "a line a minute for each call")
        self.assertIn("connector Custom failed in can_split(): ValueError: odd, at ", logged.output[0])

    def test_what_is_no_answer(self) -> None:
        bodies: list[Any] = ["text", b"", 5]
        tokens: list[Any] = [("5",), (-1,), (10**400,), (5, math.nan), (5, math.inf), (5, "0")]
        answers = {
            "question": [5, *(Question(*each) for each in NO_QUESTIONS)],
            "prefill_body": [*bodies, *NO_OBJECTS],
            "release_body": [*bodies, *NO_OBJECTS],
            "prefill_headers": [None, {"A": "x"}, {"a": "\n"}, {"a": 5}, {str(n): "" for n in range(17)}],
            "handoff": [
                b"{}",
                {},
                Handoff(b"{}", lease=0.0),
                Handoff(b"{}", headers={"a": "\r"}),
                *(Handoff(b"{}", release_path=each) for each in ("", "a", "/a b", "/\r\n", b"/a", None)),
                Handoff(b"{}", protocol=5),
                *(Handoff(b"{}", *each) for each in tokens),
            ],
            "promised": [b"{}", Handoff(b"{}", lease=-1.0)],
            "abort": [b"{}", Abort("abort", b"{}"), Abort("/abort", b"")],
            "splice": [
                b"body",
                *(Splice(at, b"}") for at in (-1, 0, 99, None)),
                Splice(1, "}"),
                Splice(1, b"\xff"),
                *(Splice(END, text) for text in NO_TAILS),
                Splice(END - 1, b',"a":1}'),  # within the text before
            ],  # type: ignore[arg-type]
        }
        with self.assertLogs("vllm_pd_scheduler.telemetry.failures", "ERROR"):
            for call, wrong in answers.items():
                for self.custom.answer in wrong:
                    with self.subTest(call, answer=self.custom.answer):
                        self.assertFails(call)

    def test_which_field_it_is_is_said(self) -> None:
        instead = "in place of bytes that are not empty"
        for call, answer, message in (
            ("handoff", Handoff("{}"), f"Handoff.params is str {instead}"),  # type: ignore[arg-type]
            ("handoff", Handoff(b"", token_ids=[1]), f"Handoff.token_ids is list {instead}"),  # type: ignore[arg-type]
            ("splice", Splice(END, "}"), f"Splice.text is str {instead}"),  # type: ignore[arg-type]
            ("splice", Splice(END, b""), f"Splice.text is empty {instead}"),
            ("prefill_body", "{}", f"it returned str {instead}"),
        ):
            self.setUp()
            self.custom.answer = answer
            with (
                self.subTest(message),
                self.assertLogs("vllm_pd_scheduler.telemetry.failures", "ERROR") as logged,
            ):
                self.assertFails(call)
                self.assertIn(f"failed in {call}(): TypeError: {message}", logged.output[0])

    def test_one_of_an_older_protocol(self) -> None:
        """It lacks a call."""
        with (
            mock.patch.dict(CALLS) as calls,
            self.assertLogs("vllm_pd_scheduler.telemetry.failures", "ERROR"),
        ):
            arguments = calls.pop("ended")
            with self.assertRaises(ConnectorFailed):
                self.fence.ended(*arguments)

    def test_what_is_no_exception_passes(self) -> None:
        for self.custom.answer in (KeyboardInterrupt(), SystemExit(1)):
            for call in CALLS:
                with self.subTest(call), self.assertRaises(type(self.custom.answer)):
                    self.ask(call)
        self.assertEqual(self.fence.failures.counts.total(), 0)

    def test_calls_of_those_whose_d_asks_for_the_prefill(self) -> None:
        calls: dict[str, tuple[Any, ...]] = {"invitation": (LEGS, "http://a"), "asked": (b"{}", LEGS)}
        calls["names_rank"] = (LEGS,)
        with mock.patch.dict(CALLS, calls), self.assertLogs("vllm_pd_scheduler.telemetry.failures", "ERROR"):
            for call in calls:
                self.custom.answer = ValueError("odd")
                self.assertFails(call)
            for self.custom.answer in (None, b"{}", Handoff("{}"), Handoff(b"{}", headers=5)):  # type: ignore[arg-type]
                self.assertFails("invitation")
            for self.custom.answer in ("first", None, 5, [Order.DECODE_FIRST]):
                self.assertFails("order")

    def test_whether_it_can_pull_may_fail_too(self) -> None:
        class Odd(NixlConnector):
            @property
            def can_pull(self) -> bool:  # type: ignore[override]
                raise ZeroDivisionError

        with self.assertLogs("vllm_pd_scheduler.telemetry.failures", "ERROR"):
            self.assertFalse(ConnectorFence(Odd()).can_pull)

    def test_one_that_fails_keeps_nobody_from_ending(self) -> None:
        self.custom.answer = ValueError("odd")
        with self.assertLogs("vllm_pd_scheduler.telemetry.failures", "ERROR"):
            self.assertTrue(Attempt(self.fence, LEGS).leaves_something)

    def test_a_hand_off_may_have_no_release(self) -> None:
        self.assertIsNone(self.ask("release_body"))
        self.assertEqual(self.fence.failures.counts.total(), 0)

    def test_one_that_works_is_only_asked(self) -> None:
        nixl = NixlConnector()
        fence = ConnectorFence(nixl)
        handoff = Handoff(b'{"a":1}', 5, 2)
        self.assertTrue(fence.can_split(BODY))
        self.assertEqual(fence.prefill_body(BODY, LEGS), nixl.prefill_body(BODY, LEGS))
        self.assertEqual(fence.splice(BODY, handoff), nixl.splice(BODY, handoff))
        self.assertEqual(fence.release_body(handoff, "m"), nixl.release_body(handoff, "m"))
        self.assertIsNone(fence.handoff(b"{}", LEGS))
        self.assertEqual(set(fence.failures.counts.values()), {0}, "each series exists from the start")

    def test_where_a_splice_may_go(self) -> None:
        for raw, at, text in (
            (b"{}", 1, b'"a":1}'),
            (b" { } ", 2, b'"a":1}'),
            (b'{"x":1}', 6, b',"a":1}'),
            (b'{"x":1} \n', 6, b' , "a" : {"b":[1]} }\n'),
            (b'{"x":1,"y":2}', 6, b',"a":1}'),  # in place of a field
            (b'{"x":"' + b"y" * 40_000 + b'"}', 40_007, b',"a":1}'),  # a body that was read in steps
            (b'{"x":"' + b"y" * 40_000 + b'"}', 40_007, b',"a":[' + b"1," * CHECKED_BYTES + b"1]}"),
        ):
            with self.subTest(raw[:20], at=at):
                body = JsonBody.parse(raw)
                self.custom.answer = Splice(at, text)
                self.assertIs(self.fence.splice(body, HANDOFF), self.custom.answer)
                json.loads(self.custom.answer.into(raw))
        self.custom.answer = Splice(40_007, b"x}")
        with (
            self.assertLogs("vllm_pd_scheduler.telemetry.failures", "ERROR"),
            self.assertRaises(ConnectorFailed),
        ):
            self.fence.splice(body, HANDOFF)

    def test_what_a_client_may_write_is_no_failure(self) -> None:
        """Python's ``json``, and so vLLM, reads more than JSON."""
        nixl = NixlConnector()
        fence = ConnectorFence(nixl)
        for raw in (
            b'{"x":NaN,"prompt":"p"}',
            b'{"x":-Infinity}',
            b'\xef\xbb\xbf{"prompt":"p"}',
            b'{"prompt":"\\ud800"}',
            b'{"\\ud800":1}',
            b'{"a":1,"a":2}',
            b'{"x":"\t"}',
            b'{"x":' + b"[" * 100 + b"]" * 100 + b"}",
            b'{"x":1' + b"0" * 400 + b"}",
        ):
            with self.subTest(raw):
                try:
                    body = JsonBody.parse(raw)
                except BodyError:
                    continue
                self.assertEqual(fence.prefill_body(body, LEGS), nixl.prefill_body(body, LEGS))
                self.assertEqual(fence.splice(body, HANDOFF), nixl.splice(body, HANDOFF))


if __name__ == "__main__":
    unittest.main()
