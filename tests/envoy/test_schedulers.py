"""The configuration of an Envoy with several schedulers: whom it asks, and whom it tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import yaml

from tests.support.envoy_config import accepted_by_envoy, cluster, every
from tests.support.processes import unused_ports
from vllm_pd_scheduler.envoy.configuration import config_path, render_config
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.envoy.schedulers import SchedulerAddress

WORKERS = (SchedulerAddress("/run/pd/w0", "w0"), SchedulerAddress("/run/pd/w1", "w1"))
FAR = (
    SchedulerAddress("10.0.0.1:9002", "a", 2),
    SchedulerAddress("[fd00::1]:9002", "b", 2),
    SchedulerAddress("scheduler-0.pd:9002", "0c", 7),
)


def rendered(schedulers: Sequence[SchedulerAddress]) -> dict[str, Any]:
    return render_config(EnvoyPorts(), schedulers=schedulers)


def script(config: dict[str, Any]) -> str:
    (text,) = every("inline_string", cluster(config, "decode"))
    assert isinstance(text, str)
    return text


def loggers(config: dict[str, Any], log: str) -> list[dict[str, Any]]:
    """The loggers of a log, of attempts and of requests."""
    lists = [each for key in ("upstream_log", "access_log") for each in every(key, config)]
    grpc = [each for found in lists for each in found if "common_config" in each["typed_config"]]
    return [each for each in grpc if each["typed_config"]["common_config"]["log_name"] == log]


def told(logger: dict[str, Any]) -> str:
    (name,) = every("cluster_name", logger)
    return str(name)


def test_one_without_a_name_is_the_file_that_ships() -> None:
    shipped = yaml.safe_load(config_path().read_text(encoding="utf-8"))
    assert rendered(()) == rendered([SchedulerAddress("127.0.0.1:9002")]) == shipped
    socket = render_config(EnvoyPorts(grpc_socket="/run/pd.sock"))
    assert rendered([SchedulerAddress("/run/pd.sock")]) == socket
    assert list(every("path", cluster(socket, "xds"))) == ["/run/pd.sock"]


def test_all_are_asked_in_turn_and_each_is_a_cluster_of_its_own() -> None:
    config = rendered(WORKERS)
    for name in ("scheduler", "xds"):
        found = cluster(config, name)
        assert list(every("path", found)) == ["/run/pd/w0", "/run/pd/w1"]
        assert found["health_checks"], "one that is dead is left out"
    assert list(every("priority", cluster(config, "scheduler"))) == []
    assert list(every("priority", cluster(config, "xds"))) == [1], "one tells all endpoints"
    for each in WORKERS:
        found = cluster(config, each.cluster)
        assert list(every("path", found)) == [each.address]
        assert "health_checks" not in found, "one that drains is told all the same"
        assert found["load_assignment"]["cluster_name"] == each.cluster


def test_the_nearest_are_asked_first() -> None:
    found = cluster(rendered(FAR), "scheduler")
    near, far = found["load_assignment"]["endpoints"]
    assert list(every("address", [each["endpoint"] for each in near["lb_endpoints"]]))[1::2] == [
        "10.0.0.1",
        "fd00::1",
    ]
    assert (near.get("priority", 0), far["priority"]) == (0, 1), "Envoy takes them without gaps"
    # One healthy host of two is all that a priority needs.
    assert found["load_assignment"]["policy"]["overprovisioning_factor"] == 200
    assert found["type"] == "STRICT_DNS"
    assert cluster(rendered(FAR), "scheduler_a")["type"] == "STATIC"


def test_each_is_told_of_its_own_and_of_nobodys() -> None:
    config = rendered(WORKERS)
    results = loggers(config, "results")
    assert [(told(each), list(every("prefix", each))) for each in results] == [
        ("scheduler_w0", ["w0."]),
        ("scheduler_w1", ["w1."]),
    ]
    shipped = [each["filter"] for each in loggers(rendered(()), "reports")]
    reports = loggers(config, "reports")
    assert [told(each) for each in reports] == ["scheduler_w0", "scheduler_w1"] * 2
    for index, each in enumerate(reports):
        concerns, before = each["filter"]["and_filter"]["filters"]
        assert before == shipped[index // 2], "what is reported is the same"
        own, nobodys = (one["header_filter"]["header"] for one in concerns["or_filter"]["filters"])
        assert own == {"name": "x-pd-id", "string_match": {"prefix": f"w{index % 2}."}}
        assert nobodys == {"name": "x-pd-id", "present_match": True, "invert_match": True}


def test_the_script_asks_the_one_that_has_the_request() -> None:
    table = '{["w0"] = "scheduler_w0", ["w1"] = "scheduler_w1"}'
    assert f"local SCHEDULERS = {table}" in script(rendered(WORKERS))
    assert "local SCHEDULERS = {}" in script(rendered([SchedulerAddress("a:1"), SchedulerAddress("b:1")]))
    assert 'httpCall("scheduler' not in script(rendered(())), "each call asks whose the id is"


def test_some_without_names_are_told_by_turns() -> None:
    config = rendered([SchedulerAddress("10.0.0.1:1"), SchedulerAddress("10.0.0.2:1")])
    assert {told(each) for log in ("reports", "results") for each in loggers(config, log)} == {"xds"}


@pytest.mark.parametrize(
    ("schedulers", "said"),
    [
        ([SchedulerAddress("a:1", "x"), SchedulerAddress("b:1", "x")], "2 schedulers have the name x"),
        ([SchedulerAddress("a:1", "x"), SchedulerAddress("a:1", "y")], "have the address a:1"),
        ([SchedulerAddress("a:1", "x"), SchedulerAddress("b:1")], "at b:1 has no name"),
        ([SchedulerAddress("a:1", "W.0")], "no name of a scheduler"),
        ([SchedulerAddress("a:1", "x", -1)], "0 or more"),
        ([SchedulerAddress("a")], "neither host:port nor"),
        ([SchedulerAddress("a:66000")], "neither host:port nor"),
        ([SchedulerAddress("run/pd.sock")], "neither host:port nor"),
    ],
)
def test_what_cannot_be_is_refused(schedulers: list[SchedulerAddress], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rendered(schedulers)


@pytest.mark.parametrize("schedulers", [WORKERS, (*FAR[:2], SchedulerAddress("localhost:9002", "0c", 7))])
async def test_envoy_takes_them(schedulers: Sequence[SchedulerAddress]) -> None:
    await accepted_by_envoy(render_config(EnvoyPorts(*unused_ports(4), "127.0.0.1"), schedulers=schedulers))
