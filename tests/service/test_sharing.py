"""A scheduler that is one of several, while there is no server to meet the others at."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
import pytest

from tests.support.processes import unused_ports
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.records.events import EventKind
from vllm_pd_scheduler.service.app import App, StartupError


async def test_it_starts_serves_and_ends_without_the_server(tmp_path: Path) -> None:
    grpc, admin, dead, nobody = unused_ports(4)
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"version": 1, "drained": ["d"]}))
    config = parse_config(
        {
            "prefill_instances": [{"id": "p", "host": "127.0.0.1", "port": dead}],
            "decode_instances": [{"id": "d", "host": "127.0.0.1", "port": dead + 1}],
            "grpc_port": grpc,
            "admin_port": admin,
            "state_file": str(state),
            "replicas": {"url": f"valkey://127.0.0.1:{nobody}", "name": "a"},
        }
    )
    async with App(config) as app, aiohttp.ClientSession(f"http://127.0.0.1:{admin}") as session:
        said = [each.text for each in app.router.events.after(0) if each.kind is EventKind.REPLICAS]
        assert said == [
            f"no connection to the other replicas: 127.0.0.1:{nobody}: connection refused; this one goes on "
            "with what it sees"
        ]
        async with session.get("/status") as answer:
            shown = (await answer.json())["replicas"]
            assert not shown["connected"]
            assert shown["problem"] == f"127.0.0.1:{nobody}: connection refused"
            assert shown["others"] == []
        async with session.post("/instances/p/drain?force=true") as answer:
            assert answer.status == 503
            problem = "the log of the replicas does not take the change: "
            assert (await answer.json())["error"] == f"{problem}127.0.0.1:{nobody}: connection refused"
        assert not app.router.registry.get("p").draining
        assert app.router.registry.get("d").draining  # as its file says
        async with session.get("/readyz") as answer:
            assert answer.status == 503  # no D can serve, and nothing else
    assert json.loads(state.read_text())["drained"] == ["d"]


async def test_a_password_that_is_gone_ends_the_start(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("secret")
    config = parse_config(
        {
            "prefill_instances": [{"id": "p", "host": "127.0.0.1", "port": 1}],
            "decode_instances": [{"id": "d", "host": "127.0.0.1", "port": 2}],
            "replicas": {"url": "valkey://127.0.0.1", "password": {"file": str(password)}},
        }
    )
    password.unlink()
    with pytest.raises(StartupError, match=r"replicas: password: secret file .*No such file"):
        async with App(config):
            pass
