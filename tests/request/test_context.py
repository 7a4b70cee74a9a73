"""What a request knows of where its prompt is cached."""

import unittest

from tests.support.fleet import D, P, registry_of
from vllm_pd_scheduler.request.context import RequestContext

BLOCKS = (1, 2, 3)


class CachedTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = registry_of(3, 1)
        self.endpoints = self.registry.endpoints(P)
        self.endpoints[0].holder.store(BLOCKS)
        self.endpoints[1].holder.store(BLOCKS[:1])
        self.request = RequestContext("/", blocks=BLOCKS, block_tokens=100.0, prompt_tokens=400.0)
        self.request.look_up_in(self.registry.prefixes)

    def test_of_all_until_some_are_offered(self) -> None:
        first, second, third = (e.holder for e in self.endpoints)
        self.assertEqual(self.request.cached, {first: 3, second: 1})
        self.request.offer(self.endpoints[1:])
        self.assertEqual(self.request.cached, {second: 1})
        self.assertEqual([self.request.cached_blocks(h) for h in (first, second, third)], [3, 1, 0])
        self.assertEqual(self.request.uncached(first), 100.0)
        self.assertEqual(self.request.uncached(first, 0.5), 250.0)

    def test_it_is_what_it_was_when_it_was_looked_up(self) -> None:
        holder = self.endpoints[0].holder
        self.assertEqual(self.request.cached_blocks(holder), 3)
        holder.clear()
        self.assertEqual(self.request.cached_blocks(holder), 3)
        self.request.look_up_in(self.registry.prefixes)
        self.assertEqual(self.request.cached_blocks(holder), 0)

    def test_what_has_not_changed_is_not_looked_up_again(self) -> None:
        one, other = tuple(self.endpoints[:2]), tuple(self.registry.endpoints(D))
        self.request.offer(one)
        match, known = self.request.match, self.request.cached
        self.request.offer(other)
        self.assertEqual(self.request.cached, {})
        self.request.look_up_in(self.registry.prefixes)
        self.request.offer(one)
        self.assertIs(self.request.match, match)
        self.assertIs(self.request.cached, known)
        self.endpoints[1].holder.store(BLOCKS)
        self.request.look_up_in(self.registry.prefixes)
        self.request.offer(one)
        self.assertEqual(self.request.cached, {e.holder: 3 for e in one})

    def test_nothing_before_a_pick(self) -> None:
        request = RequestContext("/", blocks=BLOCKS)
        self.assertEqual((request.cached, request.cached_blocks(self.endpoints[0].holder)), ({}, 0))


if __name__ == "__main__":
    unittest.main()
