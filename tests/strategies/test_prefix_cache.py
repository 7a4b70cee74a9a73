import unittest

from tests.support.strategies import build, ids
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.strategies.prefix_cache import _MAX_EXTRA_REQUESTS, _MIN_CACHED_SHARE, PrefixCache

BLOCKS = tuple(range(1, 11))
HALF = int(_MIN_CACHED_SHARE * len(BLOCKS))


class PrefixCacheTest(unittest.TestCase):
    def rank(self, *endpoints: tuple[int, int], blocks: tuple[int, ...] = BLOCKS) -> list[str]:
        """Rank endpoints that have (cached blocks, requests)."""
        registry, built = build(*({"running": float(requests)} for _, requests in endpoints))
        for endpoint, (cached, _) in zip(built, endpoints, strict=True):
            endpoint.holder.store(BLOCKS[:cached])
        request = RequestContext("/", blocks=blocks)
        request.look_up_in(registry.prefixes)
        return ids(PrefixCache(SchedulerConfig()).rank(built, request, len(built)))

    def test_cases(self) -> None:
        for what, endpoints, best in (
            ("the longest prefix", [(HALF, 0), (HALF + 1, 0), (0, 0)], "d1"),
            ("worth as many more requests", [(0, 0), (10, _MAX_EXTRA_REQUESTS)], "d1"),
            ("but no more than that", [(0, 0), (10, _MAX_EXTRA_REQUESTS + 1)], "d0"),
            ("less than its share counts for nothing", [(HALF - 1, 1), (0, 0)], "d1"),
            ("of equal prefixes the fewest requests", [(10, 2), (10, 1)], "d1"),
            ("without any, the fewest requests", [(0, 3), (0, 2), (0, 4)], "d1"),
        ):
            with self.subTest(what):
                self.assertEqual(self.rank(*endpoints)[0], best)

    def test_all_in_order(self) -> None:
        self.assertEqual(
            self.rank((0, 0), (10, 9), (HALF, 1), (10, 2), (0, 1)), ["d3", "d2", "d0", "d4", "d1"]
        )

    def test_a_prompt_without_blocks(self) -> None:
        self.assertEqual(self.rank((10, 1), (0, 0), blocks=()), ["d1", "d0"])


if __name__ == "__main__":
    unittest.main()
