"""What is counted by revision, for whoever judges a canary."""

import unittest
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.support.routing import Case
from vllm_pd_scheduler.routing.result import Result
from vllm_pd_scheduler.telemetry import Ending


class RevisionsTest(Case):
    CONFIG: Mapping[str, Any] = {"revisions": {"blue": 3, "green": 1}}

    def setUp(self) -> None:
        super().setUp()
        for endpoint in self.router.registry:
            revision = "green" if endpoint.id.endswith("0") else "blue"
            self.router.unregister_instance(endpoint.id)
            self.router.register_instance(replace(endpoint.instance, revision=revision))
            self.router.registry.probed(self.router.registry.get(endpoint.id), None)

    async def test_requests_answers_and_first_tokens(self) -> None:
        for number in range(8):
            forward = await self.route({"model": "m", "prompt": f"Hi {number}", "stream": True})
            failed = number % 2 == 0
            ending, status = (Ending.ERROR, 500) if failed else (Ending.OK, 200)
            result = Result(forward.id, ending, status, 2.0, 0.5, 0.1, str(forward.decode[0].address))
            self.router.in_flight.told(result)
            forward.release()
        for revision, count in (("blue", 6), ("green", 2)):
            of = {"revision": revision}
            self.assertEqual(self.count("pd_scheduler_revision_requests_total", **of), count)
            responses = "pd_scheduler_revision_responses_total"
            ended = [self.count(responses, **of, outcome=ending) for ending in ("ok", "error")]
            self.assertEqual(sum(ended), count)
            first = self.count("pd_scheduler_revision_time_to_first_token_seconds_count", **of)
            self.assertEqual(first, ended[0])

    async def test_weights_of_revisions_that_nobody_has(self) -> None:
        for name in ("d0", "d1", "d2"):
            instance = self.router.registry.get(name).instance
            self.router.unregister_instance(name)
            self.router.register_instance(replace(instance, revision="red"))
        error = self.assertRejected(await self.route(), 503, "no_decode")
        self.assertIn("none that has the model is of a revision with a weight", error["message"])

    async def test_one_that_has_gone_is_forgotten(self) -> None:
        for _ in range(4):
            (await self.route()).release()
        self.router.unregister_instance("p0")
        self.assertEqual(self.count("pd_scheduler_revision_requests_total", revision="green"), 1)
        self.router.unregister_instance("d0")
        self.assertEqual(self.count("pd_scheduler_revision_requests_total", revision="green"), 0)
        self.assertEqual(self.count("pd_scheduler_revision_requests_total", revision="blue"), 3)


if __name__ == "__main__":
    unittest.main()
