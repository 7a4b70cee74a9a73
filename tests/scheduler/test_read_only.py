"""What a strategy or a connector is given cannot be changed by setting an attribute, by mistake or not."""

import itertools
import unittest
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, ClassVar

from tests.support.connectors import LEGS
from tests.support.fleet import D, P, prompt, scheduler_of
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.connectors import ConnectorFence, Legs, NixlConnector
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.models import MetricsSnapshot
from vllm_pd_scheduler.prediction.load_model import FleetLoad
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.request.reader import RequestReader
from vllm_pd_scheduler.strategies import Strategy

LOG = "vllm_pd_scheduler.telemetry.failures"
OURS = "vllm_pd_scheduler."


def attributes(of: object) -> Iterator[tuple[object, str]]:
    """Yield each public attribute, no method, of an object and of those of ours that hang on it."""
    for name in dir(of):
        if name.startswith("_"):
            continue
        value = getattr(of, name)
        if not callable(value):
            yield of, name
            if type(value).__module__.startswith(OURS) and not isinstance(value, (str, int, Enum)):
                yield from attributes(value)


class Writes(Strategy):
    """Does ``act`` with the first endpoint and the request, then ranks by the base class."""

    act: ClassVar[Callable[[Endpoint, RequestContext], None]]

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        type(self).act(endpoints[0], request)
        return list(endpoints[:count])


NAME = f"{__name__}:Writes"


class StrategyTest(unittest.TestCase):
    def test_no_attribute_of_an_endpoint_or_a_request(self) -> None:
        for role in (P, D):
            scheduler = scheduler_of(strategy=NAME)
            endpoint, request = scheduler.registry.endpoints(role)[0], prompt()
            scheduler.registry.scraped(endpoint, MetricsSnapshot(0.0, 1.0, kv_capacity=1e5), 0)
            written = [name for _, name in (*attributes(endpoint), *attributes(request))]
            for expected in ("healthy", "in_flight", "tokens", "state", "queued", "running", "base", "now"):
                self.assertIn(expected, written)
            for number, name in enumerate(written):
                with self.subTest(name):
                    Writes.act = staticmethod(self.setter(number))
                    with self.assertLogs(LOG, "ERROR") if number == 0 else self.subTest():
                        self.assertEqual(len(scheduler.pick(role, request)), 1)
                    self.assertEqual(scheduler.strategies.failures.counts[NAME, role.value], number + 1)

    @staticmethod
    def setter(number: int) -> Callable[[Endpoint, RequestContext], None]:
        def act(endpoint: Endpoint, request: RequestContext) -> None:
            found = itertools.chain(attributes(endpoint), attributes(request))
            of, name = next(itertools.islice(found, number, None))
            setattr(of, name, getattr(of, name))

        return act

    def test_no_new_attribute_and_none_less(self) -> None:
        endpoint = scheduler_of().registry.endpoints(P)[0]
        for of in (endpoint, endpoint.prefill, endpoint.decode, prompt()):
            with self.assertRaises((AttributeError, TypeError)):
                of.new = 1  # type: ignore[union-attr]
            with self.assertRaises(AttributeError):
                delattr(of, next(name for _, name in attributes(of)))


class HeadersTest(unittest.TestCase):
    def test_they_are_not_those_that_p_gets(self) -> None:
        headers = {"authorization": "Bearer secret"}
        request = RequestReader(SchedulerConfig(), FleetLoad()).passed("/", headers, b"", False, 0.0)
        with self.assertRaises(TypeError):
            request.headers["authorization"] = "other"  # type: ignore[index]


class Scribbles(NixlConnector):
    act: ClassVar[Callable[[JsonBody], Any]]

    def prefill_body(self, body: JsonBody, legs: Legs) -> bytes:
        type(self).act(body)
        return super().prefill_body(body, legs)


class ConnectorTest(unittest.TestCase):
    def test_no_attribute_of_a_body(self) -> None:
        long = b'{"model": "m", "prompt": "' + b"x" * 40_000 + b'"}'
        for raw in (b'{"model": "m", "prompt": "x"}', long):
            body = JsonBody.parse(raw)
            names = [name for name in dir(body) if not name.startswith("_")]
            acts: list[Callable[[JsonBody], Any]] = [
                lambda body, name=name: setattr(body, name, None) for name in names
            ]
            acts += [
                lambda body, name=name: setattr(body.fields, name, None)
                for name in body.fields.__struct_fields__
            ]
            if body.walked is not None:
                acts.append(lambda body: body.walked.values.pop("prompt"))
            connector = ConnectorFence(Scribbles())
            with self.assertLogs(LOG, "ERROR"):
                for number, act in enumerate(acts, 1):
                    Scribbles.act = staticmethod(act)
                    with self.assertRaises(Exception):  # noqa: B017
                        connector.prefill_body(body, LEGS)
                    self.assertEqual(connector.failures.counts["Scribbles", "prefill_body"], number)
            self.assertEqual((body.raw, body.get("model")), (raw, "m"))


if __name__ == "__main__":
    unittest.main()
