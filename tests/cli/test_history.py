"""``decisions`` and ``explain``, of what the admin interface says of decisions."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from tests.support.admin_thread import AdminThread
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.cli import app

NONE = "\N{EN DASH}"
SPLIT: dict[str, Any] = {
    "number": 17,
    "time": "2026-11-28T09:22:56.250+00:00",
    "request_id": "c0ffee-42",
    "id": "5e1f-17",
    "path": "/v1/chat/completions",
    "model": "m",
    "stream": True,
    "prompt_tokens": 512,
    "served": "split",
    "not_split": None,
    "status": 200,
    "reason": None,
    "waited_s": 0.0,
    "prefill": {
        "strategy": "predicted_latency",
        "picked": "prefill-0",
        "predicted_s": 0.12,
        "took_s": 0.11,
        "source": {"instance": "decode-0", "tokens": 384},
        "candidates": [
            {"id": "prefill-0", "score": 0.24, "terms": {"wait": 0.0, "cost": 0.12}},
            {"id": "prefill-1", "score": 1.5, "terms": {"wait": 1.38}},
        ],
        "left_out": {"unhealthy": ["prefill-2", "prefill-3"], "full": [], "other model": []},
        "attempts": [{"instance": "prefill-0", "outcome": "ok"}],
    },
    "decode": {
        "strategy": "least_load",
        "picked": "decode-1",
        "by": "last_resort",
        "of": 40,
        "candidates": [{"id": "decode-0", "score": [1, 0.25]}, {"id": "decode-1", "score": 2}],
        "left_out": {},
        "attempts": [
            {"instance": "decode-0", "outcome": "connect"},
            {"instance": "decode-1", "outcome": None},
        ],
    },
    "predicted_ttft_s": 0.15,
    "ttft_s": 0.16,
    "duration_s": 1.2,
    "outcome": "ok",
}
REJECTED: dict[str, Any] = {
    **SPLIT,
    "number": 18,
    "request_id": "[red]\x1b[2J",
    "model": None,
    "prompt_tokens": None,
    "served": "rejected",
    "status": 429,
    "reason": "queue_full",
    "prefill": None,
    "decode": None,
    "predicted_ttft_s": None,
    "ttft_s": None,
    "duration_s": None,
    "outcome": None,
}


class Decisions:
    """Answers ``GET /decisions``, the newest first."""

    def __init__(self) -> None:
        self.all = [SPLIT, REJECTED]

    def __call__(self, request: web.Request) -> Any:
        query = request.query
        found = [
            each
            for each in reversed(self.all)
            if query.get("request_id") in (None, each["request_id"])
            and each["number"] > int(query.get("since", 0))
        ]
        return {"decisions": found[: int(query.get("limit", 1000))]}


@pytest.fixture
def kept() -> Decisions:
    return Decisions()


@pytest.fixture
def admin(kept: Decisions) -> Iterator[AdminThread]:
    with AdminThread(extra={"/with/decisions": kept}) as found:
        yield found


def call(admin: AdminThread, *arguments: str) -> Any:
    command = [*arguments, "--url", f"{admin.url}/with"]
    return CliRunner().invoke(app, command, prog_name="vllm-pd-scheduler")


def test_decisions(admin: AdminThread) -> None:
    ended = call(admin, "decisions")
    assert (ended.exit_code, ended.stderr) == (0, "")
    heads, _, rejected, split = ended.stdout.splitlines()
    assert heads.split()[:4] == ["DATE", "TIME", "REQUEST", "MODEL"]
    assert " ".join(rejected.split()[2:]) == (
        rf"[red]\x1b[2J {NONE} {NONE} rejected {NONE} {NONE} {NONE} 429 queue_full {NONE}"
    )
    assert " ".join(split.split()[2:]) == ("c0ffee-42 m 512 split prefill-0 → decode-1 160 ms 150 ms 200 ok")
    assert "c0ffee" not in call(admin, "decisions", "--limit", "1").stdout
    assert json.loads(call(admin, "decisions", "--json").stdout) == {"decisions": [REJECTED, SPLIT]}


def test_a_narrow_terminal_breaks_no_id(
    admin: AdminThread, kept: Decisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id = "91573904-ff54-4cd2-a138-d1e57fc41490"
    kept.all = [{**SPLIT, "request_id": request_id}]
    for columns, least in ((80, "STATUS"), (100, "FIRST TOKEN"), (120, "SERVED")):
        monkeypatch.setenv("COLUMNS", str(columns))
        heads, _, *rows = call(admin, "decisions").stdout.splitlines()
        assert len(rows) == 1
        assert request_id in rows[0]
        assert "prefill-0 → decode-1" in rows[0]
        assert least in heads
        assert len(heads) <= columns


def test_a_request_that_names_no_model(admin: AdminThread, kept: Decisions) -> None:
    kept.all = [{**SPLIT, "model": None}]
    assert ", no model named\n" in call(admin, "explain", "c0ffee-42").stdout


def test_decisions_that_are_yet_to_come(admin: AdminThread, kept: Decisions) -> None:
    program = [
        sys.executable,
        "-m",
        "vllm_pd_scheduler",
        "decisions",
        "--follow",
        "--url",
        f"{admin.url}/with",
    ]
    for option, wanted in ((), "new-19"), (("--json",), '"new-19"'):
        kept.all = [SPLIT, REJECTED]
        with subprocess.Popen([*program, *option], stdout=subprocess.PIPE, text=True) as following:
            assert following.stdout is not None
            assert "c0ffee-42" in following.stdout.readline()
            assert "[2J" in following.stdout.readline()
            kept.all.append({**SPLIT, "number": 19, "request_id": "new-19"})
            assert wanted in following.stdout.readline()
            following.send_signal(signal.SIGINT)
            assert following.wait(HUNG_S) == 0


def test_explain(admin: AdminThread) -> None:
    ended = call(admin, "explain", "c0ffee-42")
    assert (ended.exit_code, ended.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in ended.stdout.splitlines()]
    assert lines[0].startswith("c0ffee-42: 2026-11-28 ")
    assert lines[0].endswith(", /v1/chat/completions, model m")
    for line in (
        "512 prompt tokens, a stream; served split; waited 0 ms for an instance",
        "status 200, ok, after 1.2 s",
        "first token after 160 ms; predicted 150 ms",
        "prefill: predicted_latency picked prefill-0; predicted 120 ms; took 110 ms",
        "told to pull 384 prompt tokens from decode-0",
        "CANDIDATE SCORE WAIT COST",
        "→ prefill-0 0.24 0 0.12",
        f"prefill-1 1.5 1.38 {NONE}",
        "left out, unhealthy: prefill-2, prefill-3",
        "tried prefill-0: ok",
        "decode: last_resort (strategy: least_load) picked decode-1",
        "decode-0 1, 0.25",
        "of 40 candidates these are the best",
        "→ decode-1 2",
        "tried decode-0: connect",
        "tried decode-1: not ended",
    ):
        assert line in lines
    assert json.loads(call(admin, "explain", "c0ffee-42", "--json").stdout) == {"decisions": [SPLIT]}


@pytest.mark.parametrize(
    ("why", "words"),
    [("connector", "a connector of P does not split such a request"), ("of-a-later-version",) * 2],
)
def test_why_one_was_not_split(admin: AdminThread, kept: Decisions, why: str, words: str) -> None:
    kept.all.append({**SPLIT, "number": 20, "request_id": "alone", "served": "whole", "not_split": why})
    ended = call(admin, "explain", "alone")
    assert f"a stream; served whole, not split: {words}; waited 0 ms" in " ".join(ended.stdout.split())


def test_one_that_was_rejected(admin: AdminThread) -> None:
    ended = call(admin, "explain", REJECTED["request_id"])
    assert ended.exit_code == 0
    assert "  status 429, queue_full\n" in ended.stdout
    assert "prefill" not in ended.stdout


def test_one_that_nobody_knows(admin: AdminThread) -> None:
    for option in ((), ("--json",)):
        ended = call(admin, "explain", "\x1b[2J", *option)
        assert (ended.exit_code, ended.stdout) == (1, "")
        assert ended.stderr == (
            "vllm-pd-scheduler: no decision about the request \\x1b[2J is remembered; "
            "only the last 1,000 are\n"
        )
