"""The command ``advise`` and the route behind it, over a real socket."""

import json
import time
from collections.abc import Iterator

import pytest

from tests.cli.test_operating import call, done, no_variables, refused
from tests.support.admin_thread import AdminThread
from tests.support.traffic import Traffic, have_served
from vllm_pd_scheduler.cli.client import AdminClient, Failure

__all__ = ["no_variables"]


@pytest.fixture
def admin() -> Iterator[AdminThread]:
    with AdminThread() as found:
        yield found


def served(admin: AdminThread) -> None:
    requests = Traffic(4.0, 2000.0, 20.0).requests(300, time.monotonic() - 100.0)
    admin.do(lambda: have_served(admin.router, requests))


def test_what_it_says(admin: AdminThread) -> None:
    served(admin)
    said = done(admin.url, "advise", "--prefill", "2", "--decode", "2")
    assert said.startswith("move one D to P: -"), said
    assert "- 300 requests in " in said
    assert "- 2 P + 2 D: -" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["P", "D", "P90", "TTFT", "s"] in [row[:5] for row in rows]
    assert [row[:2] for row in rows if row[:1] and row[0].isdigit() and len(row) == 8] == [
        ["1", "2"],
        ["2", "2"],
        ["2", "1"],
    ]
    found = json.loads(done(admin.url, "advise", "--json", "--prefill", "2", "--decode", "2"))
    assert found["advice"] == "move"
    assert found["move"] == {"from_role": "decode", "to_role": "prefill", "instances": 1}
    assert found["traffic"]["requests"] == 300
    assert [(each["prefill"], each["decode"]) for each in found["fleets"]] == [(1, 2), (2, 2), (2, 1)]
    assert found["fleets"][0]["ttft_p90_s"] > found["fleets"][1]["ttft_p90_s"]


def test_too_little_traffic_is_said_and_is_a_status(admin: AdminThread) -> None:
    ended = call(admin.url, "advise")
    assert ended.exit_code == 1
    assert ended.stdout.strip() == (
        "what a prefill instance takes is not learned yet (0 of 20 measurements): ask again later"
    )
    assert json.loads(call(admin.url, "advise", "--json").stdout)["advice"] == "unknown"


def test_half_a_fleet_is_none(admin: AdminThread) -> None:
    assert "both --prefill and --decode" in refused(admin.url, "advise", "--prefill", "2", status=2)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"prefill": 2}, "give both"),
        ({"minutes": 0}, "minutes"),
        ({"minutes": "nan"}, "minutes"),
        ({"prefill": 0, "decode": 2}, "prefill"),
        ({"prefill": 9999, "decode": 2}, "prefill"),
        ({"hours": 1}, "unknown key 'hours'"),
    ],
)
def test_nonsense_is_refused(admin: AdminThread, query: dict[str, object], says: str) -> None:
    with pytest.raises(Failure, match=says):
        AdminClient(admin.url).get("/advice", **query)
