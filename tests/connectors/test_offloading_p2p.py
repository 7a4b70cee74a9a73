"""The P2P tier of vLLM's OffloadingConnector: bodies of both legs, and from where P pulls."""

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.support.connectors import attempt
from vllm_pd_scheduler.connectors import (
    Attempt,
    Legs,
    OffloadingP2pConnector,
    Order,
    Peer,
    Question,
    UnknownConnector,
    settings_of,
)
from vllm_pd_scheduler.models import ConnectorChoice
from vllm_pd_scheduler.request.body import JsonBody

offloading = OffloadingP2pConnector()
TEXT: dict[str, Any] = {"model": "m", "prompt": "x"}


def peer(name: str, host: str, **settings: Any) -> Peer:
    choice = ConnectorChoice("offloading-p2p", tuple(sorted(settings.items())))
    return Peer(name, host, 8000, settings_of(choice))


LEGS = Legs("run-7", peer("p0", "10.0.0.1"))
RANKED = Legs("run-7", peer("p0", "10.0.0.1", p2p_port=7777, data_parallel_rank=3, lease=90))


def answer(reason: str = "length") -> bytes:
    choice = {"index": 0, "text": " a", "finish_reason": reason}
    usage = {"prompt_tokens": 283, "prompt_tokens_details": {"cached_tokens": 16}}
    return json.dumps({"choices": [choice], "usage": usage, "kv_transfer_params": None}).encode()


def prefill(legs: Legs) -> Any:
    sent = {**TEXT, "max_tokens": 9, "min_tokens": 3, "stream": True, "stop": ["x"]}
    return json.loads(offloading.prefill_body(JsonBody.parse(json.dumps(sent).encode()), legs))


def test_prefill_goes_first() -> None:
    assert offloading.order(LEGS.prefill) is Order.PREFILL_FIRST


def test_p_is_asked_whether_its_tier_is_there() -> None:
    assert offloading.question(LEGS.prefill) == Question(5710, None)
    assert offloading.question(RANKED.prefill) == Question(7780, None), "that of the rank"
    assert offloading.question(replace(LEGS.prefill, rank=2)) == Question(5712, None)
    assert offloading.understood(b"", LEGS.prefill)


def test_prefill() -> None:
    """A stop or an end of the text is no matter to P, which has copied the blocks by then."""
    assert prefill(LEGS) == {
        **TEXT,
        "max_tokens": 1,
        "stream": False,
        "stop": ["x"],
        "kv_transfer_params": {"remote_decoder": {"kv_request_id": "pd-run-7"}},
    }
    assert offloading.prefill_headers(LEGS) == {}


def test_the_rank_that_the_scheduler_has_chosen() -> None:
    """Each engine's tier has a port of its own."""
    chosen = replace(LEGS, prefill=replace(peer("p0", "10.0.0.1", data_parallel_rank=3), rank=2, ranks=4))
    found = offloading.handoff(answer(), chosen)
    assert found is not None
    assert json.loads(found.params)["remote_prefiller"]["remote_port"] == 5712
    assert offloading.prefill_headers(chosen) == {"x-data-parallel-rank": "2"}
    source = replace(LEGS, source=replace(peer("d0", "10.0.1.1"), rank=1, ranks=2))
    assert prefill(source)["kv_transfer_params"]["remote_kv_source"]["remote_port"] == 5711
    assert [offloading.names_rank(each) for each in (LEGS, RANKED, chosen)] == [False, True, True]


def test_prefill_that_pulls() -> None:
    source = peer("d3", "10.0.1.3", p2p_port=6000, data_parallel_rank=1)
    assert prefill(replace(LEGS, source=source))["kv_transfer_params"] == {
        "remote_decoder": {"kv_request_id": "pd-run-7"},
        "remote_kv_source": {
            "kv_request_id": "pd-run-7-source",
            "remote_host": "10.0.1.3",
            "remote_port": 6001,
        },
    }


@pytest.mark.parametrize(("legs", "port"), [(LEGS, 5710), (RANKED, 7780)])
@pytest.mark.parametrize("reason", ["length", "stop", "tool_calls"])
def test_decode(legs: Legs, port: int, reason: str) -> None:
    found = offloading.handoff(answer(reason), legs)
    assert found is not None
    assert (found.prompt_tokens, found.cached_tokens) == (283, 16)
    assert (found.lease, found.pinned) == (legs.prefill.settings.lease, True)
    body = JsonBody.parse(json.dumps(TEXT).encode())
    at = {"kv_request_id": "pd-run-7", "remote_host": "10.0.0.1", "remote_port": port}
    splice = offloading.splice(body, found)
    assert splice is not None
    assert json.loads(splice.into(body.raw)) == {**TEXT, "kv_transfer_params": {"remote_prefiller": at}}


def test_the_engine_that_gets_it() -> None:
    assert offloading.prefill_headers(RANKED) == {"x-data-parallel-rank": "3"}


@pytest.mark.parametrize("text", [answer("error"), answer("abort"), b"{}", b"[]", b"\xff", b'{"choices":[]}'])
def test_what_is_no_answer_of_an_engine(text: bytes) -> None:
    """D would wait for what was never stored."""
    assert offloading.handoff(text, LEGS) is None


def test_nothing_frees_it_but_its_lease() -> None:
    found = offloading.handoff(answer(), LEGS)
    assert found is not None
    assert offloading.release_body(found, "m") is None


def test_it_can_pull() -> None:
    made: Attempt = attempt(offloading, LEGS)
    assert made.connector.can_pull
    assert not attempt().connector.can_pull
    source = peer("p1", "10.0.0.2")
    assert made.pulling_from(source).legs == replace(LEGS, source=source)


@pytest.mark.parametrize(
    "settings", [{"p2p_port": 0}, {"p2p_port": 70000}, {"lease": 0}, {"data_parallel_rank": -1}, {"port": 1}]
)
def test_settings_that_are_wrong(settings: dict[str, Any]) -> None:
    with pytest.raises(UnknownConnector, match="p2p_port, lease, data_parallel_rank"):
        peer("p0", "10.0.0.1", **settings)


def test_a_rank_whose_port_does_not_exist() -> None:
    settings = (("p2p_port", 65_530), ("data_parallel_rank", 6))
    with pytest.raises(UnknownConnector, match="choose a lower one"):
        settings_of(ConnectorChoice("offloading-p2p", settings))
