"""Which models an instance serves: what it answers, and who serves others than its peers."""

import json
import logging
import unittest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.health.monitor import MODELS_S
from vllm_pd_scheduler.health.served_models import NotAListOfModels, odd_ones, parse_models
from vllm_pd_scheduler.models import InstanceRole, PDInstance

from .instances import Fixture, raw_answer

P, D = InstanceRole.PREFILL, InstanceRole.DECODE
VLLM = {
    "object": "list",
    "data": [
        {"id": "base", "object": "model", "created": 1, "owned_by": "vllm", "root": "/m", "parent": None},
        {
            "id": "adapter-1",
            "object": "model",
            "root": "/lora",
            "parent": "base",
            "permission": [{"id": "x"}],
        },
    ],
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "data", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)


class ParseTest(unittest.TestCase):
    def test_the_base_model_and_its_adapters(self) -> None:
        found = parse_models(json.dumps(VLLM).encode())
        self.assertEqual((found.names, found.adapters), ({"base", "adapter-1"}, {"adapter-1"}))
        self.assertEqual([json.loads(card) for card in found.cards.values()], VLLM["data"])
        self.assertEqual(parse_models(b'{"data": []}').names, frozenset())

    def test_what_is_none(self) -> None:
        for body in (
            b"",
            b"null",
            b"[]",
            b"{}",
            b"<html>",
            b"\xff\xfe{",
            b'{"data": null}',
            b'{"data": {"id": "a"}}',
            b'{"data": [null]}',
            b'{"data": [{}]}',
            b'{"data": [{"id": null}]}',
            b'{"data": [{"id": ""}]}',
            b'{"data": [{"id": 7}]}',
            b'{"data": [{"id": "\\ud800"}]}',
            b'{"data": [{"id": "%s"}]}' % (b"x" * 2000),
            b'{"data": [%s]}' % b",".join([b'{"id": "a"}'] * 5000),
            b'{"data": ' + b"[" * 100_000,
        ):
            with self.subTest(body[:40]), self.assertRaises(NotAListOfModels):
                parse_models(body)

    @given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
    @settings(derandomize=True, deadline=None, max_examples=300)
    def test_junk_is_names_or_refused(self, body: bytes) -> None:
        try:
            found = parse_models(body)
        except NotAListOfModels:
            return
        self.assertTrue(all(isinstance(name, str) and name for name in found.names))
        self.assertLessEqual(found.adapters, found.names)
        self.assertEqual(found.cards.keys(), found.names)
        for card in found.cards.values():
            json.loads(card)


class OddOnesTest(unittest.TestCase):
    def odd(self, *fleet: str | None, role: InstanceRole = D) -> dict[str, str]:
        """Models of each instance, separated by spaces; ``None``: not known."""
        registry = Registry()
        for number, models in enumerate(fleet):
            endpoint = registry.add(PDInstance(f"i{number}", role, f"10.0.0.{number}", 80))
            registry.models.listed(endpoint, None if models is None else frozenset(models.split()))
        return {endpoint.id: text for endpoint, text in odd_ones(registry)}

    def test_each(self) -> None:
        for fleet, expected in (
            ((), {}),
            (("a",), {}),
            (("a", "a", None), {}),
            (("a", "b", "a"), {"i1": "lacks 'a' and has 'b'"}),
            (("b", "a", "a"), {"i0": "lacks 'a' and has 'b'"}),
            (("a l1", "a l1", "a"), {"i2": "lacks 'l1'"}),
            (("a", "a", "a l2 l1"), {"i2": "has 'l1', 'l2'"}),
            (("a", "b"), {"i1": "lacks 'a' and has 'b'"}),
            (("a", "", "a"), {"i1": "lacks 'a'"}),
        ):
            with self.subTest(fleet):
                self.assertEqual(self.odd(*fleet), expected)
                self.assertEqual(self.odd(*fleet, role=P), expected)

    def test_roles_are_not_compared(self) -> None:
        registry = Registry()
        for role, models in ((P, {"a"}), (D, {"a", "adapter"})):
            endpoint = registry.add(PDInstance(role.value, role, "10.0.0.1", 80))
            registry.models.listed(endpoint, frozenset(models))
        self.assertEqual(list(odd_ones(registry)), [])

    def test_long_lists_are_cut(self) -> None:
        many = " ".join(f"m{number:03}" for number in range(500))
        text = self.odd("a", "a", f"a {many}")["i2"]
        self.assertLess(len(text), 200)
        self.assertTrue(text.endswith("and 492 more"), text)


