"""What is said of instances that get nothing, although each is right by itself."""

from typing import Any

import pytest

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.models import ConnectorChoice, InstanceRole, PDInstance
from vllm_pd_scheduler.scheduler.misfits import misfits

P, D, E = InstanceRole
NIXL, MOONCAKE = ConnectorChoice("nixl"), ConnectorChoice("mooncake")


def instance(name: str, role: InstanceRole, **more: Any) -> PDInstance:
    return PDInstance(name, role, "10.0.0.1", 80, **more)


@pytest.mark.parametrize(
    ("settings", "instances"),
    [
        ({}, []),
        ({}, [instance("p", P), instance("d", D), instance("e", E, connector=ConnectorChoice("ec-nixl"))]),
        ({}, [instance("p", P, connector=NIXL), instance("d", D)]),
        ({}, [instance("p", P, connector=NIXL)]),
        ({"connector": "mooncake"}, [instance("p", P, connector=MOONCAKE), instance("d", D)]),
        ({}, [instance("p", P), instance("d", D), instance("new", D, revision="v2")]),
        (
            {"revisions": {"v1": 1, "v2": 0, "": 0}},
            [instance("p", P, revision="v1"), instance("d", D, revision="v1"), instance("p2", P)],
        ),
        ({"revisions": {"v1": 1}}, []),
    ],
)
def test_nothing_of_what_is_right(settings: dict[str, Any], instances: list[PDInstance]) -> None:
    assert misfits(SchedulerConfig(**settings), instances) == []


def test_p_and_d_of_different_connectors() -> None:
    found = misfits(
        SchedulerConfig(), [instance("p0", P), instance("p1", P), instance("d", D, connector=MOONCAKE)]
    )
    assert found == [
        "p0, p1 can hand over to no decode instance, so nothing is prefilled there: "
        "P is of the connector auto or nixl, D of the connector mooncake; they must be of the same"
    ]


def test_p_and_d_of_different_revisions() -> None:
    (found,) = misfits(SchedulerConfig(), [instance("p0", P, revision="v1"), instance("d", D, revision="v2")])
    assert found.startswith("p0 can hand over to no decode instance")
    assert "nixl and the revision 'v1', D of the connector auto or nixl and the revision 'v2'" in found


def test_weights_of_nobody() -> None:
    both = [instance("p", P), instance("d", D)]
    (found,) = misfits(SchedulerConfig(revisions={"v1": 9, "v2": 1}), both)
    assert found.startswith(
        "no decode instance has a revision to which revisions gives a weight ('v1', 'v2')"
    )
    assert found.endswith("so clients get 503: they have ''. One without a revision has the empty name")
    assert misfits(SchedulerConfig(revisions={"": 9, "v2": 1, "v3": 0}), both) == [
        "no instance has the revision 'v2', which has a weight: its share goes to the others"
    ]


def test_weights_that_only_p_have() -> None:
    fleet = [instance("p", P, revision="v1"), instance("d", D, revision="v3")]
    (found,) = misfits(SchedulerConfig(revisions={"v1": 1}), fleet)
    assert "clients get 503: they have 'v3'" in found
