"""A hand-off that is too old by its own protocol's lease goes to no D."""

import json
from collections.abc import Mapping
from typing import Any

from tests.routing.test_questions import Ask
from tests.support.routing import PARAMS, Case, answer, decode_body

TEXT = {"choices": [{"finish_reason": "length"}]}
LATE = {"nixl": 24.0, "mooncake": 384.0, "ascend-mooncake": 384.0}
"""Seconds after which each is too old: 80 % of the lease."""


class LateHandoffTest(Case):
    CONNECTOR = staticmethod(lambda: None)  # type: ignore[assignment]

    async def served(self, connector: str, after: float) -> Any:
        """Return where a request goes that is held up for so long when P has answered."""
        self.CONFIG: Mapping[str, Any] = {"connector": connector}
        self.setUp()
        self.router.ask_prefill = Ask()
        self.fail_all(answer(body=json.dumps({**TEXT, "kv_transfer_params": PARAMS}).encode()))
        stage = self.router._core.prefill
        run = stage.run

        async def slow(*args: Any) -> Any:
            outcome = await run(*args)
            self.ahead += after
            return outcome

        stage.run = slow  # type: ignore[method-assign]
        return await self.route()

    async def test_each(self) -> None:
        for connector, limit in LATE.items():
            with self.subTest(connector):
                forward = await self.served(connector, limit - 10)
                self.assertIn("kv_transfer_params", decode_body(forward))
                forward = await self.served(connector, limit + 1)
                self.assertLocal(forward)
                self.assertEqual(self.router.decisions.after(0)[-1].not_split, "late")
                unused = {"prefill": "p0", "outcome": "late"}
                self.assertEqual(self.count("pd_scheduler_handoffs_unused_total", **unused), 1)
