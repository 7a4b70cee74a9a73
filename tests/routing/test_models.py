"""Requests go to instances that serve their model, with both legs and with every retry."""

from collections.abc import Mapping
from typing import Any

from tests.support.routing import BODY, ERROR, Case, answer

LORA = {**BODY, "model": "lora"}


class ModelsTest(Case):
    CONFIG: Mapping[str, Any] = {"max_retries": 3}

    def setUp(self) -> None:
        super().setUp()
        for endpoint in self.router.registry:
            self.serves(endpoint.id, "m")

    def serves(self, name: str, *models: str) -> None:
        registry = self.router.registry
        registry.serves(registry.get(name), frozenset(models))

    async def test_both_legs(self) -> None:
        self.serves("p2", "m", "lora")
        self.serves("d1", "m", "lora")
        for _ in range(6):
            forward = await self.route(LORA)
            self.assertEqual(forward.prefill.id, "p2")
            self.assertEqual([e.id for e in forward.decode], ["d1"], "Envoy tries no other")
            forward.release()
        served = set()
        for _ in range(6):
            forward = await self.route()
            served |= {forward.prefill.id, *(e.id for e in forward.decode)}
            forward.release()
        self.assertEqual(served, {"p0", "p1", "p2", "d0", "d1", "d2"})

    async def test_a_request_that_names_none_is_not_split_where_models_differ(self) -> None:
        """It would be one model's for P, and perhaps another one's for D."""
        unnamed = [
            {**BODY, "model": ""},
            {**BODY, "model": None},
            {k: v for k, v in BODY.items() if k != "model"},
        ]
        for name in ("p2", "d1"):
            self.serves(name, "other")
            for body in unnamed:
                forward = await self.route(body)
                self.assertIsNone(forward.prefill)
                forward.release()
            self.serves(name, "m")
            for body in unnamed:
                forward = await self.route(body)
                self.assertIsNotNone(forward.prefill)
                forward.release()

    async def test_a_p_that_fails_is_not_replaced_by_one_without_the_model(self) -> None:
        for name in ("p0", "p2", "d0", "d1", "d2"):
            self.serves(name, "m", "lora")
        self.fail_all(answer(500, ERROR))
        forward = await self.route(LORA)
        self.assertIsNone(forward.prefill)
        self.assertEqual(sorted(self.leg.tried), ["p0", "p2"])

    async def test_requests_that_are_not_split(self) -> None:
        self.serves("d2", "m", "lora")
        for _ in range(4):
            forward = await self.route({**LORA, "n": 2})
            self.assertEqual([e.id for e in forward.decode], ["d2"])
            forward.release()

    async def test_the_only_d_of_a_model_is_away(self) -> None:
        self.serves("d2", "lora")
        self.router.drain_instance("d2")
        error = self.assertRejected(await self.route(LORA), 503, "no_decode")
        self.assertEqual(error["message"], "No decode instance can serve this request now: d2 is draining.")
        self.assertEqual(self.leg.sent, [], "no P is troubled")

    async def test_the_only_d_of_a_model_is_ejected(self) -> None:
        """One that fails now and then is better than none."""
        self.serves("d2", "lora")
        for _ in range(3):
            self.router.registry.failed(self.router.registry.get("d2"), "reset", 0.0)
        self.assertTrue(self.router.registry.get("d2").ejected)
        forward = await self.route(LORA)
        self.assertEqual([e.id for e in forward.decode], ["d2"])
