"""Depth of JSON text: as a parser counts it, whatever stands in strings."""

import json
import random
import unittest
from typing import Any, Self
from unittest import mock

from vllm_pd_scheduler.request import json_depth
from vllm_pd_scheduler.request.json_depth import nested_deeper

HOSTILE = [
    (b"[", pattern, end)
    for pattern in (b"[", b"[]", b'["[",]', b'"', b'{"a":', b"[],", b'"",', b'"[],', b"\\")
    for end in (b"", b"]")
] + [(b"[" * 150, b"[],", b"1" + b"]" * 150), (b'{"a":{"a":{"a":[', b'"[",[],', b"1]}}}")]
"""How text begins, what is repeated in it, and how it ends."""


class Counted(bytes):
    """Counts the bytes that its methods look at."""

    read = 0

    @classmethod
    def looked_at(cls, number: int) -> None:
        cls.read += number

    def count(self, *args: Any) -> int:
        self.looked_at(len(self))
        return super().count(*args)

    def find(self, sub: Any, start: Any = 0, *end: Any) -> int:
        found = super().find(sub, start, *end)
        self.looked_at((len(self) if found < 0 else found + 1) - start)
        return found

    def replace(self, *args: Any) -> Self:
        self.looked_at(len(self))
        return type(self)(super().replace(*args))

    def split(self, *args: Any) -> list[bytes]:
        self.looked_at(len(self))
        return super().split(*args)

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if not isinstance(found, bytes):
            return found
        self.looked_at(len(found))
        return type(self)(found)


def bytes_read(text: bytes, limit: int) -> int:
    """Return how many bytes are looked at to say whether a text is nested deeper than ``limit``."""
    split = json_depth._split

    def counted(text: bytes) -> Any:
        Counted.looked_at(len(text))
        return split(text)

    Counted.read = 0
    with (
        mock.patch.object(json_depth, "bytes", Counted, create=True),
        mock.patch.object(json_depth, "_split", counted),
    ):
        nested_deeper(Counted(text), limit)
    return Counted.read


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

    def test_each_byte_of_hostile_text_is_read_a_few_times(self) -> None:
        """However long the text is: what is quadratic would read a byte as often as there are others."""
        for start, pattern, end in HOSTILE:
            for size, limit in (
                (1 << 12, 200),
                (1 << 12, 10**9),
                (1 << 16, 200),
                (1 << 16, 10**9),
                (1 << 21, 200),
            ):
                text = start + pattern * (size // len(pattern)) + end
                times = bytes_read(text, limit) / len(text)
                self.assertTrue(0.9 < times < 20, (start, pattern, end, size, limit, times))


if __name__ == "__main__":
    unittest.main()
