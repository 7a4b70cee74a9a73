"""The section ``replicas``: where replicas meet, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from vllm_pd_scheduler.config import ConfigError, SchedulerConfig, compare, parse_config
from vllm_pd_scheduler.config.replicas import OF_EACH, Meeting
from vllm_pd_scheduler.sync.greeting import settings_of

FLEET: dict[str, Any] = {
    "prefill_instances": [{"id": "p", "host": "10.0.0.1", "port": 8000}],
    "decode_instances": [{"id": "d", "host": "10.0.0.2", "port": 8000}],
}


def _problems(section: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse_config({**FLEET, "replicas": section})
    return raised.value.problems


@pytest.mark.parametrize(
    ("url", "meeting"),
    [
        ("valkey://10.0.0.5", Meeting((("10.0.0.5", 6379),), "", 0, False)),
        ("redis://me@valkey.internal:7000/3", Meeting((("valkey.internal", 7000),), "me", 3, False)),
        ("valkeys://[::1]:7,b/", Meeting((("::1", 7), ("b", 6379)), "", 0, True)),
        ("rediss://a", Meeting((("a", 6379),), "", 0, True)),
    ],
)
def test_what_a_url_says(url: str, meeting: Meeting) -> None:
    config = parse_config({**FLEET, "replicas": {"url": url}})
    assert config.replicas is not None
    assert config.replicas.meeting() == meeting


def test_sentinels_have_a_port_of_their_own() -> None:
    config = parse_config({**FLEET, "replicas": {"url": "valkey://a,b:5", "sentinel": "ours"}})
    assert config.replicas is not None
    assert config.replicas.meeting().addresses == (("a", 26379), ("b", 5))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "10.0.0.5",
        "http://a",
        "valkey://",
        "valkey://a:0",
        "valkey://a:99999",
        "valkey://a/x",
        "valkey://a,,b",
    ],
)
def test_what_is_no_url(url: str) -> None:
    (problem,) = _problems({"url": url})
    assert problem.startswith("replicas.url: must be valkey://[USER@]HOST[:PORT]")


def test_a_password_in_the_url_is_refused_and_not_shown() -> None:
    (problem,) = _problems({"url": "valkey://me:secret@a"})
    assert problem.endswith('; put the password into replicas.password, as {"env": NAME} or {"file": PATH}')
    assert "secret" not in problem


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"name": "A"}, "replicas.name: must be 1 to 16 lower-case letters and digits"),
        ({"key": "a{b}"}, "replicas.key: must be 1 to 64 letters, digits, '.', '_', ':' and '-'"),
        ({"keys": 1}, "replicas.keys: unknown key; did you mean 'key'?"),
        ({"tls": {}}, "replicas: tls: needs a url that begins with valkeys:// or rediss://"),
        ({"sentinel_password": {"env": "X"}}, "replicas: sentinel_password: needs sentinel"),
        ({"password": {"env": "NOT_THERE"}}, "replicas: password: environment variable NOT_THERE is not set"),
    ],
)
def test_what_is_wrong_is_said(more: dict[str, Any], problem: str) -> None:
    (found,) = _problems({"url": "valkey://a", **more})
    assert found.startswith(problem)


def test_certificates_are_read(tmp_path: Path) -> None:
    (problem,) = _problems({"url": "valkeys://a", "tls": {"ca": str(tmp_path / "none.pem")}})
    assert problem.startswith("replicas: tls: ")
    assert "none.pem" in problem


def test_without_its_package_the_section_cannot_be_used() -> None:
    with mock.patch("vllm_pd_scheduler.config.replicas.find_spec", return_value=None):
        (problem,) = _problems({"url": "valkey://a"})
    assert problem.startswith("replicas: hiredis is not installed: ")


def test_a_change_needs_a_restart() -> None:
    one, two = (parse_config({**FLEET, "replicas": {"url": f"valkey://{host}"}}) for host in "ab")
    assert compare(one, two).needs_restart == ["replicas"]


def test_what_may_differ_from_replica_to_replica_are_keys() -> None:
    assert SchedulerConfig.model_fields.keys() >= OF_EACH
    assert settings_of(parse_config(FLEET)).keys() == SchedulerConfig.model_fields.keys() - OF_EACH
