"""Settings that go well together, under one name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

PresetName = Literal["low_latency"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "low_latency": {"strategy": "slo", "disaggregation": "tpot", "late_binding": True},
}
"""What each name stands for. Why these: ``docs/scheduling.md``."""


def hint(name: str) -> str:
    """Return what to say besides of an unknown strategy that has a preset's name; else nothing."""
    return f'. {name} is a preset: give "preset": "{name}" in the configuration' if name in PRESETS else ""


def filled(raw: Any) -> Any:
    """Return a configuration, as ``json.loads`` returns it, with what its preset says and it does not."""
    name = raw.get("preset") if isinstance(raw, dict) else None
    return {**PRESETS[name], **raw} if isinstance(name, str) and name in PRESETS else raw
