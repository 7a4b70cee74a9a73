"""The shadow is compared with what the live strategy itself chose, once, and with nothing else."""

import json
from collections.abc import Mapping
from typing import Any

from tests.support.routing import BODY, ERROR, PARAMS, Case, D, P, answer
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.routing.attempts import FailedAttempt, Failure

PROMPT = {**BODY, "prompt": "many words " * 2000}


class ShadowCase(Case):
    CONFIG: Mapping[str, Any] = {
        "strategy": "round_robin",
        "shadow_strategy": "predicted_latency",
        "max_retries": 2,
    }

    def compared(self, role: InstanceRole) -> int:
        shadow = self.router.scheduler.strategies.shadow
        assert shadow is not None
        tally = shadow.tallies[role]
        self.assertEqual(tally.failed, 0)
        return tally.agreed + tally.differed

    def live(self, role: InstanceRole) -> list[str]:
        """Whom the live strategy chose where the shadow chose another."""
        shadow = self.router.scheduler.strategies.shadow
        assert shadow is not None
        return [each.live for each in shadow.differences if each.role is role]


class RetriesTest(ShadowCase):
    async def test_a_split_request(self) -> None:
        first = [(await self.route()).decode[0].id for _ in range(6)]
        self.assertEqual((self.compared(P), self.compared(D)), (6, 6))
        self.assertEqual(first, ["d0", "d1", "d2"] * 2)
        self.assertLessEqual(set(self.live(D)), set(first))

    async def test_whom_envoy_tries_next_is_not_the_strategys_first_choice(self) -> None:
        forward = await self.route()
        before = self.compared(D), self.live(D)
        for endpoint in forward.decode[:2]:
            self.router.in_flight.attempt_failed(
                FailedAttempt(str(endpoint.address), Failure.CONNECT, forward.id)
            )
        self.assertIs(forward.answering, forward.decode[2])
        self.assertEqual((self.compared(D), self.live(D)), before)

    async def test_a_further_p_is_a_choice_of_its_own(self) -> None:
        self.leg.answers = {"p0": answer(500, ERROR)}
        await self.route()
        self.assertEqual(len(self.leg.tried), 2)
        self.assertEqual(self.compared(P), 2)

    async def test_a_request_for_decode_alone(self) -> None:
        for number in range(1, 5):
            forward = await self.route({**PROMPT, "n": 2})
            self.assertEqual((self.compared(P), self.compared(D)), (0, number))
            self.assertEqual(forward.decode[0].id, f"d{(number - 1) % 3}")
            forward.release()


class DisaggregationTest(ShadowCase):
    CONFIG: Mapping[str, Any] = {**ShadowCase.CONFIG, "disaggregation": "auto"}

    async def test_what_another_rule_has_chosen(self) -> None:
        """The D that has the prompt cached is not the strategy's choice."""
        registry = self.router.registry
        self.fail_all(answer(body=json.dumps({"kv_transfer_params": PARAMS}).encode()))  # nothing is learned
        for endpoint in registry.endpoints(D) * 3:  # so that none is cheaper without the cache
            registry.work.reserve(endpoint)
        forward = await self.route(PROMPT)
        self.assertEqual((forward.prefill.id, forward.decode[0].id), ("p0", "d0"))
        self.assertEqual(self.compared(D), 1)
        forward.release()
        forward.decode[0].holder.clear()
        registry.get("d2").holder.store(list(forward.prefill.holder._blocks))
        forward = await self.route(PROMPT)
        self.assertEqual((forward.prefill, forward.decode[0].id), (None, "d2"))
        self.assertEqual(self.compared(D), 1)


class ConfiguredTest(ShadowCase):
    CONFIG: Mapping[str, Any] = {**ShadowCase.CONFIG, "disaggregation": "never"}

    async def test_it_is_the_strategys_choice_all_the_same(self) -> None:
        for number in range(1, 5):
            forward = await self.route()
            self.assertEqual(forward.decode[0].id, f"d{(number - 1) % 3}")
            self.assertEqual((self.compared(P), self.compared(D)), (0, number))
