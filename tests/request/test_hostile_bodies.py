"""Bodies that are cheap to send: what reading them costs is in proportion to their bytes, and in steps."""

import tracemalloc
import unittest
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from tests.support.bodies import HARMLESS, REFUSED, SHAPES
from tests.support.connectors import LEGS
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.connectors import Handoff, NixlConnector
from vllm_pd_scheduler.prediction.load_model import FleetLoad
from vllm_pd_scheduler.request import json_text
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.errors import BodyError
from vllm_pd_scheduler.request.json_text import AT_ONCE_BYTES, STEP_BYTES, Steps, T, finish
from vllm_pd_scheduler.request.prompt import MAX_BYTES
from vllm_pd_scheduler.request.reader import RequestReader
from vllm_pd_scheduler.request.stripping import strip_handoff

SIZE = 1 << 19
SMALL = (1000, AT_ONCE_BYTES)
HANDOFF = Handoff(b'{"do_remote_prefill":true}')

nixl = NixlConnector()
reader = RequestReader(SchedulerConfig(), FleetLoad())


def serve(body: bytes) -> Steps[None]:
    """Do all that is done with the body of a request that is split."""
    parsed = yield from JsonBody.read(body)
    context = yield from reader.read("/v1/completions", {}, parsed, 0.0, prefixes=True)
    nixl.can_split(parsed)
    nixl.prefill_body(parsed, LEGS)
    nixl.splice(parsed, HANDOFF)
    assert len(context.blocks) <= MAX_BYTES // 1024


class Work:
    """Counts the bytes that are looked at one by one between two steps."""

    def __init__(self) -> None:
        self.steps = [0]

    def run(self, steps: Steps[T]) -> T:
        split = json_text._between_quotes

        def counted(window: bytes) -> list[bytes]:
            self.steps[-1] += len(window)
            return split(window)

        with patch.object(json_text, "_between_quotes", counted):
            while True:
                try:
                    next(steps)
                except StopIteration as end:
                    result: T = end.value
                    return result
                self.steps.append(0)


def refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except BodyError:
        return True
    return False


class HostileBodiesTest(unittest.TestCase):
    def test_which_are_served(self) -> None:
        for name, shape in SHAPES.items():
            body = shape(SIZE)
            with self.subTest(name):
                self.assertEqual(refused(lambda body=body: finish(serve(body))), name in REFUSED)

    def test_reading_gives_way_at_bounded_work(self) -> None:
        for name, shape in SHAPES.items():
            body = shape(SIZE)
            for make in (serve, strip_handoff):
                with self.subTest(name, make=make.__name__):
                    work = Work()
                    refused(lambda work=work, make=make, body=body: work.run(make(body)))
                    self.assertLess(max(work.steps), 4 * STEP_BYTES)
                    self.assertLess(sum(work.steps), 8 * SIZE, "nothing is read again and again")
                    if name in HARMLESS:
                        self.assertGreater(len(work.steps), SIZE // (2 * STEP_BYTES))

    def test_memory_is_that_of_the_body(self) -> None:
        """At most twice the body's more: one without a client's hand-off, and one for a leg."""
        for name, shape in SHAPES.items():
            body = shape(SIZE)
            for make in (serve, strip_handoff):
                with self.subTest(name, make=make.__name__):
                    tracemalloc.start()
                    refused(lambda make=make, body=body: finish(make(body)))
                    _, peak = tracemalloc.get_traced_memory()
                    tracemalloc.stop()
                    self.assertLess(peak, (2.1 if name == "hand-off" else 1.1) * SIZE + 400_000)

    def test_what_is_kept_of_a_body_is_the_body(self) -> None:
        """A request may wait for long: its body is counted, so what is kept beside it must be little."""
        for size in (*SMALL, SIZE):
            for name, shape in HARMLESS.items():
                body = shape(size)
                tracemalloc.start()
                kept = JsonBody.parse(body)
                held, _ = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                with self.subTest(name, size=size):
                    self.assertLess(held, 20_000 + (size if kept.changed else 0))

    def test_small_bodies_are_read_in_one_step(self) -> None:
        """Unless something in them is unusual: then there are no more steps than their size asks for."""
        for size in SMALL:
            for name, shape in HARMLESS.items():
                body = shape(size)
                steps = list(JsonBody.read(body))
                with self.subTest(name, size=size):
                    if JsonBody.parse(body).walked is None:
                        self.assertEqual(steps, [])
                    else:
                        self.assertLessEqual(len(steps), 4 * size // STEP_BYTES)


if __name__ == "__main__":
    unittest.main()
