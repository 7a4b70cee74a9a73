"""What operators' code raises is counted, and logged once a minute."""

import unittest

from vllm_pd_scheduler.strategies.least_load import LeastLoad
from vllm_pd_scheduler.telemetry.failures import Failures, described
from vllm_pd_scheduler.telemetry.pace import LOG_INTERVAL_S


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Code:
    def outer(self) -> None:
        self.inner()

    def inner(self) -> None:
        int("not a number")

    def imported(self) -> None:
        LeastLoad.score(LeastLoad.__new__(LeastLoad), None, None)  # type: ignore[arg-type]


def raised(method: str) -> Exception:
    try:
        getattr(Code(), method)()
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


class FailuresTest(unittest.TestCase):
    def setUp(self) -> None:
        self.now = 0.0
        self.failures = Failures("strategy %s failed for %s", "Another serves", lambda: self.now)

    def test_all_are_counted_and_a_line_a_minute_is_logged(self) -> None:
        with self.assertLogs("vllm_pd_scheduler.telemetry.failures", "ERROR") as logged:
            for self.now in (0.0, 1.0, LOG_INTERVAL_S - 1, LOG_INTERVAL_S, LOG_INTERVAL_S + 1):
                self.failures.add("mine", "prefill", Code(), ValueError("odd"))
            self.failures.add("mine", "decode", Code(), ValueError("odd"))
        self.assertEqual(self.failures.counts, {("mine", "prefill"): 5, ("mine", "decode"): 1})
        self.assertEqual(len(logged.output), 3, "each pair of labels has its own minute")
        self.assertIn(
            "strategy mine failed for prefill: ValueError: odd. Another serves (4 so far",
            logged.output[1],
        )

    def test_series_exist_from_the_start(self) -> None:
        self.failures.expect("mine", "prefill")
        self.assertEqual(dict(self.failures.counts), {("mine", "prefill"): 0})

    def test_the_last_line_in_the_codes_own_module_is_named(self) -> None:
        for method, place in (("outer", "in inner"), ("imported", "in imported")):
            text = described(raised(method), Code())
            self.assertRegex(text, rf"^\w+Error: .*, at .*test_failures\.py:\d+ {place}$")

    def test_whatever_the_error_it_is_one_short_line(self) -> None:
        for error in (Unprintable(), ValueError("two\nlines"), ValueError("x" * 5000), RecursionError()):
            text = described(error, Code())
            self.assertIn(type(error).__name__, text)
            self.assertNotIn("\n", text)
            self.assertLess(len(text), 250)
