"""Envoy as a process beside this one: what it gets, what it says, what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.support.processes import running, unused_ports
from tests.support.waiting import until
from vllm_pd_scheduler.envoy import process as module
from vllm_pd_scheduler.envoy.configuration import render_config
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.envoy.process import EnvoyError, EnvoyProcess
from vllm_pd_scheduler.system.output import StandardStreams

ENDS = """\
#!/bin/sh
echo "the address cannot be used" >&2
exit 3
"""

TELLS = """\
#!{python}
import json, os, sys, time
config = sys.argv[sys.argv.index("-c") + 1]
seen = {{"environment": dict(os.environ), "config": json.load(open(config)), "path": config}}
open({path!r} + ".part", "w").write(json.dumps(seen))
os.rename({path!r} + ".part", {path!r})
time.sleep(60)
"""


@pytest.fixture
def ports() -> EnvoyPorts:
    return EnvoyPorts(*unused_ports(4), "127.0.0.1")


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_what_it_said_comes_before_the_error(
    ports: EnvoyPorts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    envoy = script(tmp_path / "envoy", ENDS)
    monkeypatch.setattr(module, "find_envoy", lambda: envoy)

    async def start(streams: StandardStreams) -> None:
        with pytest.raises(EnvoyError, match="status 3") as caught:
            async with EnvoyProcess(ports, streams=streams):
                pass
        print(caught.value, file=sys.stderr)

    with open(write, "w") as stream, mock.patch("sys.stderr", stream), StandardStreams() as streams:
        asyncio.run(start(streams))
    with open(read) as pipe:
        first, second = pipe.read().splitlines()
    assert first == "the address cannot be used"
    assert second.startswith("Envoy ended with status 3 at start; its own message is above")


async def test_it_gets_no_secret_and_leaves_no_file(
    ports: EnvoyPorts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen_at = tmp_path / "seen.json"
    envoy = script(tmp_path / "envoy", TELLS.format(python=sys.executable, path=str(seen_at)))
    monkeypatch.setattr(module, "find_envoy", lambda: envoy)
    secrets = {"FLEET_KEY": "s3cret", "ADMIN_TOKEN": "s3cret", "HF_TOKEN": "s3cret", "HTTP_PROXY": "s3cret"}
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    process = EnvoyProcess(ports)

    async def live(_: EnvoyProcess) -> None:
        async def seen() -> bool:
            return seen_at.exists()

        await until(seen)

    monkeypatch.setattr(EnvoyProcess, "_live", live)
    async with process:
        seen = json.loads(seen_at.read_text())
        assert "s3cret" not in json.dumps(seen)
        assert seen["environment"]["PATH"] == os.environ["PATH"]
        assert seen["environment"]["TMPDIR"] == str(tmp_path / "tmp")
        assert seen["config"] == render_config(ports)
        assert seen["path"].startswith("/dev/fd/")
        assert list((tmp_path / "tmp").iterdir()) == []
        pid = process.pid
    assert not running(pid)


async def test_no_room_for_its_configuration(ports: EnvoyPorts, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.memfd_create", full)
    with pytest.raises(EnvoyError, match=r"Envoy's configuration: No space left on device"):
        async with EnvoyProcess(ports):
            pass
