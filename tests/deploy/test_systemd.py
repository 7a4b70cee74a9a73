"""The systemd units: systemd accepts them, and their command lines, paths and times fit the code."""

import configparser
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tests.support.compose_file import ROOT
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.config import SchedulerConfig, parse_config
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.envoy.process import find_envoy

DIRECTORY = ROOT / "deploy" / "systemd"
UNITS = ("vllm-pd-scheduler.service", "vllm-pd-envoy.service")
PREFIX = "/opt/vllm-pd-scheduler/bin/"
MOST_EXPOSED = 20
"""Tenths of systemd's exposure level, which is 96 for a unit without any hardening; `OK` begins below 49."""


def text(unit: str) -> str:
    return (DIRECTORY / unit).read_text(encoding="utf-8")


def settings(unit: str) -> dict[str, list[str]]:
    """The values of each key of a unit; a key may be there several times."""

    class Several(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            if isinstance(value, list) and key in self:
                self[key].extend(value)
            else:
                super().__setitem__(key, value)

    parser = configparser.RawConfigParser(dict_type=Several, strict=False, delimiters=["="])
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text(unit).replace("\\\n", " "))
    return {
        key: [line for line in str(value).split("\n") if line or value == ""]
        for section in parser.sections()
        for key, value in parser.items(section)
    }


SCHEDULER, ENVOY = (settings(unit) for unit in UNITS)


CONFIG = json.loads((DIRECTORY / "config.json").read_text(encoding="utf-8"))


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SchedulerConfig:
    """The configuration that is installed, with the environment of the unit and a directory that is here."""
    for line in (DIRECTORY / "environment").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, _, value = line.partition("=")
            monkeypatch.setenv(name, value)
    return parse_config({**CONFIG, "state_file": str(tmp_path / "state.json")})


def test_the_scheduler_s_command_line_is_one_of_ours() -> None:
    program, command, *arguments = shlex.split(SCHEDULER["ExecStart"][0])
    assert program == f"{PREFIX}vllm-pd-scheduler"
    group: Any = typer.main.get_command(app)
    with group.commands[command].make_context(command, arguments) as context:
        assert str(context.params["config"]) == "/etc/vllm-pd-scheduler/config.json"


def test_envoy_knows_its_options(tmp_path: Path) -> None:
    program, *arguments = shlex.split(ENVOY["ExecStart"][0])
    assert program == f"{PREFIX}envoy"
    config = tmp_path / "envoy.yaml"
    config.write_text("{}")
    arguments[arguments.index("-c") + 1] = str(config)
    done = subprocess.run(
        [find_envoy(), *arguments, "--mode", "validate"], capture_output=True, text=True, timeout=HUNG_S
    )
    assert done.returncode == 0, done.stderr


def test_envoy_is_drained_before_it_is_stopped() -> None:
    (line,) = ENVOY["ExecStop"]
    program, command, *arguments = shlex.split(line.removeprefix("-"))  # it is stopped all the same
    assert program == f"{PREFIX}vllm-pd-scheduler"
    group: Any = typer.main.get_command(app)
    with group.commands[command].make_context(command, arguments) as context:
        assert context.params["timeout"] < int(ENVOY["TimeoutStopSec"][0])
        assert context.params["envoy_admin_port"] == EnvoyPorts().admin
    assert "vllm-pd-scheduler.service" in ENVOY["After"][0]  # so it is stopped before


def test_there_is_time_to_drain(config: SchedulerConfig) -> None:
    for unit in (SCHEDULER, ENVOY):
        assert int(unit["TimeoutStopSec"][0]) > config.drain_timeout
        assert unit["KillMode"] == ["mixed"]
        assert unit["KillSignal"] == ["SIGTERM"]
    assert "ExecReload" not in ENVOY  # SIGHUP would end it


def test_a_reload_waits_for_what_comes_of_it() -> None:
    """SIGHUP tells nobody whether the configuration was refused."""
    (command,) = SCHEDULER["ExecReload"]
    assert shlex.split(command)[1:] == ["reload"]
    assert shlex.split(command)[0] == shlex.split(SCHEDULER["ExecStart"][0])[0]


def test_the_socket_and_the_state_are_in_directories_that_systemd_makes() -> None:
    assert Path(CONFIG["grpc_socket"]).parent == Path("/run") / SCHEDULER["RuntimeDirectory"][0]
    assert Path(CONFIG["state_file"]).parent == Path("/var/lib") / SCHEDULER["StateDirectory"][0]
    assert SCHEDULER["RuntimeDirectoryMode"] == ["0700"]
    assert SCHEDULER["User"] == ENVOY["User"] != ["root"]  # Envoy opens the socket as its owner


def test_keys_come_from_a_file_of_their_own() -> None:
    assert SCHEDULER["EnvironmentFile"] == ["-/etc/vllm-pd-scheduler/environment"]
    assert "EnvironmentFile" not in ENVOY
    assert "Environment" not in SCHEDULER


@pytest.mark.parametrize("unit", [SCHEDULER, ENVOY], ids=UNITS)
def test_a_process_that_ends_is_started_again(unit: dict[str, list[str]]) -> None:
    assert unit["Type"] == ["exec"]
    assert unit["Restart"][0] in ("on-failure", "always")
    assert int(unit["LimitNOFILE"][0]) >= 200_000


@pytest.mark.parametrize("unit", [SCHEDULER, ENVOY], ids=UNITS)
def test_a_system_call_that_is_not_allowed_ends_nothing(unit: dict[str, list[str]]) -> None:
    assert unit["SystemCallFilter"] == ["@system-service", "~@privileged"]
    assert unit["SystemCallErrorNumber"] == ["EPERM"]


def test_envoy_may_make_code_as_it_runs() -> None:
    """LuaJIT does."""
    assert SCHEDULER["MemoryDenyWriteExecute"] == ["yes"]
    assert "MemoryDenyWriteExecute" not in ENVOY


@pytest.fixture
def installed(tmp_path: Path) -> list[str]:
    """The units, with programs that are here."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    paths = []
    for unit in UNITS:
        path = tmp_path / unit
        path.write_text(
            text(unit)
            .replace(f"{PREFIX}vllm-pd-scheduler ", f"{sys.executable} ")
            .replace(f"{PREFIX}envoy ", f"{sys.executable} ")
        )
        paths.append(str(path))
    return paths


def test_systemd_accepts_the_units(installed: list[str]) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *installed], capture_output=True, text=True, timeout=HUNG_S
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_little_is_exposed(installed: list[str]) -> None:
    for path in installed:
        analyze = ["systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSED}", path]
        done = subprocess.run(analyze, capture_output=True, text=True, timeout=HUNG_S)
        if "unrecognized option" in done.stderr:
            pytest.skip("this systemd-analyze cannot judge a file")
        assert done.returncode == 0, done.stdout.splitlines()[-1]
