"""A scheduler over three P and three D, for the tests of its picks."""

import unittest
from typing import Any

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.scheduler import Scheduler

REQUEST = RequestContext("/v1/completions")
P, D = InstanceRole.PREFILL, InstanceRole.DECODE


class SchedulerCase(unittest.TestCase):
    """Has a fleet that can serve, and a scheduler that takes its instances in turn."""

    def setUp(self) -> None:
        self.registry = Registry()
        for number in range(3):
            for role in PD_ROLES:
                name = f"{role[0]}{number}"
                endpoint = self.registry.add(PDInstance(name, role, f"10.0.0.{number}", 80))
                self.registry.probed(endpoint, None)
        self.scheduler = Scheduler(SchedulerConfig(strategy="round_robin"), self.registry)

    def pick(self, role: InstanceRole = D, **more: Any) -> list[str]:
        """Return the ids of what the scheduler picks for ``REQUEST``."""
        return [endpoint.id for endpoint in self.scheduler.pick(role, REQUEST, **more)]
