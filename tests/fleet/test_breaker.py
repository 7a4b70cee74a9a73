from unittest import TestCase

from vllm_pd_scheduler.fleet.breaker import Breaker, BreakerPolicy, BreakerState

POLICY = BreakerPolicy(failures=3, success_rate=0.5, window=10, pause=1.0)


class BreakerTest(TestCase):
    def setUp(self) -> None:
        self.breaker = Breaker(POLICY)

    def failed(self, times: int) -> list[bool]:
        return [self.breaker.failed() for _ in range(times)]

    def test_failures_in_a_row(self) -> None:
        self.assertEqual(self.failed(2), [False, False])
        self.breaker.succeeded()
        self.assertEqual(self.failed(3), [False, False, True])

    def test_success_rate(self) -> None:
        """Never three in a row, but more than half of the last ten."""
        results = [True, False, False] * 3 + [True, False]
        ejected = [not self.breaker.succeeded() if ok else self.breaker.failed() for ok in results]
        verdicts = [verdict for ok, verdict in zip(results, ejected, strict=True) if not ok]
        self.assertEqual(verdicts, [False] * 6 + [True])

    def test_it_returns_by_way_of_a_trial(self) -> None:
        self.failed(3)
        self.breaker.open(now=10.0)
        self.assertFalse(self.breaker.probed(now=10.9), "the pause is not over")
        self.assertTrue(self.breaker.probed(now=11.0))
        self.assertIs(self.breaker.state, BreakerState.HALF_OPEN)
        self.assertTrue(self.breaker.succeeded())
        self.assertIs(self.breaker.state, BreakerState.CLOSED)
        self.assertEqual(self.failed(2), [False, False], "and starts anew")

    def test_the_pause_doubles_while_trials_fail(self) -> None:
        now = 0.0
        self.breaker.open(now)
        pauses = []
        for _ in range(8):
            pauses.append(self.breaker.not_before - now)
            now = self.breaker.not_before
            self.assertTrue(self.breaker.probed(now))
            self.assertEqual(self.failed(1), [True], "one failure is enough in a trial")
            self.breaker.open(now)
        self.assertEqual(pauses, [1, 2, 4, 8, 16, 30, 30, 30])

    def test_failures_of_requests_that_were_under_way_change_nothing(self) -> None:
        self.breaker.open(now=0.0)
        self.assertEqual(self.failed(5), [False] * 5)
        self.assertEqual(self.breaker.not_before, 1.0)

    def test_a_success_does_not_end_the_pause_but_the_trial(self) -> None:
        self.breaker.open(now=0.0)
        self.assertFalse(self.breaker.succeeded())
        self.assertIs(self.breaker.state, BreakerState.OPEN)
        self.breaker.probed(now=1.0)
        self.assertTrue(self.breaker.succeeded())
        self.assertIs(self.breaker.state, BreakerState.CLOSED)

    def test_a_restarted_instance_has_a_clean_slate(self) -> None:
        self.breaker.open(now=0.0)
        self.breaker.restarted()
        self.assertIs(self.breaker.state, BreakerState.CLOSED)
        self.assertEqual(self.failed(2), [False, False])
