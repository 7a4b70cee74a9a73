"""What a configuration of Envoy has, and whether Envoy takes it."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from typing import Any

from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.envoy.process import find_envoy


def every(key: str, value: Any) -> Iterator[Any]:
    """All values of a key, at any depth."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        for item in value.values():
            yield from every(key, item)
    elif isinstance(value, list):
        for item in value:
            yield from every(key, item)


def cluster(config: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in config["static_resources"]["clusters"] if each["name"] == name]
    return found


async def accepted_by_envoy(config: dict[str, Any]) -> None:
    """Fail if Envoy refuses a configuration, or warns of it."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        process = await asyncio.create_subprocess_exec(
            find_envoy(),
            *("--mode", "validate", "-c", file.name, "--log-level", "warning"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(process.communicate(), HUNG_S)
    assert process.returncode == 0, output.decode()
    assert b"[warning]" not in output, output.decode()
    assert b"deprecated" not in output, output.decode()
