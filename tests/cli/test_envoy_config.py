"""``envoy-config``: what it prints is the file that ships, or that file with what was asked for."""

import json
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.config.tls import InstanceTlsConfig
from vllm_pd_scheduler.envoy.configuration import config_path, render_config
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.envoy.schedulers import SchedulerAddress

FLEET = {
    "prefill_instances": [{"id": "p0", "host": "p0.example", "port": 1}],
    "decode_instances": [{"id": "d0", "host": "d0.example", "port": 2}],
}


def printed(*arguments: str) -> str:
    ended = CliRunner().invoke(app, ["envoy-config", *arguments])
    assert ended.exit_code == 0, ended.output
    return ended.output


def test_the_file_that_ships_with_its_comments() -> None:
    assert printed() == config_path().read_text(encoding="utf-8")
    assert printed("--port=10000", "--grpc-port=9002") == printed()


def test_what_is_given_in_its_place() -> None:
    options = ("--host=[::]", "--port=1", "--prefill-port=2", "--envoy-admin-port=3", "--grpc-port=4")
    text = printed(*options)
    assert yaml.safe_load(text) == render_config(EnvoyPorts(1, 2, 3, 4, "::"))
    assert "&id001" not in text
    assert "\n                  function envoy_on_request(handle)\n" in text, "scripts can be read"


def test_several_schedulers() -> None:
    options = ("--scheduler=a=10.0.0.1:9002", "--scheduler=b=[::1]:9002,1", "--scheduler=c=/run/x=1.sock,1")
    expected = [
        SchedulerAddress("10.0.0.1:9002", "a"),
        SchedulerAddress("[::1]:9002", "b", 1),
        SchedulerAddress("/run/x=1.sock", "c", 1),
    ]
    assert yaml.safe_load(printed(*options)) == render_config(EnvoyPorts(), schedulers=expected)
    assert printed("--scheduler=127.0.0.1:9002") == printed()
    wrong_ones = (
        "a=b=c",
        "10.0.0.1",
        "x=10.0.0.1:1,near",
        "10.0.0.1:1,-1",
        "A=10.0.0.1:1",
        "a-1=/run/x",
        "=/x",
    )
    for wrong in wrong_ones:
        ended = CliRunner().invoke(app, ["envoy-config", f"--scheduler={wrong}"])
        assert ended.exit_code == 2, ended.output
        assert "--scheduler" in ended.output


def test_workers_whose_ports_cannot_be(tmp_path: Path) -> None:
    """What ``serve --workers`` refuses is not printed for an Envoy either."""
    path = tmp_path / "config.json"
    for settings, said in (
        ({"grpc_port": 65535}, "grpc_port of worker w1 would be 65536"),
        ({"grpc_port": 9102, "metrics_port": 9103}, "is where metrics_port"),
    ):
        path.write_text(json.dumps({**FLEET, **settings}), encoding="utf-8")
        ended = CliRunner().invoke(app, ["envoy-config", f"--config={path}", "--workers=2"])
        assert ended.exit_code == 2, ended.output
        text = " ".join(ended.output.replace("│", " ").split())
        assert said in text
        assert "for --workers" in text


def test_each_of_several_schedulers_has_its_own_port() -> None:
    ended = CliRunner().invoke(app, ["envoy-config", "--scheduler=a=10.0.0.1:9002", "--grpc-port=9002"])
    assert ended.exit_code == 2
    assert "--grpc-port" in ended.output


def test_what_the_schedulers_configuration_says(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    settings: dict[str, Any] = {
        "grpc_port": 9102,
        "public_paths": ["/v1/models", "/own/*"],
        "instance_tls": {},
        "stream_idle_timeout": 7.5,
    }
    path.write_text(json.dumps({**FLEET, **settings}), encoding="utf-8")
    expected = render_config(
        EnvoyPorts(grpc=9102, prefill=None, continuation=None),
        InstanceTlsConfig(),
        7.5,
        3,
        settings["public_paths"],
    )
    assert yaml.safe_load(printed(f"--config={path}")) == expected
    listening = {**FLEET, "prefill_listener": "http://127.0.0.1:10555"}
    path.write_text(json.dumps(listening), encoding="utf-8")
    for options, used in ((), 10555), (("--prefill-port=7",), 7):
        assert yaml.safe_load(printed(f"--config={path}", *options)) == render_config(
            EnvoyPorts(prefill=used, continuation=None)
        )
    path.write_text(json.dumps({**FLEET, "grpc_socket": "/run/pd.sock"}), encoding="utf-8")
    assert yaml.safe_load(printed(f"--config={path}")) == render_config(
        EnvoyPorts(grpc_socket="/run/pd.sock", prefill=None, continuation=None)
    )
    assert yaml.safe_load(printed(f"--config={path}", "--grpc-port=9002")) == render_config(
        EnvoyPorts(prefill=None, continuation=None)
    )
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    ended = CliRunner().invoke(app, ["envoy-config", f"--config={tmp_path / 'bad.json'}"])
    assert ended.exit_code == 2
