"""The list of a large fleet holds up nobody: it is written in steps."""

import asyncio
import json
import unittest

from aiohttp.test_utils import make_mocked_request

from vllm_pd_scheduler.admin.changes import AdminChanges
from vllm_pd_scheduler.admin.instances_api import InstancesApi
from vllm_pd_scheduler.admin.turning import Turning
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.router import PDRouter


class ManyInstancesTest(unittest.IsolatedAsyncioTestCase):
    async def test_others_are_served_meanwhile(self) -> None:
        fleet = [{"id": f"d{number}", "host": "10.0.0.1", "port": 8000 + number} for number in range(300)]
        router = PDRouter(SchedulerConfig.model_validate({"decode_instances": fleet}))
        changes = AdminChanges(router)
        api = InstancesApi(router, changes, lambda: True, Turning(router, changes, lambda: True, None))
        (route,) = (each for each in api.routes() if (each.method, each.path) == ("GET", "/instances"))
        answer = asyncio.ensure_future(route.checked()(make_mocked_request("GET", "/instances?role=decode")))
        turns = 0
        while not answer.done():
            turns += 1
            await asyncio.sleep(0)
        self.assertGreater(turns, 5)
        text = answer.result().text  # type: ignore[attr-defined]
        found = [each["id"] for each in json.loads(text)["instances"]]
        self.assertEqual(found, [each["id"] for each in fleet])


if __name__ == "__main__":
    unittest.main()
