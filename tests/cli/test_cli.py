"""The command line, as a process of its own and in this one."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.service import run as service

EXAMPLE = Path(__file__).parents[2] / "scheduler_config.example.json"
FLEET = {
    "prefill_instances": [{"id": "p0", "host": "h", "port": 1}],
    "decode_instances": [{"id": "d0", "host": "h", "port": 2}],
}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``python -m vllm_pd_scheduler`` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "vllm_pd_scheduler", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=HUNG_S,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"},
    )


def call(*arguments: str | Path) -> Any:
    """The same without a process."""
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="vllm-pd-scheduler")


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(raw: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(raw if isinstance(raw, str) else json.dumps(raw), encoding="utf-8")
        return path

    return write


@pytest.fixture
def own_signals() -> Iterator[None]:
    """What ``serve`` does with signals would stay in this process, where later tests interrupt it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class TestProcess:
    """What only a process shows: status, streams, no traceback."""

    def test_check_prints_the_effective_configuration(self) -> None:
        ended = run("check", "--config", EXAMPLE)
        assert (ended.returncode, ended.stderr) == (0, "")
        shown = json.loads(ended.stdout)
        for key, value in json.loads(EXAMPLE.read_text(encoding="utf-8")).items():
            if not key.endswith("_instances"):
                assert shown[key] == value
        assert (shown["grpc_port"], shown["admin_port"]) == (9002, 9003)
        assert [each["id"] for each in shown["decode_instances"]] == ["decode-0", "decode-1"]

    def test_every_mistake_is_a_line_on_stderr(self, written: Any) -> None:
        entry = {"id": "d0", "host": "h", "port": 70000}
        path = written({"stratgy": "x", "max_retries": "3", "decode_instances": [entry]})
        ended = run("--config", path)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert sorted(line.removeprefix(f"{path}: ") for line in ended.stderr.splitlines()) == [
            "decode_instances[0].port: must be less than or equal to 65535",
            "max_retries: must be a valid integer",
            'prefill_instances: there are none; list at least one {"id": …, "host": …, "port": …}',
            "stratgy: unknown key; did you mean 'strategy'?",
        ]
        for command in ("check", "serve", "up"):
            again = call(command, "--config", path)
            assert (again.exit_code, again.stdout, again.stderr) == (2, "", ended.stderr)

    def test_without_anything_it_helps(self) -> None:
        ended = run()
        assert ended.returncode == 2
        assert "Usage: vllm-pd-scheduler" in ended.stdout
        for command in ("serve", "up", "check", "envoy-config", "sim", "demo"):
            assert command in ended.stdout
        assert ended.stderr.strip() == "vllm-pd-scheduler: a command, or --config FILE to serve, is needed"

    def test_a_port_that_is_taken(self, written: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            ended = run("--config", written({**FLEET, "admin_port": port, "health_check_timeout": 0.05}))
        assert ended.returncode == 1
        said = f"admin_port: cannot listen on 127.0.0.1:{port}: Address already in use. `ss -ltnp "
        assert f"vllm-pd-scheduler: {said}" in ended.stderr
        assert "or choose another admin_port" in ended.stderr
        assert ended.stderr.count(f"127.0.0.1:{port}") == 1
        assert "Traceback" not in ended.stderr

    def test_an_address_of_another_machine(self, written: Any) -> None:
        path = written({**FLEET, "grpc_host": "192.0.2.1", "grpc_port": 1, "health_check_timeout": 0.05})
        ended = run("--config", path)
        assert ended.returncode == 1
        assert "grpc_port: cannot listen on 192.0.2.1:1: Cannot assign requested address: " in ended.stderr
        assert "choose another grpc_host" in ended.stderr


class TestUp:
    def test_envoy_has_the_prefill_listener_of_the_configuration(
        self, written: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[str | None, int | None]] = []

        async def up(config: SchedulerConfig, ports: EnvoyPorts, *_: Any, **__: Any) -> int:
            seen.append((config.prefill_listener, ports.prefill))
            return 0

        monkeypatch.setattr(service, "up", up)
        for setting, options, expected in (
            (None, (), (None, None)),
            (None, ("--prefill-port=7",), (None, None)),
            ("http://127.0.0.1:10555", (), ("http://127.0.0.1:10555", 10555)),
            ("http://localhost", (), ("http://127.0.0.1:80", 80)),
            ("http://127.0.0.1:10555", ("--prefill-port=7",), ("http://127.0.0.1:7", 7)),
        ):
            path = written({**FLEET, "prefill_listener": setting})
            assert call("up", "--config", path, *options).exit_code == 0
            assert seen.pop() == expected


class TestCheck:
    def test_a_missing_file(self, tmp_path: Path) -> None:
        ended = call("check", "--config", tmp_path / "none.json")
        assert ended.exit_code == 2
        assert ended.stderr == f"{tmp_path}/none.json: cannot be read: No such file or directory\n"

    def test_what_is_no_json(self, written: Any) -> None:
        path = written('{"strategy": }')
        ended = call("check", "--config", path)
        assert ended.exit_code == 2
        assert ended.stderr == f"{path}: line 1, column 14: not valid JSON: Expecting value\n"

    def test_a_secret_is_checked_and_not_shown(self, written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        path = written({**FLEET, "api_key": {"env": "PD_TEST_KEY"}})
        monkeypatch.delenv("PD_TEST_KEY", raising=False)
        ended = call("check", "--config", path)
        assert (ended.exit_code, ended.stderr) == (
            2,
            f"{path}: api_key: environment variable PD_TEST_KEY is not set\n",
        )
        monkeypatch.setenv("PD_TEST_KEY", "sk-secret")
        ended = call("check", "--config", path)
        assert ended.exit_code == 0
        assert "PD_TEST_KEY" in ended.stdout
        assert "sk-secret" not in ended.output

    @pytest.mark.parametrize("key", ["strategy", "prefill_strategy", "decode_strategy", "shadow_strategy"])
    def test_a_strategy_that_raises(
        self, written: Any, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is loaded and made without an error: only a pick shows it."""
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / f"own_{key}.py").write_text(
            "from vllm_pd_scheduler.strategies import Strategy\n"
            "class Own(Strategy):\n"
            "    def score(self, endpoint, request):\n"
            "        return endpoint.queue_length\n"
        )
        path = written({**FLEET, key: f"own_{key}:Own"})
        ended = call("check", "--config", path)
        assert (ended.exit_code, ended.stdout) == (2, "")
        line = ended.stderr.splitlines()[0]
        assert line.startswith(f"{path}: {key}: strategy 'own_{key}:Own' fails for ")
        assert line.endswith(
            "AttributeError: 'Endpoint' object has no attribute 'queue_length', "
            f"at {tmp_path}/own_{key}.py:4 in score"
        )

    @pytest.mark.usefixtures("own_signals")
    @pytest.mark.parametrize("command", ["check", "serve", "up"])
    def test_a_connector_that_cannot_be_made(
        self, written: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "unfinished.py").write_text(
            "from vllm_pd_scheduler.connectors import Connector\nclass Own(Connector):\n    pass\n"
        )
        prefill = [{**FLEET["prefill_instances"][0], "connector": "unfinished:Own"}]
        path = written({**FLEET, "prefill_instances": prefill})
        ended = call(command, "--config", path)
        assert (ended.exit_code, ended.stdout) == (2, "")
        assert ended.stderr == (
            f"{path}: prefill_instances[0].connector: 'unfinished:Own' cannot be made: "
            "it lacks can_split, handoff, prefill_body\n"
        )

    def test_more_retries_than_envoys(self, written: Any) -> None:
        """An Envoy that runs elsewhere cannot be asked, and ``up`` tells its own."""
        path = written({**FLEET, "max_retries": 5})
        ended = call("check", "--config", path)
        assert ended.exit_code == 0
        assert json.loads(ended.stdout)["max_retries"] == 5
        assert ended.stderr.startswith(
            f"{path}: note: max_retries is 5, but num_retries in envoy/envoy.yaml is 3"
        )
        assert call("check", "--config", written({**FLEET, "max_retries": 3})).stderr == ""

    def test_check_reads_files_with_instances(self, written: Any, tmp_path: Path) -> None:
        more = tmp_path / "more.json"
        path = written({**FLEET, "instance_files": [str(more)]})
        entry = {"id": "d0", "host": "10.9.9.9", "port": 8200}
        more.write_text(json.dumps({"decode_instances": [entry]}))
        ended = call("check", "--config", path)
        assert ended.exit_code == 0
        assert f"{path}: note: file:{more}: the decode instance 'd0'" in ended.stderr
        more.write_text(json.dumps({"decode_instances": [{**entry, "host": "127.0.0.1", "port": 9003}]}))
        ended = call("check", "--config", path)
        assert ended.exit_code == 2
        assert (
            f"{more}: decode_instances[0]: 127.0.0.1:9003 is no instance, but our own admin_port"
            in ended.stderr
        )

    def test_check_says_who_fits_nobody(self, written: Any) -> None:
        other = [{**FLEET["decode_instances"][0], "connector": "mooncake"}]
        ended = call("check", "--config", written({**FLEET, "decode_instances": other}))
        assert ended.exit_code == 0
        assert "note: p0 can hand over to no decode instance" in ended.stderr
        more = {"discovery": [{"type": "docker"}], "decode_instances": other}
        assert "p0 can hand over" not in call("check", "--config", written({**FLEET, **more})).stderr

    def test_check_opens_nothing(self, written: Any) -> None:
        """A host that cannot be resolved is no mistake of the file."""
        ended = call("check", "--config", written(FLEET))
        assert ended.exit_code == 0


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["serve"], "--config"),
            (["check"], "--config"),
            (["--config", str(EXAMPLE), "--log-level", "LOUD"], "LOUD"),
            (["--config", str(EXAMPLE), "--interval", "0"], "--interval"),
            (["--config", str(EXAMPLE), "--interval", "-1"], "--interval"),
            (["--config", str(EXAMPLE), "--interval", "soon"], "--interval"),
            (["--config", str(EXAMPLE), "check"], "after 'check'"),
            (["--config", str(EXAMPLE), "--shadow", "fastest"], "unknown strategy 'fastest'"),
            (["serve", "--config", str(EXAMPLE), "--shadow", "fastest"], "--shadow"),
            (["up", "--config", str(EXAMPLE), "--shadow", "no.such:Module"], "--shadow"),
            (["--shadow", "slo", "check", "--config", str(EXAMPLE)], "after 'check'"),
            (["up", "--config", str(EXAMPLE), "--port", "70000"], "--port"),
            (["up", "--config", str(EXAMPLE), "--port", "0"], "--port"),
            (["up", "--config", str(EXAMPLE), "--host", "localhost"], "--host"),
            (["sim", "--prefill", "0"], "--prefill"),
            (["sim", "--connector", "carrier-pigeon"], "'carrier-pigeon' is none of"),
            (["no-such-command"], "no-such-command"),
            (["--no-such-option"], "--no-such-option"),
        ],
    )
    def test_what_cannot_be(self, arguments: list[str], message: str) -> None:
        ended = call(*arguments)
        assert ended.exit_code == 2
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr

    @pytest.mark.parametrize("flag", ["--help", "-h"])
    def test_help(self, flag: str) -> None:
        assert call(flag).exit_code == 0
        for command in ("serve", "up", "check", "envoy-config", "sim", "demo"):
            assert call(command, flag).exit_code == 0

    def test_as_the_mission_has_it(self, written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """``--config FILE --interval S --log-level LEVEL`` serves."""
        served: list[Any] = []
        formats: list[str] = []

        async def serve(config: Any, streams: Any, file: Any) -> int:
            served.append(config)
            return 0

        @contextmanager
        def logging_at(level: Any, kind: str) -> Iterator[None]:
            served.append(level)
            formats.append(kind)
            yield

        monkeypatch.setattr("vllm_pd_scheduler.service.run.serve", serve)
        monkeypatch.setattr("vllm_pd_scheduler.cli.serving.logging_at", logging_at)
        path = written(FLEET)
        for level in ("DEBUG", "INFO", "WARNING"):
            ended = call("--config", path, "--interval", "0.5", "--log-level", level.lower())
            assert ended.exit_code == 0, ended.output
            logged, config = served
            assert (logged, config.health_check_interval, config.strategy) == (level, 0.5, "least_load")
            served.clear()
        assert call("--config", path, "--log-format", "json").exit_code == 0
        as_json = written({**FLEET, "log_format": "json"})
        for arguments in (["--config", as_json], ["serve", "--config", as_json, "--log-format", "text"]):
            assert call(*arguments).exit_code == 0
        assert formats == ["text", "text", "text", "json", "json", "text"]
        served.clear()
        path = written(FLEET)
        assert call("--config", path).exit_code == 0
        assert (served[1].health_check_interval, served[1].shadow_strategy) == (5.0, None)
        for arguments in (["--config", path], ["serve", "--config", path]):
            served.clear()
            assert call(*arguments, "--shadow", "slo").exit_code == 0
            assert (served[1].strategy, served[1].shadow_strategy) == ("least_load", "slo")

    @pytest.mark.usefixtures("own_signals")
    def test_a_strategy_that_cannot_be_made(self, written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: Any) -> None:
            raise RuntimeError("odd")

        monkeypatch.setattr("vllm_pd_scheduler.strategies.Weighted.__init__", broken)
        ended = call("--config", written({**FLEET, "strategy": "weighted"}))
        assert ended.exit_code == 1
        assert ended.stderr.endswith(
            "vllm-pd-scheduler: strategy 'weighted' cannot be made: RuntimeError: odd\n"
        )
