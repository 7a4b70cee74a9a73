"""What the first worker keeps for the one that comes after it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from unittest import mock

import msgspec

from vllm_pd_scheduler.admin import others
from vllm_pd_scheduler.admin.others import Others
from vllm_pd_scheduler.admin.summed_metrics import Counted

PAGE = b"# HELP a_total x\n# TYPE a_total counter\na_total %d\n"


async def test_of_pages_asked_for_at_once_the_newest_counts_are_kept(tmp_path: Path) -> None:
    """Two Prometheus servers scrape one scheduler: of what they write together nothing could be read."""
    path, writing, together = tmp_path / "counts", 0, 0

    def write(to: str, data: bytes) -> None:
        nonlocal writing, together
        writing += 1
        together = max(together, writing)
        time.sleep(0.01)
        Path(to).write_bytes(data)
        writing -= 1

    first = Others("w0", {}, str(path))
    with mock.patch.object(others, "_write_counts", write):
        await asyncio.gather(*(first.metrics(PAGE % number) for number in range(1, 6)))
    await first.close()
    assert together == 1
    kept = msgspec.msgpack.decode(path.read_bytes(), type=Counted)
    assert kept.last["w0"][1]["a_total"] == {"a_total": 5.0}
