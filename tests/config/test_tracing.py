"""The section ``tracing``: where spans go, and what is wrong with it."""

from importlib import util
from typing import Any

import pytest

from vllm_pd_scheduler.config import ConfigError, SchedulerConfig, TracingConfig, parse_config

FLEET = {
    "prefill_instances": [{"id": "p", "host": "10.0.0.1", "port": 1}],
    "decode_instances": [{"id": "d", "host": "10.0.0.2", "port": 1}],
}
VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def parse(tracing: Any) -> SchedulerConfig:
    return parse_config({**FLEET, "tracing": tracing})


def test_it_is_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES[1], "http://collector:4318")
    assert parse_config(FLEET).tracing is None


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        (None, "http://localhost:4318/v1/traces"),
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://collector/otlp/v1/traces", "https://collector/otlp/v1/traces"),
        ("http://[::1]:4318", "http://[::1]:4318/v1/traces"),
    ],
)
def test_where_spans_go(endpoint: str | None, url: str) -> None:
    assert TracingConfig(endpoint=endpoint).url() == url


def test_the_environment_says_where_unless_the_key_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES[1], "http://base:4318")
    assert TracingConfig().url() == "http://base:4318/v1/traces"
    monkeypatch.setenv(VARIABLES[0], "http://own:4318/there")
    assert TracingConfig().url() == "http://own:4318/there"
    assert TracingConfig(endpoint="http://key:4318").url() == "http://key:4318/v1/traces"


@pytest.mark.parametrize(
    "endpoint",
    [
        "collector:4318",
        "grpc://collector:4317",
        "http://",
        "http://h:0",
        "http://h:99999",
        "http://[::1",
        "http://h o",
    ],
)
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"tracing\.endpoint: must be http://HOST:PORT"):
        parse({"endpoint": endpoint})


def test_keys_do_not_stand_in_the_endpoint() -> None:
    for endpoint in ("http://user:secret@collector", "http://collector?key=secret"):
        with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_HEADERS") as raised:
            parse({"endpoint": endpoint})
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_that_is_no_url_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "collector:4318")
    with pytest.raises(ConfigError, match=f"tracing: {name} must be http"):
        parse({})


def test_the_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_pd_scheduler.config.tracing.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"tracing: OpenTelemetry is not installed: `.* -m pip install .*`"):
        parse({})
    assert util.find_spec("opentelemetry.sdk.trace"), "but these tests need it"


@pytest.mark.parametrize(
    "wrong", [{"sample_ratio": 1.5}, {"sample_ratio": "1"}, {"service_name": ""}, {"x": 1}, 1]
)
def test_values_that_it_cannot_have(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="tracing"):
        parse(wrong)
