"""MoRI-IO: bodies of both legs, with and without a D that is known before, and whose hand-off it is."""

import json
from typing import Any

import pytest
from msgspec.structs import replace

from vllm_pd_scheduler.connectors import Legs, MoriioConnector, Order, Peer, settings_of
from vllm_pd_scheduler.models import ConnectorChoice
from vllm_pd_scheduler.request.api import RESPONSES
from vllm_pd_scheduler.request.body import JsonBody

moriio = MoriioConnector()
TEXT: dict[str, Any] = {"model": "m", "prompt": "x"}
PARAMS: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3]],
    "remote_engine_id": "10.0.0.1:6301",
    "remote_host": "10.0.0.1",
    "remote_handshake_port": 6301,
    "remote_notify_port": 61005,
    "remote_dp_rank": 0,
    "remote_dp_rank_override": True,
    "remote_dp_size": 1,
    "remote_dp_size_local": 1,
    "tp_size": 4,
    "transfer_id": "tx-run-7",
}


def peer(name: str, host: str, **settings: Any) -> Peer:
    choice = ConnectorChoice("moriio", tuple(sorted(settings.items())))
    return Peer(name, host, 8000, settings_of(choice))


READ = Legs("run-7", peer("p0", "10.0.0.1", mode="read"))
WRITE = Legs(
    "run-7",
    peer("p0", "10.0.0.1"),
    decode=peer("d0", "10.0.0.2", handshake_port=6400, notify_port=61400, tp_size=2),
)


def answer(params: Any = PARAMS, reason: str = "length") -> bytes:
    choice = {"index": 0, "text": " a", "finish_reason": reason}
    usage = {"prompt_tokens": 283, "prompt_tokens_details": {"cached_tokens": 16}}
    return json.dumps({"choices": [choice], "usage": usage, "kv_transfer_params": params}).encode()


def prefill(legs: Legs) -> Any:
    body = JsonBody.parse(json.dumps({**TEXT, "max_tokens": 9, "stream": True, "stop": ["x"]}).encode())
    return json.loads(moriio.prefill_body(body, legs))


def test_d_is_needed_only_where_p_writes() -> None:
    assert moriio.order(READ.prefill) is Order.PREFILL_FIRST
    assert moriio.order(WRITE.prefill) is Order.TOWARDS_DECODE


def test_a_response_under_the_clients_own_id_is_not_split() -> None:
    """That id is the engine's, out of which it would read addresses of peers."""
    for more in ({}, {"request_id": "___prefill_addr_evil:1___decode_addr_evil:2_0"}):
        body = json.dumps({"model": "m", "input": "x", **more}).encode()
        assert moriio.can_split(JsonBody.parse(body, RESPONSES)) is not bool(more)
        assert moriio.can_split(JsonBody.parse(json.dumps({**TEXT, **more}).encode())), (
            "a header counts there"
        )


def test_no_leg_has_the_clients_request_id() -> None:
    found = moriio.handoff(answer(), READ)
    assert found is not None
    assert moriio.prefill_headers(READ) == found.headers == {"x-request-id": "run-7"}


def test_prefill_that_d_reads() -> None:
    assert prefill(READ) == {
        **TEXT,
        "max_tokens": 1,
        "min_tokens": 1,
        "stream": False,
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "transfer_id": "tx-run-7",
            "remote_engine_id": None,
            "remote_block_ids": None,
        },
    }


def test_prefill_that_is_written_to_a_rank_of_d() -> None:
    assert WRITE.decode is not None
    legs = replace(WRITE, decode=replace(WRITE.decode, rank=3, ranks=8))
    sent = prefill(legs)["kv_transfer_params"]
    assert (sent["remote_dp_rank"], sent["remote_dp_rank_override"], sent["remote_dp_size"]) == (3, True, 8)
    assert [moriio.names_rank(each) for each in (READ, WRITE, legs)] == [False, False, True]


def test_prefill_that_is_written_to_d() -> None:
    assert prefill(WRITE)["kv_transfer_params"] == {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "transfer_id": "tx-run-7",
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": "10.0.0.2",
        "remote_handshake_port": 6400,
        "remote_notify_port": 61400,
        "remote_dp_rank": 0,
        "remote_dp_rank_override": True,
        "remote_dp_size": 1,
        "remote_tp_size": 2,
        "tp_size": 2,
    }


@pytest.mark.parametrize("legs", [READ, WRITE], ids=["read", "write"])
def test_d_gets_it_whole(legs: Legs) -> None:
    params = {**PARAMS, "remote_hosts": ["10.0.0.1"]}
    found = moriio.handoff(answer(params), legs)
    assert found is not None
    assert (found.prompt_tokens, found.cached_tokens, found.lease) == (283, 16, 60.0)
    body = JsonBody.parse(json.dumps(TEXT).encode())
    assert json.loads(moriio.splice(body, found).into(body.raw)) == {**TEXT, "kv_transfer_params": params}


@pytest.mark.parametrize(
    "change",
    [
        {"transfer_id": "tx-run-8"},
        {"transfer_id": None},
        {"remote_engine_id": ""},
        {"remote_host": ""},
        {"remote_handshake_port": "6301"},
        {"remote_notify_port": 0},
        {"remote_block_ids": []},
        {"remote_block_ids": [["1"]]},
        {"remote_dp_rank": -1},
        {"remote_dp_size": 0},
        {"tp_size": 0},
        {"do_remote_prefill": False},
    ],
)
def test_what_is_not_ours_or_d_would_die_of(change: dict[str, Any]) -> None:
    assert moriio.handoff(answer({**PARAMS, **change}), READ) is None


def test_what_is_missing() -> None:
    for key in (
        "transfer_id",
        "remote_engine_id",
        "remote_host",
        "remote_handshake_port",
        "remote_notify_port",
        "remote_block_ids",
    ):
        assert moriio.handoff(answer({k: v for k, v in PARAMS.items() if k != key}), READ) is None


def test_after_a_stop_there_is_none() -> None:
    assert moriio.handoff(answer(None, "stop"), READ) is None
    assert moriio.ended(answer(None, "stop"))


def test_release() -> None:
    found = moriio.handoff(answer(), READ)
    assert found is not None
    sent = json.loads(moriio.release_body(found, "m"))
    assert sent["max_tokens"] > 10**9
    assert sent["kv_transfer_params"] == PARAMS