class TestProbes:
    async def test_they_are_asked_for_with_the_key(self, fleet: Fixture) -> None:
        server = await fleet.serve(None)
        endpoint = fleet.add("d0", "127.0.0.1", server.port, api_key="sk-1")
        monitor = fleet.monitor()
        assert endpoint.models.names is None
        for models in (["a"], ["a", "adapter"], ["b"]):
            server.models = models
            await monitor.check(endpoint)
            assert endpoint.models.names == frozenset(models)
            fleet.now += MODELS_S
        assert server.authorization == ["Bearer sk-1"] * 3

    async def test_at_every_third_probe_and_after_15_s(self, fleet: Fixture) -> None:
        """They seldom change, and each request has its cost."""
        server = await fleet.serve()
        server.page = server.page.replace("running 3", "running 0")  # else its engine would stand still
        for interval, every in ((1.0, 3), (5.0, 3), (10.0, 2), (60.0, 1)):
            monitor = fleet.monitor(interval)
            fleet.registry.models.listed(fleet["d0"], None)
            asked = []
            for number in range(9):
                before = len(server.authorization)
                await monitor.check(fleet["d0"])
                asked += [number] if len(server.authorization) > before else []
                fleet.now += interval
            assert asked == list(range(0, 9, every)), interval

    async def test_one_that_was_down_may_be_another_one(self, fleet: Fixture) -> None:
        server = await fleet.serve()
        monitor = fleet.monitor()
        await monitor.check(fleet["d0"])
        fleet.registry.probed(fleet["d0"], "down")
        server.models = ["other"]
        await monitor.check(fleet["d0"])
        assert fleet["d0"].models.names == {"other"}

    async def test_an_instance_that_has_no_list(
        self, fleet: Fixture, caplog: pytest.LogCaptureFixture
    ) -> None:
        (await fleet.serve()).models = None
        await fleet.monitor().check(fleet["d0"])
        assert fleet["d0"].models.names is None
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    @pytest.mark.parametrize("status", [b"401 Unauthorized", b"500 Oops", b"302 Found"])
    async def test_one_that_does_not_say(
        self, fleet: Fixture, caplog: pytest.LogCaptureFixture, status: bytes
    ) -> None:
        await fleet.serve_raw("d0", {"/health": raw_answer(), "/v1/models": raw_answer(status=status)})
        monitor = fleet.monitor()
        for _ in range(3):
            await monitor.check(fleet["d0"])
        said = [record.message for record in caplog.records if "which models" in record.message]
        assert said == [f"d0: which models it serves is not known: /v1/models answers {status[:3].decode()}"]

    async def test_what_was_said_long_ago_is_forgotten(self, fleet: Fixture) -> None:
        server = await fleet.serve()
        monitor = fleet.monitor()
        await monitor.check(fleet["d0"])
        server.models = None
        fleet.now += 29.0
        await monitor.check(fleet["d0"])
        assert fleet["d0"].models.names == {"tiny"}
        fleet.now += 2.0
        await monitor.check(fleet["d0"])
        assert fleet["d0"].models.names is None

    async def test_of_a_restarted_one_they_are_not_known(self, fleet: Fixture) -> None:
        server = await fleet.serve()
        monitor, page = fleet.monitor(), server.page
        for start, models in ((1, ["a"]), (2, ["b"]), (3, None)):
            server.page, server.models = f"{page}process_start_time_seconds {start}\n", models
            await monitor.check(fleet["d0"])
            assert fleet["d0"].models.names is None or start == 1
            await monitor.check(fleet["d0"])
            assert fleet["d0"].models.names == (None if models is None else frozenset(models))

    async def test_who_differs_is_said_once_for_each_change(
        self, fleet: Fixture, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "vllm_pd_scheduler")
        servers = [await fleet.serve(f"d{number}") for number in range(3)]
        monitor = fleet.monitor()
        for models in (["tiny"], ["other"], ["other"], ["other", "more"], ["tiny"], ["tiny"]):
            servers[1].models = models
            await monitor.check_all()
            fleet.now += MODELS_S
        said = [
            (record.levelname, record.message) for record in caplog.records if "the models" in record.message
        ]
        differs = "d1 does not serve the models of most decode instances: it "
        assert said == [
            ("WARNING", differs + "lacks 'tiny' and has 'other'"),
            ("WARNING", differs + "lacks 'tiny' and has 'more', 'other'"),
            ("INFO", "d1 serves the models of its role again"),
        ]


if __name__ == "__main__":
    unittest.main()
