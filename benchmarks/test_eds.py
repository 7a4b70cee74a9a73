"""What a change of one instance costs in EDS: it is encoded for all streams, and copied for each."""

from functools import partial
from typing import Any

import pytest
from envoy.service.discovery.v3 import discovery_pb2

from vllm_pd_scheduler.envoy.eds import Subscription, Told
from vllm_pd_scheduler.envoy.load_assignment import LoadAssignment
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, PDInstance

STREAMS = 2
"""An Envoy opens one for each role."""


@pytest.mark.parametrize("count", [100, 1000], ids="{}-instances".format)
def test_change(benchmark: Any, count: int) -> None:
    registry = Registry()
    for number in range(count):
        role = tuple(PD_ROLES)[number % 2]
        host = f"10.0.{number >> 8}.{number & 255}"
        registry.probed(registry.add(PDInstance(f"{role}-{number}", role, host, 8000)), None)
    assignments = {
        role.value: LoadAssignment(role.value, partial(registry.endpoints, role)) for role in InstanceRole
    }
    subscriptions = [Subscription(assignments, Told()) for _ in range(STREAMS)]
    for subscription, role in zip(subscriptions, PD_ROLES, strict=True):
        subscription.asked(discovery_pb2.DiscoveryRequest(resource_names=[role]))
    endpoint = registry.get("decode-1")

    def change() -> int:
        endpoint.drain(not endpoint.draining)
        for assignment in assignments.values():
            assignment.refresh()
        return sum(subscription.response() is not None for subscription in subscriptions)

    change()
    assert benchmark(change) == 1
