"""Mooncake: the bodies of both legs, what P's bootstrap server says, and whom a request goes to."""

import json
from typing import Any

import pytest
from msgspec.structs import replace

from vllm_pd_scheduler.connectors import Legs, MooncakeConnector, Peer, settings_of
from vllm_pd_scheduler.models import ConnectorChoice
from vllm_pd_scheduler.request.body import JsonBody

mooncake = MooncakeConnector()
TEXT: dict[str, Any] = {"model": "m", "prompt": "x"}
ONE_ENGINE = {"0": {"engine_id": "e0", "worker_addr": {"0": {"0": "tcp://10.0.0.1:40001"}}}}


def peer(host: str = "10.0.0.1", **settings: Any) -> Peer:
    choice = ConnectorChoice("mooncake", tuple(sorted(settings.items())))
    return Peer("p0", host, 8000, settings_of(choice))


def legs(prefill: Peer | None = None, engines: Any = None, id: str = "run-7") -> Legs:
    prefill = prefill or peer()
    known = mooncake.understood(json.dumps(engines or ONE_ENGINE).encode(), prefill)
    return Legs(id, prefill, known)


def body(**fields: Any) -> JsonBody:
    return JsonBody.parse(json.dumps({**TEXT, **fields}).encode())


def answer(reason: str | None = "length", **more: Any) -> bytes:
    choice = {"index": 0, "text": " a", "finish_reason": reason}
    usage = {"prompt_tokens": 283, "prompt_tokens_details": {"cached_tokens": 16}}
    return json.dumps({"choices": [choice], "usage": usage, "kv_transfer_params": None, **more}).encode()


class TestQuestion:
    def test_where(self) -> None:
        assert mooncake.question(peer()).port == 8998
        assert mooncake.question(peer(bootstrap_port=9000)).port == 9000
        assert mooncake.question(peer()).path == "/query"

    def test_engines_by_rank(self) -> None:
        two = {"1": {**ONE_ENGINE["0"], "engine_id": "e1"}, **ONE_ENGINE}
        raw = json.dumps(two).encode()
        assert mooncake.understood(raw, peer()) == ((0, "e0"), (1, "e1"))
        assert mooncake.understood(raw, peer(data_parallel_rank=1)) == ((1, "e1"),)
        assert mooncake.understood(raw, peer(data_parallel_rank=2)) is None

    @pytest.mark.parametrize(
        "nonsense",
        [
            {},
            [],
            None,
            "x",
            5,
            {"x": ONE_ENGINE["0"]},
            {"-1": ONE_ENGINE["0"]},
            {"0": None},
            {"0": {"engine_id": "e0"}},
            {"0": {"engine_id": "e0", "worker_addr": {}}},
            {"0": {"engine_id": "e0", "worker_addr": {"0": {}}}},
            {"0": {"engine_id": "e0", "worker_addr": {"0": {"0": ""}}}},
            {"0": {**ONE_ENGINE["0"], "engine_id": ""}},
            {"0": {**ONE_ENGINE["0"], "engine_id": 5}},
            {"0": {**ONE_ENGINE["0"], "engine_id": "e" * 2000}},
        ],
    )
    def test_nonsense(self, nonsense: Any) -> None:
        assert mooncake.understood(json.dumps(nonsense).encode(), peer()) is None

    def test_what_is_no_json(self) -> None:
        for raw in (b"", b"\xff", b"<html>", b"[" * 100_000, b'{"0":' * 100_000):
            assert mooncake.understood(raw, peer()) is None


