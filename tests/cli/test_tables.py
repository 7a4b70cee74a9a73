"""The tables and lines that people read."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_pd_scheduler.cli.tables import overview, show


def _others(*names: str) -> list[dict[str, Any]]:
    return [{"replica": f"{each}.1", "name": each, "machine": "host", "differs": False} for each in names]


@pytest.mark.parametrize(
    ("names", "problem", "says"),
    [
        (("a",), "", "replicas  1 other is heard: a on host\n"),
        (("a", "b"), "", "replicas  2 others are heard: a on host, b on host\n"),
        (
            (),
            "h:1: connection refused",
            "replicas  no others are heard\n          not connected: h:1: connection refused\n",
        ),
    ],
)
def test_the_other_replicas(
    capsys: pytest.CaptureFixture[str], names: tuple[str, ...], problem: str, says: str
) -> None:
    found = {
        "version": "1",
        "uptime_s": 1,
        "ready": True,
        "strategy": {"prefill": "a", "decode": "a"},
        "shadow": None,
        "queue": {"requests": 0, "bytes": 0},
        "held_bytes": 0,
        "roles": {},
        "replicas": {"connected": not problem, "problem": problem, "others": _others(*names)},
    }
    show(*overview(found))
    assert capsys.readouterr().out.endswith(says)
