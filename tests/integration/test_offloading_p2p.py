"""A P whose tier is not where the configuration says: found out before D waits for it."""

from __future__ import annotations

from pathlib import Path

import aiohttp

from tests.support.processes import Client, Stack, ready, spawned, unused_ports
from tests.support.sim_fleet import Fleet
from vllm_pd_scheduler.sim.profile import EngineProfile


async def test_a_wrong_p2p_port(session: aiohttp.ClientSession, tmp_path: Path) -> None:
    with Fleet(1, 1, profile=EngineProfile.instant(), connector="offloading-p2p") as fleet:
        listed = fleet.config()
        listed["prefill_instances"][0]["connector"]["p2p_port"] = unused_ports(1)[0]
        stack = Stack(tmp_path)
        with spawned(stack.up(listed)) as process:
            client = Client(session, stack, fleet)
            await ready(client, process)
            before = await client.seen_by_all()
            answer = await client.complete()
            assert (answer.status, "x-pd-prefill" in answer.headers) == (200, False)
            assert not await client.seen_since("prefill-0", before["prefill-0"])
            assert len(await client.seen_since("decode-0", before["decode-0"])) == 1, "no D has waited"
            await process.says("does not answer as its connector needs it (question_connect)")
