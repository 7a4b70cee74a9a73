"""Tracing: where spans are sent, and of which requests."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..system.extras import install_command

_PATH = "/v1/traces"
_ENDPOINTS = (("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", ""), ("OTEL_EXPORTER_OTLP_ENDPOINT", _PATH))
"""Variables of the environment that name the collector, and what is added to their values."""
_DEFAULT = "http://localhost:4318"
_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


class TracingConfig(BaseModel):
    """Where [traces](tracing.md) go, and of which requests. `{}` takes all of it from the environment."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    endpoint: str | None = None
    """URL of the collector's OTLP/HTTP receiver. `/v1/traces` is added to one without a path. Without this
    key it is `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` or `OTEL_EXPORTER_OTLP_ENDPOINT` of the environment, else
    `http://localhost:4318`."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the requests that are traced, of those that bring no `traceparent`; with one, that says
    whether. Without this key it is as `OTEL_TRACES_SAMPLER` says, else 1."""
    service_name: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    """Name of the scheduler in traces. Without this key it is `OTEL_SERVICE_NAME`, else
    `vllm-pd-scheduler`."""

    @field_validator("endpoint")
    @classmethod
    def _is_a_url(cls, endpoint: str | None) -> str | None:
        if endpoint is not None:
            _check_url(endpoint)
        return endpoint

    def url(self) -> str:
        """Return where spans are sent; raises :exc:`ValueError` naming a variable that is no URL."""
        if self.endpoint is not None:
            return self.endpoint if urlsplit(self.endpoint).path.strip("/") else _joined(self.endpoint, _PATH)
        for name, path in _ENDPOINTS:
            if value := os.environ.get(name, "").strip():
                try:
                    _check_url(value)
                except ValueError as error:
                    raise ValueError(f"{name} {error}") from None
                return _joined(value, path)
        return _joined(_DEFAULT, _PATH)

    def check(self) -> None:
        """Raise :exc:`ValueError` if no spans can be sent with these settings here."""
        try:
            missing = [module for module in _NEEDED if find_spec(module) is None]
        except ModuleNotFoundError as error:
            missing = [str(error.name)]
        if missing:
            raise ValueError(f"OpenTelemetry is not installed: `{install_command('tracing')}` installs it")
        self.url()


def _joined(base: str, path: str) -> str:
    return base.rstrip("/") + path if path else base


def _check_url(text: str) -> None:
    wrong = "must be http://HOST:PORT or https://HOST:PORT, with a path if the collector has one"
    try:
        parts = urlsplit(text)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        raise ValueError(wrong) from None
    if bad or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(wrong)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"{wrong}; give keys in OTEL_EXPORTER_OTLP_HEADERS")
