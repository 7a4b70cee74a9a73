"""Ascend's Mooncake: NIXL's flow, a prefill that cannot stop, and what D needs beyond NIXL's keys."""

import json
from typing import Any

import pytest

from vllm_pd_scheduler.connectors import AscendMooncakeConnector, Legs, Peer, settings_of
from vllm_pd_scheduler.models import ConnectorChoice
from vllm_pd_scheduler.request.body import JsonBody

ascend = AscendMooncakeConnector()
TEXT: dict[str, Any] = {"model": "m", "prompt": "x"}
PARAMS: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [1, 2, 3],
    "remote_engine_id": "5f0c",
    "remote_request_id": "cmpl-5d1b-0",
    "remote_host": "10.0.0.1",
    "remote_port": 30000,
    "remote_pcp_size": 1,
    "remote_dcp_size": 2,
    "remote_ptp_size": 8,
    "last_token_id": 151643,
    "remote_multi_nodes_meta_mapping": {"0": {"host": "10.0.0.1", "engine_id": "5f0c"}},
    "num_prompt_blocks": 3,
    "remote_block_size": 128,
}


def legs(**settings: Any) -> Legs:
    choice = ConnectorChoice("ascend-mooncake", tuple(settings.items()))
    return Legs("run-7", Peer("p0", "10.0.0.1", 8000, settings_of(choice)))


def answer(params: Any = PARAMS, reason: str = "length") -> bytes:
    choice = {"index": 0, "text": " a", "finish_reason": reason}
    usage = {"prompt_tokens": 283, "prompt_tokens_details": {"cached_tokens": 128}}
    return json.dumps({"choices": [choice], "usage": usage, "kv_transfer_params": params}).encode()


def test_prefill() -> None:
    body = JsonBody.parse(json.dumps({**TEXT, "max_tokens": 9, "stream": True, "stop": ["x"]}).encode())
    assert json.loads(ascend.prefill_body(body, legs())) == {
        **TEXT,
        "max_tokens": 1,
        "min_tokens": 1,
        "stream": False,
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        },
    }


@pytest.mark.parametrize("blocks", [[1, 2, 3], [[1, 2, 3]], [[1, 2], [], [3]]], ids=["v1", "one", "hybrid"])
def test_d_gets_it_whole(blocks: Any) -> None:
    params = {**PARAMS, "remote_block_ids": blocks, "of_a_later_release": {"x": 1}}
    found = ascend.handoff(answer(params), legs())
    assert found is not None
    assert (found.prompt_tokens, found.cached_tokens, found.lease) == (283, 128, 480.0)
    body = JsonBody.parse(json.dumps(TEXT).encode())
    assert json.loads(ascend.splice(body, found).into(body.raw)) == {**TEXT, "kv_transfer_params": params}


def test_the_lease_is_a_setting() -> None:
    found = ascend.handoff(answer(), legs(lease=60))
    assert found is not None
    assert found.lease == 60.0


@pytest.mark.parametrize(
    "change",
    [
        {"remote_request_id": None},
        {"remote_request_id": ""},
        {"remote_engine_id": None},
        {"remote_host": ""},
        {"remote_port": "30000"},
        {"remote_block_ids": []},
        {"remote_block_ids": [-1]},
        {"remote_pcp_size": 0},
        {"remote_dcp_size": "2"},
        {"remote_ptp_size": -8},
        {"num_prompt_blocks": -1},
        {"last_token_id": "x"},
        {"remote_multi_nodes_meta_mapping": []},
        {"do_remote_prefill": False},
    ],
)
def test_what_d_would_die_of(change: dict[str, Any]) -> None:
    assert ascend.handoff(answer({**PARAMS, **change}), legs()) is None


def test_what_is_missing() -> None:
    for key in ("remote_request_id", "remote_engine_id", "remote_host", "remote_port", "remote_block_ids"):
        assert ascend.handoff(answer({k: v for k, v in PARAMS.items() if k != key}), legs()) is None


def test_after_a_stop_there_is_none() -> None:
    assert ascend.handoff(answer(None, "stop"), legs()) is None
    assert ascend.ended(answer(None, "stop"))


def test_release() -> None:
    found = ascend.handoff(answer(), legs())
    assert found is not None
    sent = json.loads(ascend.release_body(found, None))
    assert sent["max_tokens"] > 10**9
    assert sent["kv_transfer_params"] == PARAMS
