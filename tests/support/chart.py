"""What the Helm chart renders for some values, and what the scheduler reads of it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.support.helm import CHART, RELEASE, rendered
from tests.support.kubernetes_schema import the_only
from vllm_pd_scheduler.config import SchedulerConfig, parse_config

Values = dict[str, Any]

Objects = list[dict[str, Any]]

NAME = f"{RELEASE}-vllm-pd-scheduler"

MOUNTS = "/etc/vllm-pd-scheduler"

DEFAULTS: Values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))

EPP: Values = {"mode": "epp"}

ROUTED: Values = {**EPP, "httpRoute": {"parentRefs": [{"name": "gateway"}]}}

TLS: Values = {"tls": {"instances": {"enabled": True, "existingSecret": "vllm-tls"}}}

ADMIN: Values = {"admin": {"existingSecret": "admin"}}

SHARED: Values = {"valkey": {"enabled": True, "existingSecret": "valkey"}}

POLICY: Values = {"networkPolicy": {"enabled": True}}


def merged(*several: Values) -> Values:
    found: Values = {}
    for values in several:
        for key, value in values.items():
            both = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = merged(found[key], value) if both else value
    return found


@cache
def _rendered(values: str) -> Objects:
    return rendered(json.loads(values))


def render(values: Values) -> Objects:
    """The objects for these values; for the same ones once."""
    return _rendered(json.dumps(values, sort_keys=True))


def config_of(found: Objects) -> Values:
    loaded: Values = json.loads(the_only(found, "ConfigMap")["data"]["config.json"])
    return loaded


def accepted(found: Objects, mounted: Path) -> SchedulerConfig:
    """The configuration of a rendered chart, as the scheduler reads it in its pod."""
    text = json.dumps(config_of(found)).replace(MOUNTS, str(mounted))
    return parse_config(json.loads(text))
