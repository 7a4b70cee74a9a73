"""The section ``kv_events``: what is wrong with it is told by ``check`` already."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from vllm_pd_scheduler.config import ConfigError, parse_config


def _config(section: dict[str, Any], **of_prefill: Any) -> dict[str, Any]:
    return {
        "prefill_instances": [{"id": "p", "host": "10.0.0.1", "port": 8000, **of_prefill}],
        "decode_instances": [{"id": "d", "host": "10.0.0.2", "port": 8000, "kv_events_port": 7000}],
        "kv_events": section,
    }


def test_without_its_package_the_section_cannot_be_used() -> None:
    with (
        mock.patch("vllm_pd_scheduler.config.kv_events.find_spec", return_value=None),
        pytest.raises(ConfigError) as raised,
    ):
        parse_config(_config({}))
    (problem,) = raised.value.problems
    assert problem.startswith("kv_events: pyzmq is not installed: ")


@pytest.mark.parametrize(
    ("section", "of_prefill", "says"),
    [
        ({"port": 5557, "replay_port": 5557}, {}, "port 5557, and so has their replay 5557"),
        ({"replay_port": 6000}, {"kv_events_port": 6000}, "port 6000, and so has"),
        (
            {"port": 5557, "replay_port": 5558},
            {"data_parallel_size": 4},
            "port 5557 and the 3 after it, one for each rank, and so has their replay 5558: give ports that "
            "are 4 apart at least",
        ),
    ],
)
def test_engines_cannot_repeat_at_the_port_where_they_publish(
    section: dict[str, Any], of_prefill: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(_config(section, **of_prefill))
    (problem,) = raised.value.problems
    assert problem.startswith("prefill_instances[0]: its KV events have ")
    assert says in problem


def test_ports_that_fit() -> None:
    parse_config(_config({"port": 5557, "replay_port": 5558}))
    parse_config(_config({"port": 5557, "replay_port": 5657}, data_parallel_size=8))