class TestPrefill:
    def test_body(self) -> None:
        sent = mooncake.prefill_body(
            body(max_tokens=9, stream=True, stop=["x"], stop_token_ids=[5], min_tokens=3), legs()
        )
        assert json.loads(sent) == {
            **TEXT,
            "max_tokens": 1,
            "min_tokens": 1,
            "stream": False,
            "kv_transfer_params": {
                "do_remote_decode": True,
                "do_remote_prefill": False,
                "transfer_id": "xfer-run-7",
            },
        }

    def test_the_rank_is_named_only_where_there_is_a_choice(self) -> None:
        two = {**ONE_ENGINE, "1": {**ONE_ENGINE["0"], "engine_id": "e1"}}
        assert mooncake.prefill_headers(legs()) == {}
        one_of_two = legs(peer(data_parallel_rank=1), two)
        assert mooncake.prefill_headers(one_of_two) == {"x-data-parallel-rank": "1"}

    def test_the_rank_that_the_scheduler_has_chosen(self) -> None:
        """It has the hand-off, whatever the settings say; an instance without such a rank gets nothing."""
        two = {**ONE_ENGINE, "1": {**ONE_ENGINE["0"], "engine_id": "e1"}}
        for settings in ({}, {"data_parallel_rank": 0}):
            chosen = legs(replace(peer(**settings), rank=1, ranks=2), two)
            found = mooncake.handoff(answer(), chosen)
            assert found is not None
            assert json.loads(found.params)["remote_engine_id"] == "e1"
            assert mooncake.prefill_headers(chosen) == {"x-data-parallel-rank": "1"}
        assert mooncake.understood(json.dumps(two).encode(), replace(peer(), rank=2, ranks=3)) is None

    def test_whether_a_rank_is_named(self) -> None:
        two = {**ONE_ENGINE, "1": {**ONE_ENGINE["0"], "engine_id": "e1"}}
        assert not mooncake.names_rank(legs())
        assert mooncake.names_rank(legs(engines=two))
        assert mooncake.names_rank(legs(peer(data_parallel_rank=1), two))
        assert mooncake.names_rank(legs(replace(peer(), rank=1, ranks=2), two))

    def test_each_rank_gets_its_part_and_the_hand_off_is_of_that_one(self) -> None:
        two = {**ONE_ENGINE, "1": {**ONE_ENGINE["0"], "engine_id": "e1"}}
        ranks = []
        for number in range(40):
            attempt = legs(engines=two, id=f"run-{number}")
            rank = mooncake.prefill_headers(attempt)["x-data-parallel-rank"]
            found = mooncake.handoff(answer(), attempt)
            assert found is not None
            assert json.loads(found.params)["remote_engine_id"] == f"e{rank}"
            ranks.append(rank)
        assert 10 <= ranks.count("0") <= 30


class TestHandoff:
    def test_it_is_made_of_the_attempt(self) -> None:
        found = mooncake.handoff(answer(), legs())
        assert found is not None
        assert (found.prompt_tokens, found.cached_tokens) == (283, 16)
        assert (found.lease, found.pinned) == (480.0, True)
        request = body(max_tokens=9, stop=["x"])
        assert json.loads(mooncake.splice(request, found).into(request.raw)) == {
            **TEXT,
            "max_tokens": 9,
            "stop": ["x"],
            "kv_transfer_params": {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "transfer_id": "xfer-run-7",
                "remote_bootstrap_addr": "http://10.0.0.1:8998",
                "remote_engine_id": "e0",
                "remote_prefill_cached_tokens": 16,
            },
        }
        assert found.tells_cached, "D's usage says it"

    def test_what_p_had_cached_may_not_be_known(self) -> None:
        found = mooncake.handoff(answer(usage={"prompt_tokens": 283}), legs())
        assert found is not None
        assert "remote_prefill_cached_tokens" not in json.loads(found.params)
        assert not found.tells_cached

    def test_settings(self) -> None:
        found = mooncake.handoff(answer(), legs(peer("fd00::1", bootstrap_port=9000, lease=60.0)))
        assert found is not None
        assert found.lease == 60.0
        assert json.loads(found.params)["remote_bootstrap_addr"] == "http://[fd00::1]:9000"

    def test_the_lease_may_be_a_whole_number(self) -> None:
        found = mooncake.handoff(answer(), legs(peer(lease=60)))
        assert found is not None
        assert found.lease == 60.0

    @pytest.mark.parametrize("reason", ["length", "tool_calls"])
    def test_after_a_token_that_was_cut_off(self, reason: str) -> None:
        assert mooncake.handoff(answer(reason), legs()) is not None

    def test_after_a_stop_p_has_kept_nothing(self) -> None:
        assert mooncake.handoff(answer("stop"), legs()) is None
        assert mooncake.ended(answer("stop"))

    @pytest.mark.parametrize(
        "raw",
        [
            answer(None),
            answer("error"),
            answer("abort"),
            answer("repetition"),
            answer(choices=[]),
            b"{}",
            b"null",
            b"",
            b"Bad Gateway",
            b"\xff",
        ],
    )
    def test_what_says_nothing_of_a_token(self, raw: bytes) -> None:
        assert mooncake.handoff(raw, legs()) is None
        assert not mooncake.ended(raw)

    def test_each_attempt_has_an_id_of_its_own(self) -> None:
        first, second = legs(), replace(legs(), id="run-8")
        assert mooncake.prefill_body(body(), first) != mooncake.prefill_body(body(), second)
        a, b = mooncake.handoff(answer(), first), mooncake.handoff(answer(), second)
        assert a is not None
        assert b is not None
        assert a.params != b.params

    def test_release(self) -> None:
        found = mooncake.handoff(answer(), legs())
        assert found is not None
        sent = json.loads(mooncake.release_body(found, "m"))
        assert sent["max_tokens"] > 10**9, "more than D can have"
        assert (sent["model"], sent["kv_transfer_params"]) == ("m", json.loads(found.params))
