"""Traces of requests by OpenTelemetry. Only what is imported while tracing is on needs its packages."""

from .current import current

__all__ = ["current"]
