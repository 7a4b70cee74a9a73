"""What one instance says that is not so: how much it draws or repels, and for how long."""

import unittest
from collections import Counter

from tests.support.fleet import D, prompt, registry_of
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.health.vllm_metrics import NotVllmMetrics, Scrape, parse_metrics, snapshot
from vllm_pd_scheduler.scheduler import Scheduler
from vllm_pd_scheduler.strategies import strategy_names


def sane(number: int) -> dict[str, float]:
    """What an honest instance says the n-th time: its steps take the longer, the more it runs."""
    running = 4.0 + 3.0 * number % 9
    return {
        "running": running,
        "waiting": 0.0,
        "kv": running / 50,
        "blocks": 4096.0,
        "step": 0.01 + 1e-3 * running,
    }


LIES: list[dict[str, object]] = [
    {"running": 1e200},
    {"running": 999_999.0, "waiting": 999_999.0, "kv": 1.0},
    {"running": 999_999.0, "kv": 1.0, "blocks": 5e8},
    {"running": -5.0},
    {"running": "NaN"},
    {"kv": 1e9},
    {"blocks": 1.0},
    {"blocks": "9" * 15},
    {"step": 1e9},
    {"step": 1e-9},
    {"step": 1e300},
    {"generated": 1e14},
]


class Fleet:
    """Instances that are scraped every five seconds, each with ``/metrics`` as told."""

    def __init__(self, strategy: str, size: int = 4) -> None:
        self.registry = registry_of(1, size)
        self.scheduler = Scheduler(SchedulerConfig(strategy=strategy), self.registry, seed=1)
        self.endpoints = self.registry.endpoints(D)
        self.now, self.tokens, self.scrapes = 0.0, 0.0, 0
        self.seconds = dict.fromkeys(self.endpoints, 0.0)
        self.before: dict[Endpoint, Scrape] = {}

    def scrape(self, lie: dict[str, object] | None = None) -> None:
        """Scrape all; the first of them lies, if a lie is given."""
        self.now += 5.0
        self.tokens += 2000.0
        self.scrapes += 1
        for endpoint in self.endpoints:
            said: dict[str, object] = sane(self.scrapes) | (
                lie if lie and endpoint is self.endpoints[0] else {}
            )
            seconds = self.seconds[endpoint] + 2000.0 * float(str(said["step"]))
            if lie is None or "step" not in lie:
                self.seconds[endpoint] = seconds
            page = f"""\
vllm:num_requests_running {said["running"]}
vllm:num_requests_waiting {said["waiting"]}
vllm:kv_cache_usage_perc {said["kv"]}
vllm:cache_config_info{{block_size="32",num_gpu_blocks="{str(said["blocks"]).removesuffix(".0")}"}} 1
vllm:inter_token_latency_seconds_sum {seconds}
vllm:inter_token_latency_seconds_count {self.tokens}
vllm:request_time_per_output_token_seconds_sum {seconds}
vllm:request_time_per_output_token_seconds_count {self.tokens / 100}
vllm:generation_tokens_total {said.get("generated", self.tokens)}
vllm:request_success_total {self.tokens / 100}
"""
            try:
                found = parse_metrics(page)
            except NotVllmMetrics:
                continue
            last = self.before.get(endpoint)
            self.before[endpoint] = found
            taken = snapshot(found, last, endpoint.metrics, D, self.now)
            self.registry.scraped(endpoint, taken, endpoint.in_flight, endpoint.tokens)

    def share_of_the_first(self, picks: int = 40) -> float:
        """Of so many requests that come at once, how many parts go to the first."""
        held = []
        for _ in range(picks):
            (picked,) = self.scheduler.pick(D, prompt(now=self.now))
            held.append(self.registry.work.reserve(picked, prompt(now=self.now)))
        tally = Counter(reservation.endpoint for reservation in held)
        for reservation in held:
            reservation.release(self.now)
        return tally[self.endpoints[0]] / picks


class LiesTest(unittest.TestCase):
    def test_sane_scrapes_after_a_lie_make_good_for_it(self) -> None:
        """As many as were needed to learn what is so."""
        for strategy in set(strategy_names()) - {"session", "prefix_cache"}:
            for lie in LIES:
                for first in (False, True):
                    with self.subTest(strategy, lie=lie, first=first):
                        fleet = Fleet(strategy)
                        for _ in range(0 if first else 20):
                            fleet.scrape()
                        fleet.scrape(lie)
                        for _ in range(20):
                            fleet.scrape()
                        share = fleet.share_of_the_first()
                        self.assertTrue(0.1 <= share <= 0.4, share)

    def test_a_lie_draws_no_load_while_it_is_told(self) -> None:
        for strategy in ("least_load", "weighted", "predicted_latency", "slo"):
            for lie in LIES:
                with self.subTest(strategy, lie=lie):
                    fleet = Fleet(strategy)
                    for _ in range(20):
                        fleet.scrape()
                    fleet.scrape(lie)
                    self.assertLessEqual(fleet.share_of_the_first(), 0.5)


if __name__ == "__main__":
    unittest.main()
