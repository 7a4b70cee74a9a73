"""Depth of JSON text: as a parser counts it, whatever stands in strings."""

import json
import random
import time
import unittest
from typing import Any

from vllm_pd_scheduler.request.json_depth import nested_deeper


def depth(value: Any) -> int:
    """An independent count."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


def document(chance: random.Random, levels: int) -> Any:
    """A document with brackets, quotes and backslashes in its strings."""
    kind = chance.randrange(4) if levels else 0
    if kind < 2:
        return "".join(chance.choices('[]{}"\\\n/aé', k=chance.randrange(6)))
    size = chance.randrange(4)
    if kind == 2:
        return [document(chance, levels - 1) for _ in range(size)]
    return {document(chance, 0): document(chance, levels - 1) for _ in range(size)}


class NestedDeeperTest(unittest.TestCase):
    def test_it_is_the_depth_that_a_parser_finds(self) -> None:
        chance = random.Random(7)
        for _ in range(3000):
            made = document(chance, 8)
            text = json.dumps(made, ensure_ascii=chance.random() < 0.5, indent=chance.choice((None, 1)))
            for levels in (0, 1, 4):
                for limit in (depth(made) - 1, depth(made), depth(made) + 1):
                    if limit >= 0:
                        self.assertEqual(
                            nested_deeper(text.encode(), limit, levels), depth(made) > limit, (text, limit)
                        )

    def test_chunks(self) -> None:
        """Strings and depth go on from one chunk to the next."""
        for pad in range(65_500, 65_560):
            filler = "x" * pad
            for inner, limit in ((f'["{filler}[[[[]]]", [[]]]', 3), (f'["{filler}\\"[[[[", "]", [[]]]', 3)):
                self.assertFalse(nested_deeper(inner.encode(), limit, 0))
                self.assertTrue(nested_deeper(inner.encode(), limit - 1, 0))

    def test_what_is_no_json_is_no_error(self) -> None:
        chance = random.Random(8)
        for _ in range(3000):
            text = bytes(chance.choices(b'[]{}"\\,:1 \xff\x00', k=chance.randrange(60)))
            nested_deeper(text, chance.randrange(6), chance.randrange(5))

    def test_hostile_text_takes_linear_time(self) -> None:
        """A megabyte of each; what is quadratic would take minutes."""
        start = time.monotonic()
        for pattern in (b"[", b"[]", b'["[",]', b'"', b'{"a":', b"[],", b'"",'):
            text = b"[" + pattern * (1 << 20)
            nested_deeper(text, 200)
            nested_deeper(text + b"]", 10**9)
        self.assertLess(time.monotonic() - start, 10)


if __name__ == "__main__":
    unittest.main()
